"""Linears on codes into a table: the tables, the layout, and values against arithmetic written out anew."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir import ops
from graphwright.ir.ops import quantization
from graphwright.ir.ops.codebook import NAMES, codebook, dequantize_codebook, linear_codebook
from graphwright.ir.ops.quantization import pack

WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100)


def stored(
    rows: int, columns: int, name: str, group: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Packed codes of numbers, scales, and the weight they mean, worked out element by element."""
    book, random = codebook(name), np.random.default_rng(seed)
    numbers = [code for code, value in enumerate(book.values) if math.isfinite(value)]
    codes = random.choice(numbers, (rows, columns)).astype(np.uint8)
    groups = -(-columns // group)
    scales = random.normal(size=(rows, groups)).astype(np.float32)
    weight = np.array(
        [[book.values[codes[r, c]] * float(scales[r, c // group]) for c in range(columns)] for r in range(rows)]
    )
    padding = torch.full((rows, groups), book.zero, dtype=torch.uint8)
    return pack(torch.from_numpy(codes), book.bits, group, padding), torch.from_numpy(scales), weight


def test_the_tables() -> None:
    for name, bits, largest in (("nf4", 4, 1), ("fp4", 4, 6), ("fp8_e4m3", 8, 448), ("fp8_e5m2", 8, 57344)):
        book = codebook(name)
        assert (book.name, book.bits, len(book.values), book.largest) == (name, bits, 2**bits, largest)
        assert book.values[book.zero] == 0
    assert codebook("fp4").values[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert codebook("fp4").values[8:] == tuple(-value for value in codebook("fp4").values[:8])
    assert math.isnan(codebook("fp8_e4m3").values[127])
    assert codebook("fp8_e5m2").values[0x7C] == math.inf
    with pytest.raises(ValueError, match="'fp6' is not one of nf4, fp4"):
        codebook("fp6")


@pytest.mark.parametrize(("name", "exponent_bits"), [("fp4", 2), ("fp8_e4m3", 4), ("fp8_e5m2", 5)])
def test_floats_are_sign_exponent_and_mantissa(name: str, exponent_bits: int) -> None:
    book = codebook(name)
    mantissa_bits, bias = book.bits - 1 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    for code, value in enumerate(book.values):
        if not math.isfinite(value):
            continue
        exponent = code >> mantissa_bits & (2**exponent_bits - 1)
        mantissa = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
        size = (mantissa + (exponent > 0)) * 2.0 ** (max(exponent, 1) - bias)
        assert value == (-size if code >> (book.bits - 1) else size)


def test_normal_floats_have_as_many_values_below_as_between_their_quantiles() -> None:
    """NF4: the middles of 9 and 8 equal shares of the normal distribution's two halves, scaled to end at 1."""
    offset = 0.5 * (1 / 32 + 1 / 30)
    upper = torch.special.ndtri(torch.linspace(1 - offset, 0.5, 9, dtype=torch.float64))[:-1]
    lower = -torch.special.ndtri(torch.linspace(1 - offset, 0.5, 8, dtype=torch.float64))[:-1]
    expected = torch.cat([upper, lower, torch.zeros(1)]).sort().values
    torch.testing.assert_close(
        torch.tensor(codebook("nf4").values).double(), expected / expected.max(), atol=3e-7, rtol=0
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", WIDTHS)
def test_linear_codebook_is_the_product_with_the_stored_weight(name: str, columns: int) -> None:
    packed, scales, weight = stored(5, columns, name, 16)
    x, bias = torch.randn(3, columns, dtype=torch.float64), torch.randn(5)
    found = ops.get("linear_codebook").target(x, packed, scales, bias, name, 16)
    assert found.dtype == torch.float64
    expected = x.numpy() @ weight.T + bias.double().numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12 * np.abs(weight).max() * columns)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 8), (2, 3, 8), (2, 0, 3, 8)])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...]) -> None:
    packed, scales, weight = stored(5, 8, "nf4", 4)
    x = torch.randn(shape, dtype=torch.float64)
    found = linear_codebook(x, packed, scales, None, "nf4", 4)
    assert found.shape == (*shape[:-1], 5)
    np.testing.assert_allclose(found.numpy(), x.numpy() @ weight.T, rtol=1e-12, atol=1e-12)


def test_a_weight_of_many_slices_is_put_together_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_SLICE_ELEMENTS", 64)
    for rows in (1, 2, 3, 7, 8, 9):
        packed, scales, weight = stored(rows, 32, "nf4", 16)
        x = torch.randn(2, 32, dtype=torch.float64)
        found = linear_codebook(x, packed, scales, None, "nf4", 16)
        np.testing.assert_allclose(found.numpy(), x.numpy() @ weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_input_and_bias(name: str) -> None:
    packed, scales, weight = stored(5, 33, name, 16)
    x = torch.randn(2, 33, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ops.get("linear_codebook").target(x, packed, scales, bias, name, 16).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), np.tile(weight.sum(0), (2, 1)), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(bias.grad.numpy(), np.full(5, 2.0))


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    packed, scales, _ = stored(4, 8, "fp4", 8)
    x = torch.ones(3, 8)
    x[1, 2] = float("nan")
    found = linear_codebook(x, packed, scales, None, "fp4", 8)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@settings(max_examples=30)
@given(st.integers(1, 4), st.sampled_from(WIDTHS), st.sampled_from(NAMES))
def test_the_shape_rule_agrees_with_the_reference(rows: int, columns: int, name: str) -> None:
    packed, scales, weight = stored(rows, columns, name, 16)
    operands = (torch.randn(2, columns, dtype=torch.bfloat16), packed, scales.half(), None, name, 16)
    real = linear_codebook(*operands)
    meta = ops.get("linear_codebook").target(*[v.to("meta") if isinstance(v, torch.Tensor) else v for v in operands])
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype)
    found = dequantize_codebook(packed, scales, name, columns, torch.float64)
    np.testing.assert_allclose(found.numpy(), weight, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 40)}, "qweight must be"),
        ({"qweight": torch.zeros(3, 2, 8, dtype=torch.int8)}, "must be uint8"),
        ({"format": "fp8_e4m3"}, "qweight must be"),
        ({"format": "fp6"}, "is not one of"),
        ({"scales": torch.zeros(3, 1)}, "scales must be"),
        ({"bias": torch.zeros(1)}, r"bias must be \[3\]"),
        ({"group_size": 15}, "whole bytes"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    operands: dict[str, object] = {
        "x": torch.zeros(2, 32),
        "qweight": torch.zeros(3, 2, 8, dtype=torch.uint8),
        "scales": torch.zeros(3, 2),
        "bias": torch.zeros(3),
        "format": "nf4",
        "group_size": 16,
    }
    fake = ops.get("linear_codebook").fake
    assert fake is not None
    assert fake(**operands).shape == (2, 3)
    with pytest.raises((ValueError, RuntimeError), match=message):
        fake(**{**operands, **change})


def test_multiply_accumulates() -> None:
    assert ops.get("linear_codebook").macs({"x": (2, 3, 64), "qweight": (10, 4, 8)}) == 2 * 3 * 64 * 10
