"""Patterns of zeros: parsed, counted exactly, kept to, and refused where they do not divide."""

from __future__ import annotations

import math

import pytest
import torch

import graphwright as gw
from graphwright.ir.sparsity import least

SCORES = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).abs()


def of(text: str) -> gw.SparsityPattern:
    return gw.SparsityPattern.of(text, where="test")


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8", "1:4", "1x4", "4x1", "16x1", "32x32"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("by_row", [False, True])
def test_masks_have_the_pattern_and_the_count(text: str, sparsity: float, by_row: bool) -> None:
    pattern = of(text)
    assert str(pattern) == text
    mask = pattern.mask(SCORES, sparsity, by_row=by_row)
    assert mask.dtype == torch.bool
    assert mask.shape == SCORES.shape
    assert pattern.holds(mask)
    blocks = SCORES.numel() // (pattern.rows * pattern.columns)
    rows = len(SCORES) // pattern.rows if by_row else 1
    wanted = rows * math.ceil(blocks // rows * sparsity - 0.5) * pattern.rows * pattern.columns
    if pattern.among:
        wanted = SCORES.numel() * (pattern.among - pattern.kept) // pattern.among
    assert int((~mask).sum()) == wanted


def test_the_least_go() -> None:
    mask = of("unstructured").mask(SCORES, 0.5)
    assert SCORES[~mask].max() < SCORES[mask].min()
    mask = of("2:4").mask(SCORES, 0.5).view(32, -1, 4)
    assert torch.equal(mask, SCORES.view(32, -1, 4) >= SCORES.view(32, -1, 4).sort(-1).values[..., 2:3])
    rows = of("unstructured").mask(SCORES, 0.5, by_row=True)
    assert bool((rows.sum(1) == 32).all())
    sums = SCORES.view(8, 4, 64).sum(1)
    blocks = of("4x1").mask(SCORES, 0.5).view(8, 4, 64)[:, 0]
    assert sums[~blocks].max() < sums[blocks].min()


def test_equal_scores_still_give_the_count() -> None:
    for text in ("unstructured", "2:4", "1x4"):
        mask = of(text).mask(torch.ones(32, 64), 0.5)
        assert int(mask.sum()) == 32 * 32
        assert of(text).holds(mask)


def test_a_mask_that_does_not_keep_to_a_pattern() -> None:
    assert not of("2:4").holds(torch.ones(4, 8, dtype=torch.bool))
    half = torch.ones(4, 8, dtype=torch.bool)
    half[0, 0] = False
    assert not of("1x4").holds(half)
    assert not of("2:4").holds(torch.zeros(4, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("2x", "is no pattern of zeros"),
        ("two", "is no pattern of zeros"),
        (24, "is no pattern of zeros"),
        ("4:4", "keeps 4 of every 4"),
        ("0:4", "keeps 0 of every 4"),
        ("0x4", "has blocks of nothing"),
    ],
)
def test_text_that_is_no_pattern(given: object, words: str) -> None:
    with pytest.raises(gw.InputError, match=words):
        gw.SparsityPattern.of(given, where="test")


def test_sizes_that_do_not_divide_have_a_reason() -> None:
    assert of("2:4").objection((3, 8)) is None
    assert of("2:4").objection((3, 10)) == "10 columns are no multiple of 4"
    assert of("16x1").objection((24, 3)) == "[24, 3] does not divide into blocks of 16 by 1"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 15, 16, 17, 33])
def test_the_least_are_the_first_of_a_stable_order(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for levels in (1, 3, 1000):  # few of them: many are equal
        scores = torch.randint(0, levels, (5, size), generator=generator).float()
        order = scores.argsort(dim=1, stable=True)
        for count in range(size + 1):
            wanted = torch.zeros(5, size, dtype=torch.bool).scatter_(1, order[:, :count], True)
            assert torch.equal(least(scores, count), wanted)
