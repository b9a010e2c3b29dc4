"""Activations, alone or as the gate of another value."""

from __future__ import annotations

import torch

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site, floats, tensor_like
from graphwright.backends.cpu.kernels.layout import expect_floats, result_like, rows_of, unsuitable
from graphwright.ir.errors import BackendError

FUNCTIONS = ("gelu", "gelu_tanh", "relu", "sigmoid", "silu", "tanh")


class Activation(Kernel):
    """An activation, value by value.

    Args:
        isa: instruction set of the kernel.
        function: one of :data:`FUNCTIONS`.
    """

    inputs: tuple[str, ...] = ("self",)

    def __init__(self, isa: str, function: str) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self._kernel = _native.Pointwise(isa, function)
        self.label = f"{function} {self._kernel.isa}"

    def forward(self, x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """``function(x)``, times ``up`` where it is given, in ``x``'s dtype; without gradients.

        Raises:
            BackendError: they are not floating tensors on the CPU, or differ in shape.
        """
        expect_floats(self.label, x, up)
        if up is not None and up.shape != x.shape:
            raise BackendError(f"takes tensors of one shape, not {[*x.shape]} and {[*up.shape]}", where=self.label)
        result, order = result_like(x)
        if result.size > 0:
            columns = result.shape[-1 if order is None else order[-1]] if result.shape else 1
            factor = None if up is None else rows_of(floats(up), columns, order)
            rows, target = rows_of(floats(x), columns, order), rows_of(result, columns, order)
            self._kernel.run(rows, factor, target, torch.get_num_threads())
        return tensor_like(result, x)


class GatedActivation(Activation):
    """``function(gate) * up``; the two may be halves of one buffer."""

    inputs = ("gate", "up")

    def __init__(self, isa: str, function: str) -> None:
        super().__init__(isa, function)
        self.label = f"gated {self.label}"


def _plain(function: str) -> Lowering:
    return lambda site: unsuitable(site, "self") or Activation(site.isa, function)


def _gelu(site: Site) -> Kernel | str:
    function = "gelu_tanh" if site.arguments["approximate"] == "tanh" else "gelu"
    return unsuitable(site, "self") or Activation(site.isa, function)


def _gated(site: Site) -> Kernel | str:
    refusal = unsuitable(site, "gate") or unsuitable(site, "up")
    if not refusal and site.value("gate").shape != site.value("up").shape:
        refusal = "gate and up differ in shape"
    return refusal or GatedActivation(site.isa, site.arguments["activation"])


LOWERINGS: dict[str, Lowering] = {
    "aten.gelu": _gelu,
    **{f"aten.{name}": _plain(name) for name in ("relu", "sigmoid", "silu", "tanh")},
    "graphwright.gated_activation": _gated,
}
