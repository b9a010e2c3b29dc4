"""Any weight, pattern and share of zeros: count, pattern and mask are kept, and pruning again changes nothing."""

from __future__ import annotations

import functools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw

PATTERNS = ("unstructured", "2:4", "1:4", "3:5", "1x4", "4x1", "2x3", "8x8")


@functools.cache
def linear(outputs: int, columns: int) -> gw.Program:
    return gw.trace(nn.Sequential(nn.Linear(columns, outputs)).eval(), torch.ones(2, columns))


def blocks_of(matrix: np.ndarray, pattern: str) -> np.ndarray:
    """Its blocks, ``[blocks, weights of a block]``: single weights, groups of M columns, or R rows by C columns."""
    rows, columns = matrix.shape
    if "x" in pattern:
        r, c = (int(each) for each in pattern.split("x"))
        blocks: np.ndarray = matrix.reshape(rows // r, r, columns // c, c).transpose(0, 2, 1, 3).reshape(-1, r * c)
        return blocks
    return matrix.reshape(-1, int(pattern.partition(":")[2] or 1))


@given(
    st.sampled_from(PATTERNS),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.floats(0, 0.999),
    st.integers(0, 2**16),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_pruning(pattern: str, size: tuple[int, int], sparsity: float, seed: int, ties: bool) -> None:
    rows, columns = (int(each) for each in pattern.split("x")) if "x" in pattern else (1, 1)
    if ":" in pattern:
        columns = int(pattern.partition(":")[2])
    draw = np.random.default_rng(seed)
    shape = size[0] * rows, size[1] * columns
    magnitudes = draw.integers(1, 4, shape) if ties else draw.random(shape) + 0.1
    weight = (magnitudes * draw.choice([-1, 1], shape)).astype(np.float32)
    program = linear(*shape).clone(copy_weights=True)
    with torch.no_grad():
        program.tensor("0.weight").copy_(torch.from_numpy(weight))
    wanted = None if ":" in pattern else sparsity
    item = gw.PruneLinears(pattern=pattern, sparsity=wanted)
    changed = item(program)
    found = program.tensor("0.weight").detach().numpy().copy()
    kept = found != 0
    assert np.array_equal(found[kept], weight[kept])

    blocks, scores = blocks_of(kept, pattern), blocks_of(np.abs(weight), pattern)
    if ":" in pattern:  # of every M neighbours N stay, none smaller than one that went
        assert (blocks.sum(1) == int(pattern.partition(":")[0])).all()
        assert (np.where(blocks, 0, scores).max(1) <= np.where(blocks, scores, np.inf).min(1)).all()
        assert changed
    else:  # whole blocks, the nearest whole number of them, none that stays lighter than one that went
        assert (blocks.any(1) == blocks.all(1)).all()
        gone, sums = ~blocks.all(1), scores.sum(1)
        assert abs(int(gone.sum()) - len(blocks) * sparsity) <= 0.5 + 1e-9
        assert not gone.any() or gone.all() or sums[gone].max() <= sums[~gone].min() * (1 + 1e-6)
        assert changed == bool(gone.any())

    assert not item(program)
    assert np.array_equal(program.tensor("0.weight").detach().numpy(), found)
    if not changed:
        return
    gw.HoldMasks()(program)
    held = program.tensor("0.weight")
    program(torch.ones(2, shape[1])).square().sum().backward()
    assert held.grad is not None
    with torch.no_grad():
        held -= 0.01 * held.grad + 1e-3
    gw.ReleaseMasks()(program)
    trained = program.tensor("0.weight").detach().numpy()
    assert (trained[~kept] == 0).all()
    assert gw.describe_sparsity(program).linears[0].intact
