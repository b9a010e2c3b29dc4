"""The quantised operators: their layout, and their values against arithmetic written out anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir import ops
from graphwright.ir.ops import quantization
from graphwright.ir.ops.quantization import dequantize, pack, quantize_activations, unpack

WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100)


def stored(
    rows: int, columns: int, bits: int, group: int, symmetric: bool, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, np.ndarray]:
    """Packed codes, scales, zero points, and the weight they mean, worked out element by element in numpy."""
    random = np.random.default_rng(seed)
    groups = -(-columns // group)
    codes = random.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    scales = random.normal(size=(rows, groups)).astype(np.float32)  # negative ones too
    zeros = random.integers(0, 2**bits, (rows, groups)).astype(np.uint8)
    weight = np.empty((rows, columns))
    for row in range(rows):
        for column in range(columns):
            part = column // group
            zero = 2 ** (bits - 1) if symmetric else int(zeros[row, part])
            weight[row, column] = (int(codes[row, column]) - zero) * float(scales[row, part])
    points = None if symmetric else torch.from_numpy(zeros)
    packed = pack(torch.from_numpy(codes), bits, group, points)
    return packed, torch.from_numpy(scales), points, weight


# -- layout ------------------------------------------------------------------------------------------------------------


def test_even_columns_lie_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 3, 4], [15, 0, 8, 9]], dtype=torch.uint8)
    packed = pack(codes, 4, 2, None)
    assert packed.tolist() == [[[0x21], [0x43]], [[0x0F], [0x98]]]


def test_the_last_group_is_padded_with_what_stands_for_zero() -> None:
    codes = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert pack(codes, 4, 4, None).tolist() == [[[0x21, 0x83]]]
    assert pack(codes, 4, 4, torch.tensor([[5]], dtype=torch.uint8)).tolist() == [[[0x21, 0x53]]]
    assert pack(codes, 8, 2, torch.tensor([[9, 7]], dtype=torch.uint8)).tolist() == [[[1, 2], [3, 7]]]


def test_narrow_codes_are_a_stream_of_bits_from_the_lowest_on() -> None:
    two = torch.tensor([[0, 1, 2, 3, 3, 0, 0, 1]], dtype=torch.uint8)
    assert pack(two, 2, 8, None).tolist() == [[[0b11_10_01_00, 0b01_00_00_11]]]
    three = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    stream = sum(code << (3 * place) for place, code in enumerate(three[0].tolist()))
    assert pack(three, 3, 8, None).tolist() == [[list(stream.to_bytes(3, "little"))]]


@given(
    st.sampled_from((2, 3, 4, 8)),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_a_group_is_a_little_endian_number(bits: int, rows: int, units: int, columns: int, seed: int) -> None:
    group = 8 * units
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (rows, -(-columns // group)), dtype=torch.uint8)
    packed = pack(codes, bits, group, zeros)
    assert packed.is_contiguous()
    for row in range(rows):
        for part in range(packed.shape[1]):
            mine = codes[row, part * group : (part + 1) * group].tolist()
            mine += [int(zeros[row, part])] * (group - len(mine))
            number = sum(code << (bits * place) for place, code in enumerate(mine))
            assert packed[row, part].tolist() == list(number.to_bytes(group * bits // 8, "little"))
    assert torch.equal(unpack(packed, bits).flatten(1)[:, :columns], codes)


@given(st.integers(1, 5), st.sampled_from(WIDTHS), st.sampled_from((8, 16, 32, 128)), st.sampled_from((2, 3, 4, 8)))
def test_unpacking_gives_back_the_codes(rows: int, columns: int, group: int, bits: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    packed = pack(codes, bits, group, None)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns // group), group * bits // 8)
    assert packed.is_contiguous()
    opened = unpack(packed, bits).flatten(1)
    assert torch.equal(opened[:, :columns], codes)
    assert (opened[:, columns:] == 2 ** (bits - 1)).all()


# -- weight-only linears -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", WIDTHS)
def test_linear_nbits_is_the_product_with_the_stored_weight(bits: int, symmetric: bool, columns: int) -> None:
    packed, scales, zeros, weight = stored(5, columns, bits, 16, symmetric)
    x = torch.randn(3, columns, dtype=torch.float64)
    bias = torch.randn(5)
    found = ops.get("linear_nbits").target(x, packed, scales, zeros, bias, bits, 16)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), x.numpy() @ weight.T + bias.double().numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 8), (2, 3, 8), (2, 0, 3, 8)])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...]) -> None:
    packed, scales, zeros, weight = stored(5, 8, 4, 4, False)
    x = torch.randn(shape, dtype=torch.float64)
    found = quantization.linear_nbits(x, packed, scales, zeros, None, 4, 4)
    assert found.shape == (*shape[:-1], 5)
    np.testing.assert_allclose(found.numpy(), x.numpy() @ weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_computed_in_float32_and_returned_as_they_came(dtype: torch.dtype) -> None:
    packed, scales, zeros, _ = stored(4, 64, 4, 32, True)
    x = torch.randn(2, 64).to(dtype)
    found = quantization.linear_nbits(x, packed, scales.half(), zeros, None, 4, 32)
    half = dequantize(packed, scales.half(), zeros, 4, 64, torch.float64)
    exact = x.double() @ half.T
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-4 * exact.abs().max())


def test_a_weight_of_many_slices_is_put_together_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_SLICE_ELEMENTS", 64)
    for rows in (1, 2, 3, 7, 8, 9):
        packed, scales, zeros, weight = stored(rows, 32, 4, 16, False)
        x = torch.randn(2, 32, dtype=torch.float64)
        found = quantization.linear_nbits(x, packed, scales, zeros, None, 4, 16)
        np.testing.assert_allclose(found.numpy(), x.numpy() @ weight.T, rtol=1e-12, atol=1e-12)


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    packed, scales, zeros, _ = stored(4, 8, 4, 8, True)
    x = torch.ones(3, 8)
    x[1, 2] = float("nan")
    found = quantization.linear_nbits(x, packed, scales, zeros, None, 4, 8)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_gradients_reach_input_and_bias_and_are_those_of_the_dequantised_weight() -> None:
    packed, scales, zeros, weight = stored(5, 33, 4, 16, False)
    x = torch.randn(2, 33, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    target = ops.get("linear_nbits").target
    target(x, packed, scales, zeros, bias, 4, 16).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), np.tile(weight.sum(0), (2, 1)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(bias.grad.numpy(), np.full(5, 2.0))
    assert torch.autograd.gradcheck(lambda a: target(a, packed, scales, zeros, None, 4, 16), (x,))


# -- dynamic activations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["per_token", "per_tensor"])
def test_activation_codes_are_those_of_the_onnx_operator(activation: str) -> None:
    x = torch.randn(4, 9) * torch.tensor([[1.0], [0.01], [5.0], [0.0]])
    codes, scale, zero = quantize_activations(x, activation)
    rows = [x] if activation == "per_tensor" else list(x.unsqueeze(1))
    for index, row in enumerate(rows):
        values = row.numpy().astype(np.float32)
        low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
        step = np.float32((high - low) / np.float32(255)) or np.float32(1)
        point = np.clip(np.rint(-low / step), 0, 255)
        expected = np.clip(np.rint(values / step) + point, 0, 255)
        mine = codes if activation == "per_tensor" else codes[index : index + 1]
        np.testing.assert_array_equal(mine.numpy(), expected)
        assert float(scale.flatten()[index]) == pytest.approx(float(step), rel=1e-6)
        assert float(zero.flatten()[index]) == point


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    st.sampled_from(("per_token", "per_tensor")),
)
def test_activations_move_by_half_a_step_at_most(values: list[float], activation: str) -> None:
    x = torch.tensor([values], dtype=torch.float64)
    codes, scale, zero = quantize_activations(x, activation)
    assert ((codes >= 0) & (codes <= 255) & (codes == codes.round())).all()
    assert ((codes - zero) * scale - x).abs().max() <= 0.5 * scale.max() * (1 + 1e-9)
    assert (codes - zero)[x == 0].eq(0).all()


@pytest.mark.parametrize("activation", ["per_token", "per_tensor"])
@pytest.mark.parametrize("columns", WIDTHS)
def test_linear_int8_dynamic_is_an_integer_product(activation: str, columns: int) -> None:
    random = np.random.default_rng(columns)
    weight = random.integers(-127, 128, (6, columns)).astype(np.int8)
    scales = random.uniform(0.1, 1.0, 6).astype(np.float32)
    x, bias = torch.randn(2, 3, columns), torch.randn(6)
    found = ops.get("linear_int8_dynamic").target(
        x, torch.from_numpy(weight), torch.from_numpy(scales), bias, activation
    )
    codes, scale, zero = (value.numpy() for value in quantize_activations(x, activation))
    sums = (codes - zero).astype(np.int64) @ weight.astype(np.int64).T
    expected = sums * np.float64(scale) * scales.astype(np.float64) + bias.numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_sums_of_products_do_not_round() -> None:
    # The partial sums go beyond 2**24, where float32 no longer holds every integer; what remains is 127.
    half = 1 << 12
    codes = torch.tensor([[127] * half + [-127] * half], dtype=torch.int8)
    x = torch.full((1, 2 * half), 255.0)
    x[0, -1] = 254.0
    found = quantization.linear_int8_dynamic(x, codes, torch.ones(1), None, "per_token")
    assert int(found) == 127


def test_rows_are_quantised_apart_from_one_another() -> None:
    weight, scales = torch.randint(-127, 128, (4, 16), dtype=torch.int8), torch.rand(4)
    x = torch.randn(3, 16)
    alone = quantization.linear_int8_dynamic(x[:1], weight, scales, None, "per_token")
    x[1] *= 1000
    x[2, 3] = float("inf")
    together = quantization.linear_int8_dynamic(x, weight, scales, None, "per_token")
    assert torch.equal(together[:1], alone)
    assert together[2].isnan().all()
    assert quantization.linear_int8_dynamic(x, weight, scales, None, "per_tensor").isnan().all()


@pytest.mark.parametrize("activation", ["per_token", "per_tensor"])
def test_no_rows_and_rows_of_zeros(activation: str) -> None:
    weight, scales = torch.randint(-127, 128, (4, 16), dtype=torch.int8), torch.rand(4)
    assert quantization.linear_int8_dynamic(torch.zeros(0, 16), weight, scales, None, activation).shape == (0, 4)
    bias = torch.randn(4)
    found = quantization.linear_int8_dynamic(torch.zeros(2, 16), weight, scales, bias, activation)
    assert torch.equal(found, bias.expand(2, 4))


@pytest.mark.parametrize("activation", ["per_token", "per_tensor"])
def test_the_gradient_passes_straight_through_the_rounding(activation: str) -> None:
    weight, scales = torch.randint(-127, 128, (4, 16), dtype=torch.int8), torch.rand(4)
    x = torch.randn(2, 16, requires_grad=True)
    bias = torch.zeros(4, requires_grad=True)
    ops.get("linear_int8_dynamic").target(x, weight, scales, bias, activation).sum().backward()
    expected = (weight.double() * scales.double()[:, None]).sum(0)
    torch.testing.assert_close(x.grad.double(), expected.expand(2, 16), rtol=1e-5, atol=1e-5)
    assert bias.grad.tolist() == [2.0] * 4


# -- static activations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("zero", [0, 100, 255])
def test_linear_int8_static_is_an_integer_product(columns: int, zero: int) -> None:
    random = np.random.default_rng(columns)
    weight = random.integers(-127, 128, (6, columns)).astype(np.int8)
    scales = random.uniform(0.1, 1.0, 6).astype(np.float32)
    steps = random.uniform(0.01, 0.05, columns).astype(np.float32)
    x, bias = torch.randn(2, 3, columns), torch.randn(6)
    operands = (x, torch.from_numpy(weight), torch.from_numpy(scales), bias, torch.from_numpy(steps), zero)
    found = ops.get("linear_int8_static").target(*operands)
    codes = np.clip(np.rint(x.numpy() / steps) + zero, 0, 255).astype(np.int64)
    sums = (codes - zero) @ weight.astype(np.int64).T
    expected = sums * scales.astype(np.float64) + bias.numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max() + 1e-6)


def test_the_gradient_stops_where_the_grid_ends() -> None:
    weight, scales = torch.randint(-127, 128, (4, 5), dtype=torch.int8), torch.rand(4)
    x = torch.tensor([[0.3, 20.0, -20.0, 12.69, -12.81]], requires_grad=True)
    ops.get("linear_int8_static").target(x, weight, scales, None, torch.full((5,), 0.1), 128).sum().backward()
    inside = torch.tensor([True, False, False, True, False])
    expected = (weight * scales[:, None]).sum(0) / 0.1 * inside
    torch.testing.assert_close(x.grad[0], expected, rtol=1e-4, atol=1e-4)


def test_static_rows_with_nan_do_not_touch_others() -> None:
    weight, scales = torch.randint(-127, 128, (4, 16), dtype=torch.int8), torch.rand(4)
    x = torch.randn(3, 16)
    alone = quantization.linear_int8_static(x[:1], weight, scales, None, torch.full((16,), 0.02), 128)
    x[1, 3], x[2] = float("nan"), float("inf")
    together = quantization.linear_int8_static(x, weight, scales, None, torch.full((16,), 0.02), 128)
    assert torch.equal(together[:1], alone)
    assert together[1].isnan().all()
    assert together[2].isfinite().all(), "infinity is clipped to the end of the grid"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_scales": torch.ones(3)}, r"input_scales must be \[8\]"),
        ({"input_zero_point": 256}, "zero point must be in 0..255"),
        ({"qweight": torch.zeros(3, 8, dtype=torch.uint8)}, "must be int8"),
        ({"scales": torch.zeros(1)}, r"scales must be \[3\]"),
    ],
)
def test_static_operands_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    operands: dict[str, object] = {
        "x": torch.zeros(2, 8),
        "qweight": torch.zeros(3, 8, dtype=torch.int8),
        "scales": torch.zeros(3),
        "bias": torch.zeros(3),
        "input_scales": torch.ones(8),
        "input_zero_point": 7,
    }
    assert quantization._static_fake(**operands).shape == (2, 3)
    with pytest.raises((ValueError, RuntimeError), match=message):
        quantization._static_fake(**{**operands, **change})


# -- embeddings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_embedding_nbits_looks_rows_up(bits: int, symmetric: bool) -> None:
    packed, scales, zeros, weight = stored(11, 33, bits, 16, symmetric)
    for indices in (torch.tensor(3), torch.tensor([[0, 10, 3], [3, 3, 1]]), torch.zeros(2, 0, dtype=torch.int64)):
        found = ops.get("embedding_nbits").target(indices, packed, scales.double(), zeros, bits, 16, 33)
        assert found.shape == (*indices.shape, 33)
        np.testing.assert_allclose(found.numpy(), weight[indices.numpy()], rtol=1e-12, atol=1e-12)


def test_rows_come_in_float32_at_least() -> None:
    packed, scales, zeros, _ = stored(4, 16, 8, 16, True)
    for narrow, wide in ((torch.float16, torch.float32), (torch.float32, torch.float32)):
        found = quantization.embedding_nbits(torch.tensor([1]), packed, scales.to(narrow), zeros, 8, 16, 16)
        assert found.dtype == wide


def test_an_index_beyond_the_table_is_an_error() -> None:
    packed, scales, zeros, _ = stored(4, 16, 8, 16, True)
    with pytest.raises(IndexError, match="out of"):
        quantization.embedding_nbits(torch.tensor([4]), packed, scales, zeros, 8, 16, 16)


# -- shape rules and cost ----------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 4), st.sampled_from(WIDTHS), st.sampled_from((2, 3, 4, 8)), st.booleans())
def test_the_shape_rule_agrees_with_the_reference(rows: int, columns: int, bits: int, symmetric: bool) -> None:
    packed, scales, zeros, _ = stored(rows, columns, bits, 16, symmetric)
    x = torch.randn(2, columns, dtype=torch.bfloat16)
    operands = (x, packed, scales, zeros, None, bits, 16)
    real = quantization.linear_nbits(*operands)
    meta = ops.get("linear_nbits").target(*[v.to("meta") if isinstance(v, torch.Tensor) else v for v in operands])
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype)
    table = (torch.zeros(3, dtype=torch.int64), packed, scales.half(), zeros, bits, 16, columns)
    real = quantization.embedding_nbits(*table)
    meta = ops.get("embedding_nbits").target(*[v.to("meta") if isinstance(v, torch.Tensor) else v for v in table])
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 40)}, "qweight must be"),
        ({"qweight": torch.zeros(3, 2, 8, dtype=torch.int8)}, "must be uint8"),
        ({"qweight": torch.zeros(3, 2, 16, dtype=torch.uint8)}, "qweight must be"),
        ({"scales": torch.zeros(3, 1)}, "scales must be"),
        ({"zero_points": torch.zeros(3, 2, dtype=torch.int8)}, "must be uint8 or floating"),
        ({"zero_points": torch.zeros(3, 1)}, "shape of the scales"),
        ({"zero_points": torch.zeros(3, 1, dtype=torch.uint8)}, "shape of the scales"),
        ({"bias": torch.zeros(1)}, r"bias must be \[3\]"),
        ({"bits": 5}, "bits must be one of"),
        ({"bits": 3, "group_size": 12}, "whole bytes"),
        ({"group_size": 15}, "whole bytes"),
        ({"group_size": 0}, "whole bytes"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    operands: dict[str, object] = {
        "x": torch.zeros(2, 32),
        "qweight": torch.zeros(3, 2, 8, dtype=torch.uint8),
        "scales": torch.zeros(3, 2),
        "zero_points": torch.zeros(3, 2, dtype=torch.uint8),
        "bias": torch.zeros(3),
        "bits": 4,
        "group_size": 16,
    }
    assert quantization._linear_fake(**operands).shape == (2, 3)
    with pytest.raises((ValueError, RuntimeError), match=message):
        quantization._linear_fake(**{**operands, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 9)}, "x has 9 features"),
        ({"qweight": torch.zeros(3, 8, dtype=torch.uint8)}, "must be int8"),
        ({"scales": torch.zeros(1)}, r"scales must be \[3\]"),
        ({"bias": torch.zeros(4)}, r"bias must be \[3\]"),
        ({"activation": "per_row"}, "is not one of per_token, per_tensor"),
    ],
)
def test_dynamic_operands_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    operands: dict[str, object] = {
        "x": torch.zeros(2, 8),
        "qweight": torch.zeros(3, 8, dtype=torch.int8),
        "scales": torch.zeros(3),
        "bias": torch.zeros(3),
        "activation": "per_token",
    }
    assert quantization._dynamic_fake(**operands).shape == (2, 3)
    with pytest.raises((ValueError, RuntimeError), match=message):
        quantization._dynamic_fake(**{**operands, **change})


def test_multiply_accumulates() -> None:
    shapes = {"x": (2, 3, 64), "qweight": (10, 4, 8)}
    assert ops.get("linear_nbits").macs(shapes) == 2 * 3 * 64 * 10
    assert ops.get("linear_int8_dynamic").macs({"x": (5, 64), "qweight": (10, 64)}) == 5 * 64 * 10
    assert ops.get("embedding_nbits").macs({"indices": (2, 3), "qweight": (10, 4, 8)}) == 0


def test_zero_points_between_codes() -> None:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 8, (5, 40), generator=generator, dtype=torch.uint8)
    scales, zeros = torch.rand(5, 3, generator=generator), 8 * torch.rand(5, 3, generator=generator)
    packed = quantization.pack(codes, 3, 16, zeros.to(torch.uint8))
    weight = (codes - zeros.repeat_interleave(16, 1)[:, :40]) * scales.repeat_interleave(16, 1)[:, :40]
    x = torch.randn(2, 40, generator=generator)
    found = torch.ops.graphwright.linear_nbits(x, packed, scales, zeros, None, 3, 16)
    torch.testing.assert_close(found, x @ weight.T)
    with pytest.raises(RuntimeError, match="must be uint8, not"):  # tables have kernels for whole ones only
        quantization._embedding_fake(torch.zeros(2, dtype=torch.int64), packed, scales, zeros, 3, 16, 40)
