"""Launches that stand for what kernels are used for, on shapes of Llama 3 8B; compiled ahead of time and tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphwright.backends.triton.kernels import norms
from graphwright.backends.triton.kernels.epilogue import Epilogue
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
    kind = "few" if rows <= 16 else "many"
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
)
