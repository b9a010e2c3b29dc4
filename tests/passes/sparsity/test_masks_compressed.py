"""Records of pruned weights follow them into compressed ones and back."""

from __future__ import annotations

from typing import Any

import pytest

import graphwright as gw

from .models import names, pruned


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_records_follow(bits: int | None) -> None:
    program = pruned(pattern="1:4")
    if bits is not None:
        gw.QuantizeLinears(bits=bits, group_size=32)(program)
    before = gw.pruned_weights(program)
    assert gw.CompressLinears()(program)
    compressed = gw.pruned_weights(program)
    assert {name.removesuffix("_mask") for name in compressed} == set(before)
    shown = gw.describe_sparsity(program)
    assert len(shown.linears) == 13
    assert all(row.intact and row.sparsity >= 0.75 for row in shown.linears if row.pattern)
    with pytest.raises(gw.InputError, match="the weight is compressed already"):
        gw.PruneLinears(sparsity=0.9)(program)
    assert gw.DecompressLinears()(program)
    assert gw.pruned_weights(program) == before
    assert set(names(program)) == set(before)
    rows: list[Any] = [row for row in gw.describe_sparsity(program).linears if row.pattern]
    assert len(rows) == 12
    assert all(row.intact for row in rows)
