"""Which shapes KronA's factors may have."""

from __future__ import annotations

import pytest

import graphwright as gw


@pytest.mark.parametrize(("out", "into"), [(24, 24), (36, 24), (768, 768), (7, 5), (1, 12)])
def test_all_pairs_of_divisors_fewest_numbers_first(out: int, into: int) -> None:
    found = gw.kronecker_shapes(out, into)
    every = {(a1, a2) for a1 in range(1, out + 1) for a2 in range(1, into + 1) if not (out % a1 or into % a2)}
    assert [a for a, _ in found if a in every] == [a for a, _ in found]
    assert len(found) == len(every)
    assert all((a[0] * b[0], a[1] * b[1]) == (out, into) for a, b in found)
    numbers = [a[0] * a[1] + b[0] * b[1] for a, b in found]
    assert numbers == sorted(numbers)


def test_of_shapes_with_as_many_numbers_the_one_that_can_say_most_comes_first() -> None:
    """All of (1, 2048) ⊗ (2048, 1) to (32, 64) ⊗ (64, 32) hold 4096 numbers; the former is a matrix of rank 1."""
    (a, b), *_ = gw.kronecker_shapes(2048, 2048)
    assert a[0] * a[1] + b[0] * b[1] == 4096
    assert min(a) * min(b) == 1024
