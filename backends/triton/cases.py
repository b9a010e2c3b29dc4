"""Launches that stand for what kernels are used for, on shapes of Llama 3 8B; compiled ahead of time and tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from graphwright.backends.triton.kernels import norms, pointwise, rotary
from graphwright.backends.triton.kernels.attention import attention
from graphwright.backends.triton.kernels.cached_attention import append, cached_attention
from graphwright.backends.triton.kernels.epilogue import WIDEST_BRANCH, Epilogue
from graphwright.backends.triton.kernels.kron_linear import kron_linear
from graphwright.backends.triton.kernels.linear_fp8 import OLDEST as OLDEST_FP8
from graphwright.backends.triton.kernels.linear_fp8 import linear_fp8
from graphwright.backends.triton.kernels.linear_int8 import Codes, multiply_codes, round_rows
from graphwright.backends.triton.kernels.linear_nbits import fused_linear_nbits, input_gradient
from graphwright.backends.triton.kernels.nbits_weight import NbitsWeight, repack
from graphwright.backends.triton.kernels.sparse_linear import BlockWeight, fused_linear_blocks, linear_blocks

_HALF = torch.bfloat16

_DEVICE: ContextVar[str] = ContextVar("device of the cases", default="meta")


@dataclass(frozen=True)
class Case:
    """A call that launches kernels.

    Attributes:
        name: what it is.
        run: on the device of :func:`on`; by default ``meta``, where nothing can be launched.
        table: the entry of :data:`graphwright.backends.triton.configurations.TABLE` that it takes, if any.
        oldest: architecture that it needs, as of NVIDIA.
    """

    name: str
    run: Callable[[], object]
    table: str | None = None
    oldest: int = 80

    def runs_on(self, target: str) -> bool:
        """Whether it is compiled for the target: where there is what it needs.

        sm_89 takes the binaries of sm_80 but for what these have not; gfx942 runs everything, FP8 products in float16.
        """
        if not target.startswith("sm_"):
            return True
        return self.oldest > 80 if target == "sm_89" else int(target[3:]) >= self.oldest


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Run the cases of the block on a device, with random values."""
    token = _DEVICE.set(str(device))
    try:
        yield
    finally:
        _DEVICE.reset(token)


def tensor(*shape: int, dtype: torch.dtype = _HALF, grad: bool = False, fill: int = 0) -> torch.Tensor:
    """Of random numbers, and of ``fill`` where they are places; without values on ``meta``."""
    device = _DEVICE.get()
    if dtype in (torch.int32, torch.int64):
        return torch.full(shape, fill, dtype=dtype, device=device)
    if not dtype.is_floating_point:
        return torch.randint(0, 2 if dtype == torch.bool else 127, shape, device=device).to(dtype)
    if dtype.itemsize == 1:
        return torch.zeros(shape, dtype=torch.float16, device=device).to(dtype)
    return torch.randn(shape, dtype=dtype, device=device, requires_grad=grad)


def _norms() -> None:
    x, weight = tensor(64, 4096), tensor(4096)
    norms.rms_norm(x, weight, 1e-5)
    norms.add_rms_norm(x, x, weight, 1e-5)
    norms.layer_norm(x, weight, weight, 1e-5)


def _norm_gradients() -> None:
    x, weight = tensor(64, 4096, grad=True), tensor(4096, grad=True)
    norms.rms_norm(x, weight, 1e-5).sum().backward()
    norms.layer_norm(x, weight, weight, 1e-5).sum().backward()


def _nbits(bits: int, group: int, *, asymmetric: bool, outputs: int = 4096, columns: int = 4096) -> NbitsWeight:
    groups = columns // group
    qweight = tensor(outputs, groups, group * bits // 8, dtype=torch.uint8)
    zeros = tensor(outputs, groups, dtype=torch.uint8) if asymmetric else None
    return repack(qweight, tensor(outputs, groups, dtype=torch.float16), zeros, bits, group, columns)


def _nbits_case(rows: int, bits: int = 4, group: int = 128, *, asymmetric: bool = False, fused: bool = False) -> Case:
    kind = "few" if rows <= 16 else "many fused" if fused else "many"
    name = f"linear_nbits {rows} rows, {bits} bits, {group}{', asymmetric' * asymmetric}{', fused' * fused}"

    def run() -> None:
        weight, x = _nbits(bits, group, asymmetric=asymmetric), tensor(rows, 4096)
        epilogue = Epilogue()
        if fused:
            y = tensor(rows, 4096)
            epilogue = Epilogue(tensor(4096), "silu", y, y, tensor(rows, 16), tensor(4096, 16))
        fused_linear_nbits(x, weight, epilogue)

    return Case(name, run, f"linear_nbits {kind}")


def _nbits_gradient() -> None:
    for bits in (4, 8):
        input_gradient(tensor(512, 4096), _nbits(bits, 128, asymmetric=True))


def _pointwise() -> None:
    x, angle = tensor(1, 512, 32, 128, grad=True).transpose(1, 2), tensor(1, 512, 128)
    gate, up = tensor(512, 2 * 14336, grad=True).split(14336, dim=-1)
    for interleaved in (False, True):
        rotary.rotary_embedding(x, angle, angle, interleaved).sum().backward()
    for activation in ("silu", "gelu", "gelu_tanh", "relu"):
        pointwise.gated_activation(gate, up, activation).sum().backward(retain_graph=True)
    pointwise.softmax(tensor(512, 4096))


def _kron() -> None:
    kron_linear(tensor(512, 4096, grad=True), tensor(64, 64), tensor(64, 64)).sum().backward()


def _attention_case(width: int, dtype: torch.dtype = _HALF) -> Case:
    kind = "float32" if dtype == torch.float32 else str(width)

    def run() -> None:
        query, key = tensor(1, 4096, 32, width, dtype=dtype), tensor(1, 4096, 8, width, dtype=dtype)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        for causal, window in ((False, 0), (True, 0), (True, 1024)):
            attention(query, key, key, None, 0.1, causal, window)
        attention(query, key, key, tensor(1, 4096, dtype=torch.bool), 0.1, False, 0)

    return Case(f"attention {kind}", run, f"attention {kind}")


def _cached_case(length: int, dtype: torch.dtype = _HALF, cache: torch.dtype = _HALF) -> Case:
    kind = f"cached_attention{' float32' * (dtype == torch.float32)}"

    def run() -> None:
        query, new = tensor(1, 32, length, 128, dtype=dtype), tensor(1, 8, length, 128, dtype=dtype)
        keys, slots = tensor(1, 8, 32768, 128, dtype=cache), tensor(1, dtype=torch.int64)
        starts = tensor(1, dtype=torch.int64, fill=32768 - length)
        scales = tensor(1, 8, 32768, dtype=torch.float32) if cache == torch.int8 else None
        append(keys, scales, new, slots, starts)
        slopes = tensor(32, dtype=torch.float32)
        for window, softcap, biased in ((0, 0.0, None), (1024, 50.0, None), (0, 0.0, slopes)):
            cached_attention(
                *(query, keys, keys, slots, starts, biased, 0.1, window, softcap),
                key_scales=scales,
                value_scales=scales,
            )

    return Case(f"{kind} {length} tokens, {str(cache).removeprefix('torch.')} cache", run, kind)


def _branched(rows: int) -> Epilogue:
    """With a low-rank branch of the highest rank."""
    return Epilogue(tensor(4096), down=tensor(rows, WIDEST_BRANCH), up=tensor(4096, WIDEST_BRANCH), scale=2.0)


def _int8() -> None:
    x, weight, scales = tensor(4096, 4096), tensor(4096, 4096, dtype=torch.int8), tensor(4096, dtype=torch.float32)
    sums, steps = tensor(4096, dtype=torch.int32), tensor(4096, dtype=torch.float32)
    for codes in (round_rows(x), round_rows(x, steps=steps, zero_point=128)):
        multiply_codes(codes, weight, scales, sums, Epilogue(tensor(4096)), _HALF)
    multiply_codes(round_rows(x), weight, scales, sums, Epilogue(None, "silu", x, x), _HALF)
    multiply_codes(round_rows(x), weight, scales, sums, _branched(4096), _HALF)


def _int8_groups() -> None:
    x, weight = tensor(4096, 4096), tensor(4096, 4096, dtype=torch.int8)
    for size in (64, 128):
        codes: Codes = round_rows(x, group_size=size)
        scales = tensor(4096, 4096 // size, dtype=torch.float32)
        multiply_codes(codes, weight, scales, tensor(4096, dtype=torch.int32), Epilogue(), _HALF)


def _fp8() -> None:
    x, weight = tensor(4096, 4096), tensor(4096, 4096, dtype=torch.float8_e4m3fn)
    linear_fp8(x, weight, tensor(4096, dtype=torch.float32))
    linear_fp8(x, weight, tensor(4096, 32, dtype=torch.float32), Epilogue(None, "silu", x, x))
    linear_fp8(x, weight, tensor(4096, 32, dtype=torch.float32), _branched(4096), per_group=False)


def _blocks() -> None:
    for size in (16, 32, 64):
        # Every fourth block of each row.
        strips, stored, device = 4096 // size, 1024 // size, _DEVICE.get()
        starts = torch.arange(strips + 1, dtype=torch.int32, device=device) * stored
        columns = torch.arange(strips * stored, dtype=torch.int32, device=device) % stored * 4
        weight = BlockWeight(tensor(strips * stored, size, size), starts, columns, (4096, 4096))
        linear_blocks(tensor(512, 4096, grad=True), weight, tensor(4096)).sum().backward()
        fused_linear_blocks(tensor(512, 4096), weight, _branched(512))


CASES: tuple[Case, ...] = (
    Case("norms", _norms),
    Case("gradients of norms", _norm_gradients),
    _nbits_case(1),
    _nbits_case(4096),
    _nbits_case(1, asymmetric=True, fused=True),
    _nbits_case(4096, asymmetric=True, fused=True),
    *(_nbits_case(rows, 4, group, asymmetric=True) for rows in (1, 4096) for group in (32, 64)),
    *(_nbits_case(rows, 8, asymmetric=asymmetric) for rows in (1, 4096) for asymmetric in (False, True)),
    *(_nbits_case(rows, 8, 32) for rows in (1, 4096)),
    Case("linear_nbits input gradient", _nbits_gradient, "linear_nbits input gradient"),
    Case("pointwise", _pointwise),
    Case("kron_linear", _kron, "kron_linear"),
    *(_attention_case(width) for width in (64, 128, 256)),
    _attention_case(128, torch.float32),
    *(_cached_case(length, _HALF, cache) for length in (1, 512) for cache in (_HALF, torch.int8)),
    _cached_case(1, torch.float32, torch.float32),
    Case("linear_int8", _int8, "linear_int8"),
    Case("linear_int8 of groups", _int8_groups, "linear_int8 groups"),
    Case("linear_fp8", _fp8, "linear_fp8", OLDEST_FP8),
    Case("linear_blocks", _blocks, "linear_blocks"),
)
