"""Launches that stand for what kernels are used for, on shapes of Llama 3 8B; compiled ahead of time and tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphwright.backends.triton.kernels import norms

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


CASES: tuple[Case, ...] = (
    Case("norms", _norms),
    Case("gradients of norms", _norm_gradients),
)
