"""Linears that compute with the dialect's quantised operators: what stands in a model for those of a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx, nn

from graphwright.ir import ops
from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.ops.quantization import pack
from graphwright.ir.program import Program
from graphwright.ir.provenance import add_tags

QUANTIZED_OPS = frozenset(
    f"graphwright.{name}" for name in ("linear_nbits", "linear_int8_dynamic", "linear_int8_static", "linear_codebook")
)


@dataclass(frozen=True)
class GroupedWeight:
    """A weight of :func:`graphwright.ir.ops.quantization.linear_nbits`.

    Attributes:
        qweight: packed codes, uint8 ``[out, G, group_size * bits / 8]``.
        scales: ``[out, G]``.
        zero_points: uint8 ``[out, G]``, or ``None`` for ``2**(bits - 1)``.
        bits: of a code.
        group_size: columns to a scale.
        order: int64 ``[in]``, the input feature that each column stands for, or ``None`` for the features as they come.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    bits: int
    group_size: int
    order: torch.Tensor | None = None

    @staticmethod
    def of_codes(
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bits: int,
        group_size: int,
        order: torch.Tensor | None = None,
    ) -> GroupedWeight:
        """From codes uint8 ``[out, in]``, scales ``[out, G]`` and zero points uint8 ``[out, G]``.

        Zero points that all lie in the middle of the range are not stored.
        """
        if zeros is not None and bool((zeros == 2 ** (bits - 1)).all()):
            zeros = None
        group_size += -group_size % (8 // math.gcd(bits, 8))  # whole bytes: only a group that is the whole row needs it
        qweight = pack(codes, bits, group_size, zeros)
        return GroupedWeight(qweight, scales.contiguous(), zeros, bits, group_size, order)


@dataclass(frozen=True)
class IntegerWeight:
    """A weight of ``linear_int8_dynamic``, or with static ranges of ``linear_int8_static``.

    Attributes:
        qweight: int8 ``[out, in]``.
        scales: ``[out]`` float32; with static ranges times the input's scale.
        activation: ``per_token`` or ``per_tensor``.
        input_scales: ``[in]``, or ``None`` for ranges from the data.
        input_zero_point: with static ranges, the code of 0.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    activation: str = "per_token"
    input_scales: torch.Tensor | None = None
    input_zero_point: int = 128


class StoredLinear(nn.Module):
    """What all linears read from a quantised checkpoint share: their bias, and how wide they are."""

    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_parameter("bias", bias)


class GroupedLinear(StoredLinear):
    """``y = x[order] Ŵᵀ + b``; see :func:`graphwright.ir.ops.quantization.linear_nbits`."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(self, weight: GroupedWeight, inputs: int, bias: nn.Parameter | None) -> None:
        super().__init__(inputs, len(weight.qweight), bias)
        for name in ("qweight", "scales", "zero_points", "order"):
            self.register_buffer(name, getattr(weight, name))
        self.bits, self.group_size = weight.bits, weight.group_size
        self._op = ops.get("linear_nbits").target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        operands = self.qweight, self.scales, self.zero_points, self.bias, self.bits, self.group_size
        result: torch.Tensor = self._op(x, *operands)
        return result


class IntegerLinear(StoredLinear):
    """``y = x̂ Ŵᵀ + b`` with activations of 8 bits; see :func:`graphwright.ir.ops.quantization.linear_int8_dynamic`."""

    qweight: torch.Tensor
    scales: torch.Tensor
    input_scales: torch.Tensor | None

    def __init__(self, weight: IntegerWeight, bias: nn.Parameter | None) -> None:
        outputs, inputs = weight.qweight.shape
        super().__init__(inputs, outputs, bias)
        for name in ("qweight", "scales", "input_scales"):
            self.register_buffer(name, getattr(weight, name))
        self.activation, self.input_zero_point = weight.activation, weight.input_zero_point
        self._op = ops.get("linear_int8_dynamic" if weight.input_scales is None else "linear_int8_static").target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        ranges = (self.activation,) if self.input_scales is None else (self.input_scales, self.input_zero_point)
        result: torch.Tensor = self._op(x, self.qweight, self.scales, self.bias, *ranges)
        return result


def has_stored_linears(model: nn.Module) -> bool:
    """Whether a model was read from a quantised checkpoint."""
    return any(isinstance(module, StoredLinear) for module in model.modules())


def tag_quantized(program: Program) -> None:
    """Tag quantised linears and their weights, as the pass that quantises does."""
    for node in program.nodes:
        if op_name(node) not in QUANTIZED_OPS:
            continue
        arguments = arguments_of(node)
        weights = [value for name, value in arguments.items() if name not in ("x", "bias")]
        for each in (node, *weights):
            if isinstance(each, fx.Node):
                add_tags(each, ("quantized",))
