"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Shape, Site, Step, floats, tensor_like
from graphwright.backends.cpu.kernels.layout import Floats, expect_floats, unsuitable
from graphwright.ir.errors import BackendError


class Rotary(Kernel):
    """``x * cos + turned(x) * sin``; the result is ``[B, H, S, D]``, contiguous.

    Args:
        isa: instruction set of the kernel.
        interleaved: how pairs lie in the head dim: neighbours, or halves.
    """

    inputs = ("x", "cos", "sin")

    def __init__(self, isa: str, interleaved: bool) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self._kernel = _native.Rotary(isa, interleaved)
        self.label = f"rotary_embedding {self._kernel.isa}"

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """See :func:`graphwright.ir.ops.position.rotary_embedding`; without gradients.

        Raises:
            BackendError: they are not floating tensors on the CPU, or do not fit each other.
        """
        expect_floats(self.label, x, cos, sin)
        result = np.empty(x.shape, np.float32)
        try:
            self._kernel.run(_features(x), _features(cos), _features(sin), result, torch.get_num_threads())
        except (TypeError, ValueError) as error:
            shapes = ", ".join(str([*each.shape]) for each in (x, cos, sin))
            raise BackendError(f"cannot take x, cos and sin of {shapes}", where=self.label) from error
        return tensor_like(result, x)

    def step(self, inputs: Sequence[Shape | None], result: Shape) -> Step:
        """Operands: x, cos, sin."""
        return Step(self._kernel, (0, 1, 2))


def _features(x: torch.Tensor) -> Floats:
    values = floats(x)
    return values if values.strides[-1] == 4 or values.shape[-1] == 1 else np.ascontiguousarray(values)


def _rotary(site: Site) -> Kernel | str:
    refusal = next(filter(None, (unsuitable(site, name) for name in ("x", "cos", "sin"))), "")
    return refusal or Rotary(site.isa, site.arguments["interleaved"])


LOWERINGS: dict[str, Lowering] = {"graphwright.rotary_embedding": _rotary}
