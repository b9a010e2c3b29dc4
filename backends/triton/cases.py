"""Launches that stand for what kernels are used for, on shapes of Llama 3 8B; compiled ahead of time and tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphwright.backends.triton.kernels import norms, pointwise, rotary
from graphwright.backends.triton.kernels.attention import attention
from graphwright.backends.triton.kernels.cached_attention import append, cached_attention
from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.kron_linear import kron_linear
from graphwright.backends.triton.kernels.linear_nbits import fused_linear_nbits, input_gradient
from graphwright.backends.triton.kernels.nbits_weight import NbitsWeight, repack

_HALF = torch.bfloat16
_META = torch.device("meta")


@dataclass(frozen=True)
class Case:
    """A call that launches kernels.

    Attributes:
        name: what it is.
        run: on the ``meta`` device.
        table: the entry of :data:`graphwright.backends.triton.configurations.TABLE` that it takes, if any.
        oldest: architecture that it needs, as of NVIDIA.
    """

    name: str
    run: Callable[[], object]
    table: str | None = None
    oldest: int = 80

    def runs_on(self, target: str) -> bool:
        """Whether the target has what it needs; what needs more than sm_80 is not made for AMD."""
        return int(target[3:]) >= self.oldest if target.startswith("sm_") else self.oldest <= 80


def tensor(*shape: int, dtype: torch.dtype = _HALF, grad: bool = False) -> torch.Tensor:
    """Without values."""
    return torch.empty(shape, dtype=dtype, device=_META, requires_grad=grad)


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
        keys, places = tensor(1, 8, 32768, 128, dtype=cache), tensor(1, dtype=torch.int64)
        scales = tensor(1, 8, 32768, dtype=torch.float32) if cache == torch.int8 else None
        append(keys, scales, new, places, places)
        slopes = tensor(32, dtype=torch.float32)
        for window, softcap, biased in ((0, 0.0, None), (1024, 50.0, None), (0, 0.0, slopes)):
            cached_attention(
                *(query, keys, keys, places, places, biased, 0.1, window, softcap),
                key_scales=scales,
                value_scales=scales,
            )

    return Case(f"{kind} {length} tokens, {str(cache).removeprefix('torch.')} cache", run, kind)


CASES: tuple[Case, ...] = (
    Case("norms", _norms),
    Case("gradients of norms", _norm_gradients),
    _nbits_case(1),
    _nbits_case(4096),
    _nbits_case(1, asymmetric=True, fused=True),
    _nbits_case(4096, asymmetric=True, fused=True),
    *(_nbits_case(rows, 4, group, asymmetric=True) for rows in (1, 4096) for group in (32, 64)),
    *(_nbits_case(rows, 8, asymmetric=asymmetric) for rows in (1, 4096) for asymmetric in (False, True)),
    Case("linear_nbits input gradient", _nbits_gradient, "linear_nbits input gradient"),
    Case("pointwise", _pointwise),
    Case("kron_linear", _kron, "kron_linear"),
    *(_attention_case(width) for width in (64, 128, 256)),
    _attention_case(128, torch.float32),
    *(_cached_case(length, _HALF, cache) for length in (1, 512) for cache in (_HALF, torch.int8)),
    _cached_case(1, torch.float32, torch.float32),
)
