"""Sparse linears against arithmetic written out anew: formats, tails, gradients, and operands that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from graphwright.ir import ops
from graphwright.ir.ops.sparse import compress, pack_codes, pack_mask, unpack_codes, unpack_mask
from graphwright.ir.ops.sparse_int8 import int8_weight, stored_values

DOUBLE = torch.float64
WIDTHS = (1, 2, 3, 7, 8, 9, 31, 33)


def run(*operands: Any) -> torch.Tensor:
    result: torch.Tensor = ops.get("linear_sparse").target(*operands)
    return result


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def floats(outputs: int, columns: int, share: float, seed: int = 0) -> tuple[list[Any], np.ndarray]:
    """Operands after ``x`` up to the format, and the matrix that they mean, one entry after another."""
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(outputs, columns)) * (generator.random((outputs, columns)) < share)
    mask, values, offsets = np.zeros((outputs, -(-columns // 8)), np.uint8), [], [0]
    for row in range(outputs):
        for column in np.flatnonzero(matrix[row]):
            mask[row, column // 8] |= 1 << (column % 8)
            values.append(matrix[row, column])
        offsets.append(len(values))
    operands = [
        torch.from_numpy(mask),
        torch.tensor(values, dtype=DOUBLE),
        torch.tensor(offsets, dtype=torch.int32),
        None,
        None,
    ]
    return operands, matrix


def coded(
    format: str, outputs: int, columns: int, group: int, share: float, *, zeros: bool, seed: int = 0
) -> tuple[list[Any], np.ndarray]:
    bits = {"int8": 8, "int4": 4}[format]
    generator = np.random.default_rng(seed)
    groups = -(-columns // group)
    codes = generator.integers(0, 2**bits, (outputs, columns))
    zero = generator.integers(0, 2**bits, (outputs, groups)) if zeros else np.full((outputs, groups), 2 ** (bits - 1))
    scales = generator.random((outputs, groups)) + 0.1
    wide = np.repeat(zero, group, axis=1)[:, :columns]
    codes = np.where(generator.random((outputs, columns)) < share, codes, wide)
    stored = torch.from_numpy(codes != wide)
    mask, values, offsets = compress(torch.from_numpy(codes.astype(np.uint8)), stored)
    points = torch.from_numpy(zero.astype(np.uint8)) if zeros else None
    operands = [mask, pack_codes(values, format), offsets, torch.from_numpy(scales), points]
    return operands, (codes - wide) * np.repeat(scales, group, axis=1)[:, :columns]


@given(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS), st.sampled_from((0, 1, 3)), st.sampled_from((0.0, 0.3, 1)))
@settings(max_examples=40, deadline=None)
def test_floats(outputs: int, columns: int, rows: int, share: float) -> None:
    operands, matrix = floats(outputs, columns, share, seed=rows)
    x, bias = random(rows, columns), random(outputs, seed=1)
    found = run(x, *operands, bias, "float", 0)
    np.testing.assert_allclose(found.numpy(), x.numpy() @ matrix.T + bias.numpy(), rtol=1e-12, atol=1e-12)


@given(
    st.sampled_from(("int8", "int4")),
    st.sampled_from(WIDTHS),
    st.sampled_from(WIDTHS),
    st.sampled_from((1, 3, 8, 64)),
    st.sampled_from((0.0, 0.3, 1)),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_codes(format: str, outputs: int, columns: int, group: int, share: float, zeros: bool) -> None:
    operands, matrix = coded(format, outputs, columns, group, share, zeros=zeros, seed=columns)
    x = random(3, columns)
    found = run(x, *operands, None, format, group)
    np.testing.assert_allclose(found.numpy(), x.numpy() @ matrix.T, rtol=1e-12, atol=1e-10)


@given(st.integers(0, 20), st.integers(1, 20), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_masks_and_codes_come_back(rows: int, columns: int, share: float) -> None:
    stored = torch.rand(rows, columns, generator=torch.Generator().manual_seed(columns)) < share
    mask = pack_mask(stored)
    assert mask.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack_mask(mask, columns), stored)
    codes = torch.arange(rows * columns).remainder(16).to(torch.uint8)
    for format, size in (("int8", len(codes)), ("int4", -(-len(codes) // 2))):
        values = pack_codes(codes, format)
        assert values.shape == (size,)
        assert torch.equal(unpack_codes(values, format, len(codes)), codes)


def test_the_layout_is_as_documented() -> None:
    weight = torch.zeros(2, 10)
    weight[0, 1], weight[0, 9], weight[1, 8] = 5.0, 6.0, 7.0
    mask, values, offsets = compress(weight, weight != 0)
    assert mask.tolist() == [[0b10, 0b10], [0, 0b1]]
    assert (values.tolist(), offsets.tolist()) == ([5.0, 6.0, 7.0], [0, 2, 3])
    assert pack_codes(torch.tensor([1, 2, 3], dtype=torch.uint8), "int4").tolist() == [0x21, 0x03]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_wide(dtype: torch.dtype) -> None:
    operands, matrix = floats(9, 33, 0.5)
    operands[1] = operands[1].to(dtype)
    x = random(4, 33).to(dtype)
    found = run(x, *operands, None, "float", 0)
    assert found.dtype == dtype
    rounded = torch.from_numpy(matrix).to(dtype).double()
    wanted = (x.float() @ rounded.float().t()).to(dtype)
    torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_zero_meets_infinity_like_any_number() -> None:
    operands, _ = floats(3, 5, 0.0)
    x = torch.ones(2, 5, dtype=DOUBLE)
    x[1, 2] = torch.inf
    found = run(x, *operands, None, "float", 0)
    assert found[0].tolist() == [0.0] * 3
    assert found[1].isnan().all()


def test_gradients_reach_input_values_and_bias() -> None:
    operands, _ = floats(5, 9, 0.5)
    x, bias = random(3, 9).requires_grad_(), random(5, seed=1).requires_grad_()
    values = operands[1].requires_grad_()

    def product(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return run(x, operands[0], values, *operands[2:], bias, "float", 0)

    assert torch.autograd.gradcheck(product, (x, values, bias))
    assert torch.autograd.gradcheck(lambda values: product(x.detach(), values, bias.detach()), (values,))


@pytest.mark.parametrize(
    ("place", "bad", "words"),
    [
        (1, torch.zeros(3, 3, dtype=torch.uint8), "mask must be uint8"),
        (1, torch.zeros(3, 2, dtype=torch.int8), "mask must be uint8"),
        (2, torch.zeros(4, dtype=torch.int32), "values must be floating"),
        (2, torch.zeros(2, 2), "values must be a vector"),
        (3, torch.zeros(4, dtype=torch.int64), "row_offsets must be an int32 vector"),
        (4, torch.ones(3, 1), "no scales"),
        (6, torch.zeros(2), "bias must be"),
        (7, "int5", "not one of"),
        (8, 4, "no scales, zero points or groups"),
    ],
)
def test_float_operands_that_do_not_fit(place: int, bad: Any, words: str) -> None:
    operands, _ = floats(3, 9, 0.5)
    given = [random(2, 9), *operands, None, "float", 0]
    given[place] = bad
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=words):
        run(*(mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in given))


@pytest.mark.parametrize(
    ("place", "bad", "words"),
    [
        (2, torch.zeros(4), "codes must be uint8"),
        (4, None, "scales must be"),
        (4, torch.ones(3, 2), "scales must be"),
        (5, torch.ones(3, 3), "zero points must be uint8"),
        (8, 0, "at least one column"),
    ],
)
def test_coded_operands_that_do_not_fit(place: int, bad: Any, words: str) -> None:
    operands, _ = coded("int4", 3, 9, 4, 0.5, zeros=True)
    given = [random(2, 9), *operands, None, "int4", 4]
    given[place] = bad
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=words):
        run(*(mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in given))


def test_work_is_that_of_the_values() -> None:
    operands, matrix = floats(6, 20, 0.25)
    definition = ops.get("linear_sparse")
    names = [item.name for item in definition.target._schema.arguments]
    given = [random(3, 20), *operands, None, "float", 0]
    shapes = {n: tuple(v.shape) if isinstance(v, torch.Tensor) else v for n, v in zip(names, given, strict=True)}
    assert definition.macs(shapes) == 3 * np.count_nonzero(matrix)


# -- rounded activations -----------------------------------------------------------------------------------------------


def int8_operands(outputs: int, columns: int, share: float) -> tuple[list[Any], torch.Tensor]:
    draw = torch.Generator().manual_seed(outputs)
    weight = torch.randint(-128, 128, (outputs, columns), generator=draw).to(torch.int8)
    weight *= torch.rand(outputs, columns, generator=draw) < share
    mask, values, offsets = compress(stored_values(weight), weight != 0)
    return [mask, values, offsets, torch.rand(outputs, generator=draw) + 0.1], weight


@given(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS), st.sampled_from((0, 1, 3)), st.sampled_from((0.0, 0.3, 1)))
@settings(max_examples=25, deadline=None)
def test_rounded_activations(outputs: int, columns: int, rows: int, share: float) -> None:
    """What the dense operators give on the same weights, and their gradients."""
    operands, weight = int8_operands(outputs, columns, share)
    assert torch.equal(int8_weight(operands[0], operands[1], columns), weight)
    bias, grid = random(outputs, seed=1).float(), (torch.rand(columns) + 0.01, 100)
    for name, rest in (("dynamic", ("per_token",)), ("dynamic", ("per_tensor",)), ("static", grid)):
        results, gradients = [], []
        for op, given_operands in (("sparse", operands), ("int8", [weight, operands[3]])):
            x = random(rows, columns, seed=2).float().requires_grad_()
            result = ops.get(f"linear_{op}_{name}").target(x, *given_operands, bias, *rest)
            result.sum().backward()
            results.append(result)
            gradients.append(x.grad)
        assert torch.equal(*results)
        assert torch.equal(*gradients)


def test_rounded_operands_that_do_not_fit() -> None:
    (mask, values, offsets, scales), _ = int8_operands(9, 17, 0.5)
    dynamic, static = (ops.get(f"linear_sparse_{name}").target for name in ("dynamic", "static"))
    x, steps = torch.zeros(2, 17), torch.ones(17)
    for wrong, reason in (
        ((x, mask[:, 1:], values, offsets, scales, None, "per_token"), r"mask must be uint8 \[9, 3\]"),
        ((x, mask, values.int(), offsets, scales, None, "per_token"), "values must be uint8, not torch.int32"),
        ((x, mask, values, offsets.long(), scales, None, "per_token"), "row_offsets must be an int32 vector"),
        ((x, mask, values, offsets, scales[1:], None, "per_token"), r"scales must be \[9\]"),
        ((x, mask, values, offsets, scales, None, "per_row"), "'per_row' is not one of"),
    ):
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=reason):
            dynamic(*wrong)
    for grid, reason in (
        ((steps, 256), "must be in 0..255, not 256"),
        ((steps[1:], 3), r"input_scales must be \[17\]"),
    ):
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=reason):
            static(x, mask, values, offsets, scales, None, *grid)


def test_stored_weights_are_counted_alone() -> None:
    (mask, values, offsets, scales), weight = int8_operands(9, 17, 0.5)
    shapes = {"x": (2, 3, 17), "mask": mask.shape, "values": values.shape, "row_offsets": offsets.shape}
    count = ops.get("linear_sparse_dynamic").macs({**shapes, "scales": scales.shape, "bias": None})
    assert count == 6 * int((weight != 0).sum())
