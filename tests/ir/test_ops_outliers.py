"""Sparse linears, rounded activations and INT8 attention against arithmetic written out anew."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from graphwright.ir import ops
from graphwright.ir.cost import cost_of
from graphwright.ir.ops import attention_int8 as int8
from graphwright.ir.ops import outliers
from graphwright.ir.ops.quantization import dequantize, pack

DOUBLE = torch.float64
WIDTHS = (1, 2, 3, 7, 8, 9, 31, 33)


def run(name: str, *operands: Any) -> torch.Tensor:
    result: torch.Tensor = ops.get(name).target(*operands)
    return result


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# -- sparse linears ----------------------------------------------------------------------------------------------------


def sparse(outputs: int, features: int, share: float, seed: int = 0) -> tuple[tuple[torch.Tensor, ...], np.ndarray]:
    """Operands of ``linear_outliers``, and the matrix that they mean."""
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(outputs, features)) * (generator.random((outputs, features)) < share)
    pointers, columns, values = [0], [], []
    for row in matrix:
        for column in np.flatnonzero(row):
            columns.append(int(column))
            values.append(row[column])
        pointers.append(len(columns))
    operands = (
        torch.tensor(pointers, dtype=torch.int32),
        torch.tensor(columns, dtype=torch.int16),
        torch.tensor(values, dtype=DOUBLE),
    )
    return operands, matrix


@given(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS), st.sampled_from((0, 1, 2, 5)), st.sampled_from((0.0, 0.1, 1)))
@settings(max_examples=40)
def test_a_sparse_linear_is_the_product_with_its_matrix(outputs: int, features: int, rows: int, share: float) -> None:
    operands, matrix = sparse(outputs, features, share, seed=rows)
    x = random(rows, features)
    found = run("linear_outliers", x, *operands)
    np.testing.assert_allclose(found.numpy(), x.numpy() @ matrix.T, rtol=1e-12, atol=1e-12)


def test_a_sparse_linear_of_many_rows_goes_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    operands, matrix = sparse(5, 9, 0.5)
    x = random(2, 7, 9)
    monkeypatch.setattr(outliers, "_MOST_PRODUCTS", 50)
    np.testing.assert_allclose(run("linear_outliers", x, *operands).numpy(), x.numpy() @ matrix.T, rtol=1e-12)


@pytest.mark.parametrize(
    ("place", "bad", "words"),
    [
        (1, torch.zeros(4, dtype=torch.int64), "row_pointers must be int32"),
        (2, torch.zeros(3, dtype=torch.int64), "columns must be int16 or int32"),
        (3, torch.zeros(3, dtype=torch.int32), "values must be floating"),
        (3, torch.zeros(4), "vectors of one length"),
        (1, torch.zeros(2, 2, dtype=torch.int32), "row_pointers must be a vector"),
    ],
)
def test_sparse_operands_that_do_not_fit(place: int, bad: torch.Tensor, words: str) -> None:
    operands = [torch.zeros(2, 8), torch.tensor([0, 1, 2, 3], dtype=torch.int32)]
    operands += [torch.zeros(3, dtype=torch.int16), torch.ones(3)]
    operands[place] = bad
    with FakeTensorMode() as mode, pytest.raises((ValueError, RuntimeError), match=words):
        run("linear_outliers", *map(mode.from_tensor, operands))


def test_the_cost_of_a_sparse_linear_is_what_it_stores() -> None:
    import graphwright as gw

    class Sparse(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            (pointers, columns, values), _ = sparse(16, 32, 0.05)
            for name, tensor in (("pointers", pointers), ("columns", columns), ("values", values.bfloat16())):
                self.register_buffer(name, tensor)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run("linear_outliers", x, self.pointers, self.columns, self.values)

    model = Sparse()
    count = len(model.values)
    (node,) = [each for each in cost_of(gw.trace(model, torch.randn(3, 32))).nodes if "outliers" in each.op]
    assert (node.cost.macs, node.cost.weight_bytes) == (3 * count, 17 * 4 + count * (2 + 2))


# -- rounded activations -----------------------------------------------------------------------------------------------


def packed(
    outputs: int, columns: int, group: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(columns)
    groups = -(-columns // group)
    codes = torch.randint(0, 16, (outputs, columns), generator=generator, dtype=torch.uint8)
    zeros = None if symmetric else torch.randint(0, 16, (outputs, groups), generator=generator, dtype=torch.uint8)
    return pack(codes, 4, group, zeros), torch.rand(outputs, groups, generator=generator) + 0.1, zeros


def rounded_by_hand(row: np.ndarray, bits: int, activation: str, group: int) -> np.ndarray:
    """What a row is rounded to, value by value."""
    found = np.empty_like(row)
    if activation == "per_token":
        low, high = row.min(), row.max()
        step = (high - low) / (2**bits - 1) or 1.0
        return np.array([low + step * min(max(round((value - low) / step), 0), 2**bits - 1) for value in row])
    for start in range(0, len(row), group):
        part = row[start : start + group]
        step = np.abs(part).max() / (2 ** (bits - 1) - 1)
        found[start : start + group] = [step * round(value / step) if step else 0.0 for value in part]
    return found


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("activation", ["per_token", "per_group"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounded_activations(columns: int, activation: str, bits: int, symmetric: bool) -> None:
    stored = packed(5, columns, 8, symmetric)
    weight = dequantize(*stored, 4, columns, DOUBLE).numpy()
    x, bias = random(3, columns) + 0.7, random(5)
    x[2] = x[2, 0]
    wanted = np.stack([rounded_by_hand(row, bits, activation, 8) for row in x.numpy()]) @ weight.T + bias.numpy()
    found = run("linear_nbits_dynamic", x, *stored, bias, 4, 8, bits, activation)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["per_token", "per_group"])
def test_rows_are_rounded_by_themselves_and_bad_ones_stay_alone(activation: str) -> None:
    stored = packed(5, 16, 8, True)
    x = random(5, 16)
    x[1, 3], x[2, 0], x[3, 9], x[4] = math.nan, math.inf, -math.inf, 0.0
    found = run("linear_nbits_dynamic", x, *stored, None, 4, 8, 8, activation)
    assert found[1:4].isnan().all()
    assert (found[4] == 0).all()
    assert torch.equal(found[:1], run("linear_nbits_dynamic", x[:1], *stored, None, 4, 8, 8, activation))
    assert run("linear_nbits_dynamic", x[:0], *stored, None, 4, 8, 8, activation).shape == (0, 5)


def test_gradients_pass_straight_through_rounded_activations() -> None:
    stored = packed(5, 20, 8, False)
    weight = dequantize(*stored, 4, 20, DOUBLE)
    for activation in ("per_token", "per_group"):
        x, bias = random(3, 20).requires_grad_(), random(5).requires_grad_()
        run("linear_nbits_dynamic", x, *stored, bias, 4, 8, 4, activation).sum().backward()
        assert x.grad is not None
        assert bias.grad is not None
        torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 20))
        torch.testing.assert_close(bias.grad, torch.full((5,), 3.0, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("bits", "activation", "words"), [(5, "per_token", "must be one of"), (8, "static", "'static'")]
)
def test_activation_settings_that_do_not_exist(bits: int, activation: str, words: str) -> None:
    with FakeTensorMode() as mode:
        x, *stored = map(mode.from_tensor, (random(3, 16), *packed(5, 16, 8, False)))
        with pytest.raises(ValueError, match=words):
            run("linear_nbits_dynamic", x, *stored, None, 4, 8, bits, activation)


# -- attention ---------------------------------------------------------------------------------------------------------


def attention_by_hand(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float) -> np.ndarray:
    """One query of one head after another, in Python's integers."""

    def bytes_of(row: np.ndarray) -> tuple[list[int], float]:
        step = float(np.abs(row).max()) / 127
        return [round(float(each) / step) if step else 0 for each in row], step

    result = np.zeros((*query.shape[:3], value.shape[3]))
    for b, h, i in np.ndindex(query.shape[:3]):
        shared = h // (query.shape[1] // key.shape[1])
        codes, step = bytes_of(query[b, h, i])
        keys, values = ([bytes_of(row) for row in each[b, shared]] for each in (key, value))
        scores = [sum(a * c for a, c in zip(codes, row, strict=True)) * step * size * scale for row, size in keys]
        powers = [math.exp(score - max(scores)) for score in scores]
        factors = [power / sum(powers) * size for power, (_, size) in zip(powers, values, strict=True)]
        grid = max(factors) / 255
        steps = [round(factor / grid) for factor in factors]
        for d in range(value.shape[3]):
            result[b, h, i, d] = sum(a * row[d] for a, (row, _) in zip(steps, values, strict=True)) * grid
    return result


@pytest.mark.parametrize("keys", [1, 2, 9])
@pytest.mark.parametrize("heads", [2, 4])
def test_attention_in_bytes(keys: int, heads: int) -> None:
    query, key, value = random(2, heads, 3, 7), random(2, 2, keys, 7, seed=1), random(2, 2, keys, 5, seed=2)
    found = run("attention_int8", query, key, value, None, None, 0.4, False, 0)
    np.testing.assert_allclose(found.numpy(), attention_by_hand(query.numpy(), key.numpy(), value.numpy(), 0.4))
    exact = run("attention", query, key, value, None, None, 0.4, False, 0)
    assert (found - exact).norm() / exact.norm() < 0.02


def test_masks_are_those_of_attention_and_what_is_hidden_changes_nothing() -> None:
    query, key, value = random(2, 2, 6, 8), random(2, 2, 6, 8, seed=1), random(2, 2, 6, 8, seed=2)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    bias = random(1, 1, 6, 6, seed=3)
    for options in ((mask, None, 0.3, True, 0), (mask, bias, 0.3, False, 3), (None, bias > 0, 0.3, False, 0)):
        found, exact = (run(name, query, key, value, *options) for name in ("attention_int8", "attention"))
        assert (found - exact).norm() / exact.norm() < 0.02, options
    key[1, :, 4:], value[1, :, 4:] = 1000.0, 1000.0
    again = run("attention_int8", query, key, value, mask, None, 0.3, False, 0)
    key[1, :, 4:], value[1, :, 4:] = 0.0, 0.0
    assert torch.equal(again, run("attention_int8", query, key, value, mask, None, 0.3, False, 0))
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    assert (run("attention_int8", query, key, value, nothing, None, 0.3, False, 0) == 0).all()


def test_later_keys_change_nothing_about_earlier_queries() -> None:
    query, key, value = random(1, 2, 6, 8), random(1, 2, 6, 8, seed=1), random(1, 2, 6, 8, seed=2)
    whole = run("attention_int8", query, key, value, None, None, 0.3, True, 0)
    part = run("attention_int8", *(each[:, :, :4] for each in (query, key, value)), None, None, 0.3, True, 0)
    torch.testing.assert_close(whole[:, :, :4], part, rtol=1e-12, atol=1e-12)


def test_gradients_of_attention_in_bytes_are_nearly_those_of_attention() -> None:
    operands = [random(1, 2, 5, 8, seed=seed) for seed in range(3)]
    grads = []
    for name in ("attention_int8", "attention"):
        leaves = [each.clone().requires_grad_() for each in operands]
        run(name, *leaves, None, None, 0.35, True, 0).square().sum().backward()
        grads.append(torch.cat([each.grad.flatten() for each in leaves if each.grad is not None]))
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 0.05


def test_rows_of_bytes() -> None:
    x = torch.tensor([[3.0, -127.0, 63.5], [0.0, 0.0, 0.0], [math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0]])
    codes, scale = int8.round_rows(x)
    assert codes[:2].tolist() == [[3.0, -127.0, 64.0], [0.0, 0.0, 0.0]]
    assert scale[:2, 0].tolist() == [1.0, 0.0]
    assert scale[2:].isnan().all()
    assert codes.isfinite().all()


# -- all of them -------------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[Any, ...]] = {
    "attention_int8": (random(1, 4, 3, 6), random(1, 2, 5, 6), random(1, 2, 5, 4), None, random(3, 5), 0.4, True, 0),
    "linear_nbits_dynamic": (random(2, 3, 20), *packed(5, 20, 8, False), random(5), 4, 8, 8, "per_group"),
    "linear_outliers": (random(2, 3, 20), *sparse(5, 20, 0.2)[0]),
}


@pytest.mark.parametrize("name", CALLS)
def test_registration(name: str) -> None:
    torch.library.opcheck(ops.get(name).target, CALLS[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_shape_rule_agrees_with_the_reference(name: str, dtype: torch.dtype) -> None:
    operands = [
        value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in CALLS[name]
    ]
    found = run(name, *operands)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in operands]
        fake = run(name, *fakes)
    assert (fake.shape, fake.dtype) == (found.shape, found.dtype)
    assert found.dtype == dtype
    exact = run(name, *CALLS[name])
    assert (found.double() - exact).norm() <= 0.03 * exact.norm() + torch.finfo(dtype).eps


def test_gradients_of_sparse_linears() -> None:
    x, pointers, columns, values = CALLS["linear_outliers"]
    target = ops.get("linear_outliers").target
    leaves = x.clone().requires_grad_(), values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: target(a, pointers, columns, b), leaves)
