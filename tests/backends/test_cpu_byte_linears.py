"""The C++ linears: right to a derived bound, equal to the last bit on every instruction set and number of threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.backends.cpu import ISA_VARIABLE, CpuBackend, features, native, native_status
from graphwright.backends.cpu.kernels.byte_linear import ByteLinear
from graphwright.backends.cpu.kernels.byte_packing import pack_int8, pack_nbits
from graphwright.ir.errors import BackendError
from graphwright.ir.ops import quantization
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.weights import quantize_weight, quantize_weight_int8

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)

# Rows: one, the most that share one reading of the weights, and around every tile of many.
ROWS = [1, 2, 3, 4, 5, 6, 7, 12, 13, 31, 200]
# (outputs, columns, bits, group, symmetric): around a panel of 64 outputs and a step of 4 or 8 columns; the last group
# whole or not; one group; more groups than are unpacked at once.
SHAPES = [
    (1, 16, 4, 16, True),
    (63, 64, 4, 32, False),
    (64, 96, 4, 32, True),
    (65, 100, 4, 32, False),
    (130, 1160, 4, 128, False),
    (70, 41, 4, None, True),
    (33, 97, 4, None, False),
    (64, 64, 8, 32, True),
    (65, 131, 8, 64, False),
    (100, 333, 8, None, True),
    (17, 5, 8, None, False),
    (65, 100, 2, 32, False),
    (130, 1160, 2, 128, True),
    (70, 41, 2, None, True),
    (33, 1000, 2, 16, False),
    (65, 100, 3, 32, False),
    (70, 41, 3, None, True),
]


def isas() -> list[str]:
    return [isa.name for isa in features().instruction_sets if isa.usable]


def rows_of(count: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    size = torch.logspace(-3, 2, max(count, 2))[:count, None]
    return torch.randn(count, columns, generator=generator) * size


def weight_of(outputs: int, columns: int) -> torch.Tensor:
    return torch.randn(outputs, columns, generator=torch.Generator().manual_seed(columns))


@pytest.mark.parametrize(("outputs", "columns", "bits", "group", "symmetric"), SHAPES)
def test_weight_only_linears(outputs: int, columns: int, bits: int, group: int | None, symmetric: bool) -> None:
    weight = quantize_weight(weight_of(outputs, columns), Format(bits, group, symmetric, clip_search=True))
    bias = torch.randn(outputs)
    stored = weight.qweight, weight.scales, weight.zero_points
    packed = pack_nbits(*stored, bits, columns)
    exact = quantization.dequantize(*stored, bits, columns, torch.float64)
    size = weight.group_size
    for count in ROWS:
        x = rows_of(count, columns)
        results = [ByteLinear(packed, isa, "symmetric", bias)(x) for isa in isas()]
        assert all(torch.equal(found, results[0]) for found in results), f"{count} rows: {isas()} differ"
        # Every activation moves by half a step of its group at most; float32 sums of the groups round a little.
        groups = nn.functional.pad(x, (0, -columns % size)).abs().view(count, -1, size)
        steps = (groups.amax(-1) / 127).double()
        sums = nn.functional.pad(exact.abs(), (0, -columns % size)).view(outputs, -1, size).sum(-1)
        bound = 0.5 * steps @ sums.T * (1 + 1e-4) + 1e-5 * (x.double().abs() @ exact.abs().T + bias.double().abs())
        wanted = x.double() @ exact.T + bias.double()
        assert ((results[0].double() - wanted).abs() <= bound).all(), f"{count} rows"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_of_the_largest_codes(bits: int, sign: float) -> None:
    # Where products are added up in 16 bits first, these come nearest to their end.
    codes = torch.full((66, 512), 2**bits - 1, dtype=torch.uint8)
    zeros = torch.zeros(66, 4, dtype=torch.uint8)
    packed = pack_nbits(quantization.pack(codes, bits, 128, zeros), torch.ones(66, 4), zeros, bits, 512)
    x = torch.full((7, 512), sign)
    wanted = torch.full((7, 66), sign * 512 * (2**bits - 1))
    for isa in isas():
        torch.testing.assert_close(ByteLinear(packed, isa, "symmetric")(x), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("outputs", "columns"), [(1, 1), (64, 64), (65, 97), (130, 1000)])
@pytest.mark.parametrize("kind", ["per_token", "static"])
def test_integer_linears_agree_with_their_reference(outputs: int, columns: int, kind: str) -> None:
    weight = quantize_weight_int8(weight_of(outputs, columns), clip_search=False)
    packed, bias = pack_int8(weight.qweight, weight.scales), torch.randn(outputs)
    steps = torch.rand(columns) * 0.02 + 0.01
    for count in ROWS:
        x = rows_of(count, columns)
        if kind == "static":
            wanted = quantization.linear_int8_static(x, weight.qweight, weight.scales, bias, steps, 100)
            kernels = [ByteLinear(packed, isa, "fixed", bias, steps, 100) for isa in isas()]
        else:
            wanted = quantization.linear_int8_dynamic(x, weight.qweight, weight.scales, bias, "per_token")
            kernels = [ByteLinear(packed, isa, "shifted", bias) for isa in isas()]
        results = [kernel(x) for kernel in kernels]
        assert all(torch.equal(found, results[0]) for found in results)
        # The integers are the same; three float32 roundings of the result may not be.
        torch.testing.assert_close(results[0], wanted, rtol=1e-6, atol=float(wanted.abs().max()) * 3e-7)


@pytest.mark.parametrize("rounding", ["symmetric", "shifted"])
def test_the_number_of_threads_changes_nothing(rounding: str) -> None:
    packed, bias = packed_int8(200, 300, rounding), torch.randn(200)
    kernel = ByteLinear(packed, isas()[-1], rounding, bias)
    before = torch.get_num_threads()
    try:
        for count in (1, 3, 50, 500):
            x, results = rows_of(count, 300), []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(kernel(x))
            assert all(torch.equal(found, results[0]) for found in results)
    finally:
        torch.set_num_threads(before)


def packed_int8(outputs: int, columns: int, rounding: str) -> Any:
    if rounding == "symmetric":
        weight = quantize_weight(weight_of(outputs, columns), Format(4, 32, True, clip_search=False))
        return pack_nbits(weight.qweight, weight.scales, weight.zero_points, 4, columns)
    found = quantize_weight_int8(weight_of(outputs, columns), clip_search=False)
    return pack_int8(found.qweight, found.scales)


def test_several_python_threads_at_once() -> None:
    kernel = ByteLinear(packed_int8(300, 256, "symmetric"), isas()[-1], "symmetric")
    inputs = [rows_of(count, 256) for count in (1, 4, 40, 90)]
    wanted = [kernel(x) for x in inputs]
    bad: list[int] = []

    def work(index: int) -> None:
        for _ in range(60):
            if not torch.equal(kernel(inputs[index]), wanted[index]):
                bad.append(index)

    workers = [threading.Thread(target=work, args=(index % 4,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not bad


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni"])
def test_rows_that_are_not_finite(isa: str) -> None:
    if isa not in isas():
        pytest.skip(f"this machine cannot run {isa}")
    x = torch.ones(6, 40)
    x[1, 3], x[2, 35], x[3, 0] = float("nan"), float("inf"), float("-inf")
    for rounding in ("symmetric", "shifted"):
        found = ByteLinear(packed_int8(20, 40, rounding), isa, rounding)(x)
        assert found[1:4].isnan().all()
        assert found[[0, 4, 5]].isfinite().all()
    found = ByteLinear(packed_int8(20, 40, "fixed"), isa, "fixed", None, torch.full((40,), 0.02), 128)(x)
    assert found[1].isnan().all()
    assert found[[0, 2, 3, 4, 5]].isfinite().all(), "infinity is clipped to the end of the grid"


def test_inputs_of_every_layout() -> None:
    kernel = ByteLinear(packed_int8(20, 48, "shifted"), isas()[-1], "shifted", torch.randn(20))
    x = rows_of(24, 48)
    wanted = kernel(x)
    assert torch.equal(kernel(x.view(2, 3, 4, 48)), wanted.view(2, 3, 4, 20))
    assert torch.equal(kernel(x[5]), wanted[5])
    assert torch.equal(kernel(x.t().contiguous().t()), wanted)
    assert torch.equal(kernel(x[::2]), wanted[::2])
    misaligned = torch.empty(24 * 48 + 1)[1:].view(24, 48).copy_(x)
    assert torch.equal(kernel(misaligned), wanted)
    assert kernel(x[:0]).shape == (0, 20)
    half = kernel(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, kernel(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("x", [torch.zeros(2, 47), torch.zeros(2, 48, dtype=torch.int64), torch.tensor(1.0)])
def test_inputs_that_do_not_fit(x: torch.Tensor) -> None:
    kernel = ByteLinear(packed_int8(20, 48, "shifted"), "scalar", "shifted")
    with pytest.raises(BackendError, match="takes floating CPU tensors of 48 features"):
        kernel(x)


def test_the_extension_refuses_sizes_that_do_not_fit() -> None:
    packed = packed_int8(20, 48, "shifted")
    from graphwright.backends.cpu import _native

    good: dict[str, Any] = {
        "isa": "scalar",
        "outputs": 20,
        "columns": 48,
        "bits": 8,
        "group": 48,
        "codes": packed.codes.numpy(),
        "scales": packed.scales.numpy(),
        "zeros": None,
        "sums": packed.sums.numpy(),
        "bias": None,
        "rounding": "shifted",
        "steps": None,
        "zero": 0,
    }
    _native.ByteLinear(**good)
    bad: dict[str, tuple[Any, str]] = {
        "isa": ("sse9", "no instruction set"),
        "outputs": (65, "codes has the wrong size"),
        "bits": (3, "bits must be"),
        "group": (6, "whole steps"),
        "codes": (packed.codes.numpy()[1:].copy(), "codes has the wrong size"),
        "scales": (packed.scales.numpy()[1:].copy(), "scales has the wrong size"),
        "sums": (None, "sums, are needed"),
        "rounding": ("fixed", "a grid is needed"),
        "columns": (40000, "int32 sum"),
    }
    for name, (value, message) in bad.items():
        changed = {**good, name: value, **({"group": 40000} if name == "columns" else {})}
        with pytest.raises(ValueError, match=message):
            _native.ByteLinear(**changed)


# -- lowering ----------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(torch.relu(self.up(x)))
        return result


X = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0))


def kernels(model: gw.OptimizedModel) -> list[str]:
    return [use.kernel for use in model.explain() if "linear" in use.op]


def test_a_lowered_model_is_called_like_the_original() -> None:
    calibration = [torch.randn(40, 5, 48) for _ in range(3)]
    for passes in (
        [gw.QuantizeLinears(activations="int8")],
        [gw.QuantizeLinears(activations="int8", calibration=calibration)],
    ):
        plain = gw.optimize(Mlp(), passes, example_inputs=X)
        small = gw.optimize(plain, [], target="cpu")
        assert len(kernels(small)) == 2
        assert all("activations rounded to int8" in kernel for kernel in kernels(small))
        torch.testing.assert_close(small(X), plain(X), rtol=1e-3, atol=2e-2)
        assert small(X[:, :2]).shape == (3, 2, 48)


def test_what_weight_only_linears_compute_in_is_chosen_and_told() -> None:
    plain = gw.optimize(Mlp(), [gw.QuantizeLinears(bits=4, group_size=32)], example_inputs=X)
    exact = gw.optimize(plain, [], target="cpu")
    torch.testing.assert_close(exact(X), plain(X))
    assert all("4-bit weights, float32" in kernel for kernel in kernels(exact))
    fast = gw.optimize(plain, [], target=CpuBackend(compute="int8"))
    assert all("rounded to int8 (symmetric)" in kernel for kernel in kernels(fast))
    error = (fast(X) - plain(X)).norm() / plain(X).norm()
    assert 0 < error < 0.02
    with pytest.raises(gw.InputError, match="must be one of float32, bfloat16, int8"):
        CpuBackend(compute="int4")


def test_a_forced_instruction_set_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gw.optimize(Mlp(), [gw.QuantizeLinears(activations="int8")], example_inputs=X)
    results = []
    for isa in ("scalar", "avx2", "avx512_vnni", "avx512_bf16"):
        if isa not in isas():
            continue
        monkeypatch.setenv(ISA_VARIABLE, isa)
        small = gw.optimize(plain, [], target="cpu")
        # An instruction set without a kernel of its own runs its parent's, and is named so.
        named = "avx512_vnni" if isa == "avx512_bf16" else isa
        assert all(named in kernel for kernel in kernels(small))
        results.append(small(X))
    assert all(torch.equal(found, results[0]) for found in results)


def test_what_has_no_kernel_runs_in_pytorch_and_says_why() -> None:
    small = gw.optimize(
        nn.Linear(16, 4),
        [gw.QuantizeLinears(activations="int8", activation_ranges="per_tensor")],
        example_inputs=torch.randn(2, 16),
        target="cpu",
    )
    assert [(use.kernel, use.reason) for use in small.explain() if "linear" in use.op] == [
        ("reference", "ranges of the whole tensor have no kernel; per token they have")
    ]


def test_without_the_extension_everything_runs_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gw.optimize(Mlp(), [gw.QuantizeLinears(activations="int8")], example_inputs=X)
    monkeypatch.setattr(native, "_EXTENSION", "graphwright.backends.cpu._no_such_extension")
    native_status.cache_clear()
    try:
        small = gw.optimize(plain, [], target="cpu")
    finally:
        native_status.cache_clear()
    assert {use.reason for use in small.explain() if "linear" in use.op} == {
        "the C++ kernels are not in this installation"
    }
    assert torch.equal(small(X), plain(X))


def test_another_target_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(gw.InputError, match="(?s)there is no target 'gpu'.*reference, cpu.*cpu:int8.*onnx"):
        gw.optimize(Mlp(), [], example_inputs=X, target="gpu")
