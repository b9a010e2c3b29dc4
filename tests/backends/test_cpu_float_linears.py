"""Linears in floats: right to derived bounds on every instruction set, the same for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.backends.cpu import ISA_VARIABLE, CpuBackend, features, native_status
from graphwright.backends.cpu.kernels.base import Kernel
from graphwright.backends.cpu.kernels.byte_packing import pack_nbits
from graphwright.backends.cpu.kernels.float_linear import CodebookLinear, FloatLinear, NbitsLinear, pack_floats
from graphwright.ir.errors import BackendError
from graphwright.ir.ops import quantization
from graphwright.ir.ops.codebook import NAMES, codebook, dequantize_codebook
from graphwright.ir.ops.quantization import pack
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.weights import PackedWeight, quantize_weight

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)

# Rows: none, those that stream the weights, and around every tile of many.
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 32, 33, 200]
# Around a panel of 64 outputs, a pair of columns and a block of 128 or 256 columns.
SHAPES = [(1, 1), (64, 2), (65, 3), (63, 41), (64, 64), (130, 100), (1, 333), (65, 600), (66, 1100)]
# (outputs, columns, bits, group, symmetric): a group is whole steps or not, a block ends within a group or not.
CODED = [
    (1, 16, 4, 16, True),
    (63, 64, 4, 32, False),
    (64, 96, 4, 32, True),
    (65, 100, 4, 32, False),
    (130, 1160, 4, 128, False),
    (66, 36, 4, 12, False),
    (70, 41, 4, None, True),
    (33, 597, 4, None, False),
    (64, 64, 8, 32, True),
    (65, 600, 8, 96, False),
    (20, 21, 8, 3, False),
    (100, 333, 8, None, True),
    (17, 5, 8, None, False),
    (65, 100, 2, 32, False),
    (130, 1160, 2, 128, True),
    (70, 41, 2, None, True),
    (33, 330, 2, 16, False),
    (65, 100, 3, 32, False),
    (70, 41, 3, None, True),
]
UNIT = 2.0**-24


def isas() -> list[str]:
    return [isa.name for isa in features().instruction_sets if isa.usable]


def pairs_of_bfloat16(isa: str) -> bool:
    """Whether its bfloat16 products are those of ``vdpbf16ps``, which rounds in another order."""
    return isa in ("avx512_bf16", "amx")


def rows_of(count: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    size = torch.logspace(-3, 2, max(count, 2))[:count, None]
    return torch.randn(count, columns, generator=generator) * size


def weight_of(outputs: int, columns: int) -> torch.Tensor:
    return torch.randn(outputs, columns, generator=torch.Generator().manual_seed(columns))


def coded(outputs: int, columns: int, bits: int, group: int | None, symmetric: bool) -> PackedWeight:
    return quantize_weight(weight_of(outputs, columns), Format(bits, group, symmetric, clip_search=False))


def check(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, roundings: int) -> None:
    """A sum every term of which is rounded so many times at most (Higham 2002, lemma 3.1)."""
    error = roundings * UNIT / (1 - roundings * UNIT)
    bound = error * (x.double().abs() @ weight.double().abs().T + bias.double().abs())
    # vdpbf16ps takes what is below the least normal number for 0, in the worst case at each of its steps.
    bound += roundings * 2.0**-125
    wanted = x.double() @ weight.double().T + bias.double()
    assert ((found.double() - wanted).abs() <= bound).all(), f"{len(x)} rows"


@pytest.mark.parametrize(("outputs", "columns"), SHAPES)
def test_dense_linears(outputs: int, columns: int) -> None:
    weight, bias = weight_of(outputs, columns), torch.randn(outputs)
    kernels = [FloatLinear(pack_floats(weight), isa, bias) for isa in isas()]
    for count in ROWS:
        x = rows_of(count, columns)
        results = [kernel(x) for kernel in kernels]
        assert all(torch.equal(found, results[0]) for found in results), f"{count} rows: {isas()} differ"
        # One for each column, the sums of blocks of columns, and the bias.
        check(results[0], x, weight, bias, columns + columns // 128 + 2)


@pytest.mark.parametrize(("outputs", "columns"), SHAPES)
def test_dense_linears_in_bfloat16(outputs: int, columns: int) -> None:
    weight, bias = weight_of(outputs, columns), torch.randn(outputs)
    packed = pack_floats(weight, bfloat16=True)
    assert torch.equal(packed.values, pack_floats(weight.bfloat16(), bfloat16=True).values)
    kernels = {isa: FloatLinear(packed, isa, bias) for isa in isas()}
    for count in ROWS:
        x = rows_of(count, columns)
        results = {isa: kernel(x) for isa, kernel in kernels.items()}
        for isa, found in results.items():
            assert (pairs_of_bfloat16(isa) and not packed.narrow) or torch.equal(found, results["scalar"]), isa
            # Products of bfloat16 are exact in float32. With few outputs activations stay as they are.
            seen = x if packed.narrow else x.bfloat16()
            check(found, seen, weight.bfloat16(), bias, columns + 1 + columns // 256 + 2)


@pytest.mark.parametrize(("outputs", "columns", "bits", "group", "symmetric"), CODED)
@pytest.mark.parametrize("scales", [torch.float16, torch.float32])
def test_weight_only_linears(
    outputs: int, columns: int, bits: int, group: int | None, symmetric: bool, scales: torch.dtype
) -> None:
    weight, bias = coded(outputs, columns, bits, group, symmetric), torch.randn(outputs)
    stored = weight.qweight, weight.scales.to(scales), weight.zero_points
    packed, size = pack_nbits(*stored, bits, columns), weight.group_size
    exact = quantization.dequantize(*stored, bits, columns, torch.float64)
    rounded = quantization.dequantize(*stored, bits, columns, torch.float32).bfloat16()
    # Up to 32 rows take zero points off sums: what is rounded then is as large as the distances from the middle code.
    middle = torch.full_like(weight.qweight[:, :, 0], 2 ** (bits - 1))
    apart = quantization.dequantize(stored[0], stored[1], middle, bits, columns, torch.float64).abs()
    if stored[2] is not None:
        away = (stored[2].double() - middle).abs() * stored[1].double()
        apart += away.repeat_interleave(size, dim=1)[:, :columns]
    kernels = {isa: NbitsLinear(packed, size, isa, bias) for isa in isas()}
    halves = {isa: NbitsLinear(packed, size, isa, bias, bfloat16=True) for isa in isas()}
    # Besides one for each column: groups, blocks, scale and zero point.
    roundings = columns + -(-columns // size) + columns // 128 + 6
    for count in ROWS[1:-1]:
        x = rows_of(count, columns)
        results = {isa: kernel(x) for isa, kernel in kernels.items()}
        assert all(torch.equal(found, results["scalar"]) for found in results.values()), f"{count} rows differ"
        for isa, kernel in halves.items():
            if count <= 8 or not pairs_of_bfloat16(isa):
                assert torch.equal(kernel(x), results["scalar"]), "it is rounded only where that is faster"
            else:
                check(kernel(x), x.bfloat16(), rounded, bias, roundings)
        if count > 32:
            check(results["scalar"], x, exact, bias, roundings)
        error = roundings * UNIT / (1 - roundings * UNIT)
        bound = error * (x.double().abs() @ apart.T + bias.double().abs())
        assert ((results["scalar"].double() - x.double() @ exact.T - bias.double()).abs() <= bound).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("outputs", "columns", "group"), [(1, 16, 16), (65, 100, 32), (130, 1160, 128), (70, 41, None)]
)
def test_linears_on_codebooks(name: str, outputs: int, columns: int, group: int | None) -> None:
    book = codebook(name)
    form = Format(book.bits, group, True, clip_search=False, codebook=name)
    weight, bias = quantize_weight(weight_of(outputs, columns), form), torch.randn(outputs)
    for scales in (weight.scales.half(), weight.scales.float()):
        packed, size = pack_nbits(weight.qweight, scales, None, book.bits, columns), weight.group_size
        exact = dequantize_codebook(weight.qweight, scales, name, columns, torch.float64)
        rounded = dequantize_codebook(weight.qweight, scales, name, columns, torch.float32).bfloat16()
        kernels = {isa: CodebookLinear(packed, name, size, isa, bias) for isa in isas()}
        halves = {isa: CodebookLinear(packed, name, size, isa, bias, bfloat16=True) for isa in isas()}
        roundings = columns + -(-columns // size) + columns // 128 + 6
        for count in ROWS[1:-1]:
            x = rows_of(count, columns)
            results = {isa: kernel(x) for isa, kernel in kernels.items()}
            assert all(torch.equal(found, results["scalar"]) for found in results.values()), f"{count} rows differ"
            check(results["scalar"], x, exact, bias, roundings)
            for isa, kernel in halves.items():
                if count <= 8 or not pairs_of_bfloat16(isa):
                    assert torch.equal(kernel(x), results["scalar"]), "it is rounded only where that is faster"
                else:
                    check(kernel(x), x.bfloat16(), rounded, bias, roundings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 40])
def test_every_code_of_a_codebook(name: str, rows: int) -> None:
    """One column for each code of a number, subnormal ones too: what comes out is its value."""
    book = codebook(name)
    codes = torch.tensor([code for code, value in enumerate(book.values) if math.isfinite(value)], dtype=torch.uint8)
    width = len(codes) + len(codes) % 2
    stored = pack(codes.expand(3, -1), book.bits, width, torch.full((3, 1), book.zero, dtype=torch.uint8))
    packed = pack_nbits(stored, torch.ones(3, 1), None, book.bits, len(codes))
    for isa in isas():
        kernel = CodebookLinear(packed, name, width, isa)
        for begin in range(0, len(codes), rows):
            here = min(rows, len(codes) - begin)
            x = torch.zeros(rows, len(codes))
            x[range(here), range(begin, begin + here)] = 1.0
            found = kernel(x)[:here, 1]
            assert torch.equal(found, book.table[codes[begin : begin + here].long()]), isa


@pytest.mark.parametrize("name", NAMES)
def test_programs_on_codebooks_run_in_kernels_and_are_packed(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 40, bias=False))
    x = rows_of(5, 64)
    reference = gw.optimize(model, [gw.QuantizeLinears(dtype=name, group_size=32)], example_inputs=x)
    small = gw.optimize(model, [gw.QuantizeLinears(dtype=name, group_size=32)], example_inputs=x, target="cpu")
    used = [use.kernel for use in small.explain() if use.op == "graphwright.linear_codebook"]
    assert len(used) == 2
    assert all(kernel.startswith("codebook_linear") and f"{name} weights" in kernel for kernel in used)
    torch.testing.assert_close(small(x), reference(x).detach(), rtol=1e-4, atol=1e-4)
    small.save_packed(tmp_path / "small.gwpacked")
    assert torch.equal(gw.load_packed(tmp_path / "small.gwpacked")(x), small(x))


@pytest.mark.parametrize(("bits", "says"), [(2, "2-bit weights"), (3, "3-bit weights stored as 4-bit codes")])
@pytest.mark.parametrize("target", ["cpu", "cpu:int8"])
def test_narrow_programs_run_in_kernels_and_are_packed(bits: int, says: str, target: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 40)), rows_of(5, 64)
    item = gw.QuantizeLinears(bits=bits, group_size=32, symmetric=False)
    reference = gw.optimize(model, [item], example_inputs=x)
    small = gw.optimize(model, [item], example_inputs=x, target=target)
    used = [use.kernel for use in small.explain() if use.op == "graphwright.linear_nbits"]
    assert len(used) == 2
    assert all(says in kernel for kernel in used)
    wanted = reference(x).detach()
    assert (small(x) - wanted).norm() <= (1e-5 if target == "cpu" else 0.02) * wanted.norm()
    small.save_packed(tmp_path / "small.gwpacked")
    assert torch.equal(gw.load_packed(tmp_path / "small.gwpacked")(x), small(x))


def some_kernels(isa: str, outputs: int = 200, columns: int = 300) -> list[Kernel]:
    weight, bias = weight_of(outputs, columns), torch.randn(outputs, generator=torch.Generator().manual_seed(1))
    quantized = coded(outputs, columns, 4, 32, False)
    packed = pack_nbits(quantized.qweight, quantized.scales, quantized.zero_points, 4, columns)
    narrow = coded(outputs, columns, 2, 32, False)
    two = narrow.qweight, narrow.scales, narrow.zero_points
    looked_up = quantize_weight(weight, Format(4, 32, True, clip_search=False, codebook="nf4"))
    return [
        FloatLinear(pack_floats(weight), isa, bias),
        FloatLinear(pack_floats(weight, bfloat16=True), isa, bias),
        NbitsLinear(packed, 32, isa, bias),
        NbitsLinear(packed, 32, isa, bias, bfloat16=True),
        NbitsLinear(pack_nbits(*two, 2, columns), 32, isa, bias),
        CodebookLinear(pack_nbits(looked_up.qweight, looked_up.scales, None, 4, columns), "nf4", 32, isa, bias),
    ]


def dense_weight(kernel: Kernel, outputs: int = 200, columns: int = 300) -> torch.Tensor:
    """What the weights of one of :func:`some_kernels` stand for."""
    weight = weight_of(outputs, columns)
    if isinstance(kernel, NbitsLinear):
        return coded(outputs, columns, kernel.packed.bits, 32, False).dense()
    if isinstance(kernel, CodebookLinear):
        return quantize_weight(weight, Format(4, 32, True, clip_search=False, codebook="nf4")).dense()
    return weight


def test_the_number_of_threads_changes_nothing() -> None:
    before = torch.get_num_threads()
    try:
        # So many that panels take turns, more of them on one thread than on several.
        for kernel in some_kernels(isas()[-1], 700):
            for count in (1, 3, 50, 1000):
                x, results = rows_of(count, 300), []
                for threads in (1, 2, 3, 8):
                    torch.set_num_threads(threads)
                    results.append(kernel(x))
                assert all(torch.equal(found, results[0]) for found in results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("rows", [4, 9, 40])
def test_rows_that_are_not_finite(isa: str, rows: int) -> None:
    if isa not in isas():
        pytest.skip(f"this machine cannot run {isa}")
    x = torch.ones(rows, 300)
    x[0, 3], x[1, 35], x[2, 0] = float("nan"), float("inf"), float("-inf")
    for kernel in some_kernels(isa):
        found = kernel(x)
        assert found[0].isnan().all()
        assert found[3:].isfinite().all()
        wanted = functional.linear(x[1:3], dense_weight(kernel))
        assert torch.equal(found[1:3].nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_one_row_that_is_not_finite(value: float) -> None:
    """With one row 2-bit weights go by pairs of columns."""
    for isa in isas():
        for kernel in some_kernels(isa):
            x = torch.ones(1, 300)
            x[0, 35] = value
            wanted = functional.linear(x, dense_weight(kernel))
            assert torch.equal(kernel(x).nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0)), kernel.label


def test_the_largest_finite_values_round_to_infinity_in_bfloat16() -> None:
    x = torch.full((1, 4), torch.finfo(torch.float32).max)
    for isa in isas():
        assert FloatLinear(pack_floats(torch.ones(1, 4), bfloat16=True), isa)(x).isposinf().all()
        # A NaN whose payload has low bits only is one still.
        odd = torch.tensor([[0x7F800001, 0, 0, 0]], dtype=torch.int32).view(torch.float32)
        assert FloatLinear(pack_floats(torch.ones(1, 4), bfloat16=True), isa)(odd).isnan().all()
        assert FloatLinear(pack_floats(odd, bfloat16=True), isa)(torch.ones(1, 4)).isnan().all()


def test_inputs_of_every_layout() -> None:
    for kernel in some_kernels(isas()[-1], 20, 48):
        x = rows_of(24, 48)
        wanted = kernel(x)
        assert torch.equal(kernel(x.view(2, 3, 4, 48)), wanted.view(2, 3, 4, 20))
        torch.testing.assert_close(kernel(x[5]), wanted[5], rtol=0.02, atol=0.02)
        assert torch.equal(kernel(x[5]), kernel(x[5:6])[0])
        assert torch.equal(kernel(x.t().contiguous().t()), wanted)
        assert torch.equal(kernel(x[::2]), wanted[::2])
        misaligned = torch.empty(24 * 48 + 1)[1:].view(24, 48).copy_(x)
        assert torch.equal(kernel(misaligned), wanted)
        assert kernel(x[:0]).shape == (0, 20)
        assert kernel(x.requires_grad_()).requires_grad is False
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            other = kernel(x.to(dtype))
            assert other.dtype == dtype
            assert torch.equal(other, kernel(x.to(dtype).float()).to(dtype))


@pytest.mark.parametrize("x", [torch.zeros(2, 47), torch.zeros(2, 48, dtype=torch.int64), torch.tensor(1.0)])
def test_inputs_that_do_not_fit(x: torch.Tensor) -> None:
    for kernel in some_kernels("scalar", 20, 48):
        with pytest.raises(BackendError, match="takes floating CPU tensors of 48 features"):
            kernel(x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda x: x,
    "relu": torch.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 4, 11])
def test_what_follows_a_linear(activation: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 300, generator=generator) / 6
    # Rows that are no neighbours: parts of wider matrices.
    factor, residual = torch.randn(2, rows, 205, generator=generator)[:, :, :200]
    for isa in isas():
        for kernel in some_kernels(isa):
            native: Any = kernel._kernel
            plain, found = np.empty((rows, 200), np.float32), np.empty((rows, 200), np.float32)
            native.run(x.numpy(), plain, 2)
            native.run(x.numpy(), found, 2, activation)
            wanted = ACTIVATIONS[activation](torch.from_numpy(plain).double())
            # The functions are right to a few units in the last place; gelu's tail loses some more.
            torch.testing.assert_close(torch.from_numpy(found).double(), wanted, rtol=2e-6, atol=1e-6)
            both = np.empty((rows, 200), np.float32)
            native.run(x.numpy(), both, 2, activation, factor.numpy(), residual.numpy())
            # Rounded after the product and after the sum, as torch does.
            assert torch.equal(torch.from_numpy(both), torch.from_numpy(found) * factor + residual)
            native.run(x.numpy(), both, 1, activation, residual=residual.numpy())
            assert torch.equal(torch.from_numpy(both), torch.from_numpy(found) + residual)


def test_the_extension_refuses_what_does_not_fit() -> None:
    from graphwright.backends.cpu import _native

    dense, _, coded_kernel, *_ = some_kernels("scalar", 20, 48)
    x, y = np.zeros((3, 48), np.float32), np.zeros((3, 20), np.float32)
    for native in (dense._kernel, coded_kernel._kernel):
        run: Any = native.run
        for wrong in (np.zeros((2, 20), np.float32), np.zeros((3, 40), np.float32)[:, ::2], y[::-1]):
            with pytest.raises(ValueError, match="residual must have y's shape"):
                run(x, y, 1, residual=wrong)
        with pytest.raises(ValueError, match="no activation is called"):
            run(x, y, 1, "softplus")
        with pytest.raises(ValueError, match="x has the wrong number"):
            run(x[:, :47].copy(), y, 1)
        with pytest.raises(ValueError, match="y has the wrong shape"):
            run(x, y[:2], 1)
    values = np.zeros(48 * 256, np.uint8)
    with pytest.raises(ValueError, match="values has the wrong size"):
        _native.FloatLinear("scalar", 65, 48, False, values, None)
    with pytest.raises(ValueError, match="bias has the wrong size"):
        _native.FloatLinear("scalar", 20, 48, False, values, np.zeros(21, np.float32))
    with pytest.raises(ValueError, match="values has the wrong size"):
        _native.pack_floats(np.zeros((20, 47), np.float32), False, values, 1)
    codes, scales = np.zeros(6 * 256, np.uint8), np.zeros(3 * 64, np.float32)
    _native.NbitsLinear("scalar", 20, 48, "int4", 16, False, codes, scales, None, None, None)
    refused = [(20, "int3", 16, "coding"), (65, "int4", 16, "codes"), (20, "int4", 0, "groups of columns")]
    for outputs, coding, size, message in [
        *refused,
        (20, "int8", 16, "codes"),
        (20, "table4", 16, "come with a table"),
    ]:
        with pytest.raises(ValueError, match=message):
            _native.NbitsLinear("scalar", outputs, 48, coding, size, False, codes, scales, None, None, None)
    table, zeros = np.zeros(16, np.float32), np.zeros(3 * 64, np.uint8)
    with pytest.raises(ValueError, match="come with a table"):
        _native.NbitsLinear("scalar", 20, 48, "int4", 16, False, codes, scales, None, table, None)
    with pytest.raises(ValueError, match="table has the wrong size"):
        _native.NbitsLinear("scalar", 20, 48, "table4", 16, False, codes, scales, None, table[:15], None)
    with pytest.raises(ValueError, match="only integers have zero points"):
        _native.NbitsLinear("scalar", 20, 48, "table4", 16, False, codes, scales, zeros, table, None)


# -- lowering ----------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(torch.relu(self.up(x)))
        return result


X = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0))


def linears(model: gw.OptimizedModel) -> list[tuple[str, str]]:
    return [(use.kernel, use.reason) for use in model.explain() if "linear" in use.op]


def test_no_linear_of_a_float_model_is_left_to_pytorch() -> None:
    model = Mlp().eval()
    lowered = gw.optimize(model, [], example_inputs=X, target="cpu")
    assert len(linears(lowered)) == 2
    assert all(kernel.startswith("float_linear ") and kernel.endswith(", float32") for kernel, _ in linears(lowered))
    torch.testing.assert_close(lowered(X), model(X))
    assert lowered(X[:, :2]).shape == (3, 2, 48)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision(dtype: torch.dtype) -> None:
    model = Mlp().eval().to(dtype)
    lowered = gw.optimize(model, [], example_inputs=X.to(dtype), target="cpu")
    kind = "bfloat16 weights and activations" if dtype == torch.bfloat16 else "float32"
    assert all(kernel.endswith(kind) and not reason for kernel, reason in linears(lowered))
    found = lowered(X.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, model(X.to(dtype)), rtol=2e-2, atol=2e-2)


def test_what_is_rounded_is_chosen_and_told() -> None:
    model = Mlp().eval()
    lowered = gw.optimize(model, [], example_inputs=X, target=CpuBackend(compute="bfloat16"))
    assert all("weights and activations rounded to bfloat16" in kernel for kernel, _ in linears(lowered))
    error = (lowered(X) - model(X)).norm() / model(X).norm()
    assert 0 < error < 0.01
    exact = gw.optimize(model, [], example_inputs=X, target=CpuBackend(compute="int8"))
    assert all(kernel.endswith(", float32") for kernel, _ in linears(exact))

    small = gw.optimize(model, [gw.QuantizeLinears(bits=4, group_size=32)], example_inputs=X)
    wanted = small(X)
    exact_sums = ("float32", 0.0, 1e-6)
    rounded = ("weights and activations rounded to bfloat16 beyond 8 rows", 1e-4, 0.01)
    pairs = pairs_of_bfloat16(features().selected or "")
    for compute, expected in (("float32", exact_sums), ("bfloat16", rounded if pairs else exact_sums)):
        label, least, most = expected
        lowered = gw.optimize(small, [], target=CpuBackend(compute=compute))
        assert all(kernel.endswith(f"4-bit weights, {label}") and not reason for kernel, reason in linears(lowered))
        error = (lowered(X) - wanted).norm() / wanted.norm()
        assert least <= error < most


def test_a_forced_instruction_set_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, results = Mlp().eval(), []
    for isa in isas():
        monkeypatch.setenv(ISA_VARIABLE, isa)
        lowered = gw.optimize(model, [], example_inputs=X, target="cpu")
        # An instruction set without kernels of its own runs its parent's, and is named so.
        named = {"avx_vnni": "avx2", "avx512_vnni": "avx512", "avx512_vbmi2": "avx512", "amx": "avx512_bf16"}.get(
            isa, isa
        )
        assert all(kernel == f"float_linear {named}, float32" for kernel, _ in linears(lowered))
        results.append(lowered(X))
    assert all(torch.equal(found, results[0]) for found in results)


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight.exp())


def test_what_has_no_kernel_runs_in_pytorch_and_says_why() -> None:
    computed = gw.optimize(Computed(), [], example_inputs=X, target="cpu")
    assert linears(computed) == [("torch", "its weights are computed, not stored")]
    double = gw.optimize(Mlp().double(), [], example_inputs=X.double(), target="cpu")
    assert linears(double) == [("torch", "the kernels compute in float32")] * 2


class OddGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        quantized = coded(20, 48, 4, 12, False)
        assert quantized.zero_points is not None
        self.register_buffer("qweight", quantized.qweight)
        self.register_buffer("scales", quantized.scales)
        self.register_buffer("zeros", quantized.zero_points)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.graphwright.linear_nbits(x, self.qweight, self.scales, self.zeros, None, 4, 12)
        return result


def test_groups_that_are_no_whole_steps() -> None:
    model = OddGroups()
    exact = gw.optimize(model, [], example_inputs=X, target="cpu")
    torch.testing.assert_close(exact(X), model(X))
    assert linears(exact)[0][0].startswith("nbits_linear")
    rounded = gw.optimize(model, [], example_inputs=X, target=CpuBackend(compute="int8"))
    assert linears(rounded) == [("reference", "the kernel rounds activations in groups of whole steps of 8 columns")]
    assert torch.equal(rounded(X), model(X))
