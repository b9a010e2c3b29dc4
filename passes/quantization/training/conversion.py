"""The pass that stores what was trained with rounding as integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.ops.fake_quantize import codes_of
from graphwright.ir.ops.quantization import BITS, pack
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Exact
from graphwright.passes.quantization.storing import stem

_ROUNDED = "graphwright.fake_quantize"
_TAGS = ("quantized",)


@dataclass(frozen=True)
class _Linear:
    """A linear on a rounded weight: its node, what it multiplies, and what rounds that."""

    node: fx.Node
    x: fx.Node
    bias: fx.Node | None
    weight: fx.Node
    rounding: dict[str, Any]
    input_rounding: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class ConvertFakeQuantize(Pass):
    """Store the weights of linears that were trained with rounding as the codes they were rounded to.

    ::

        %rounded = graphwright.fake_quantize(%w, %weight_scale, None, -8, 7, 128)
        %y = aten.linear(%x, %rounded, %b)
        ->
        %y = graphwright.linear_nbits(%x, %qweight, %scales, None, %b, 4, 128)

    and with a rounded input ``graphwright.linear_int8_static``. Nothing is rounded again: codes, scales and zero points
    are those of the training, scales in half precision only where that changes none of them.

    It does not fire on: linears outside ``where``; nodes tagged as adapters; linears whose input is rounded on another
    grid than 8 bits, or together with weights other than INT8 without the lowest code, one scale per channel; weights
    whose codes do not start at 0 or at minus half their number.
    """

    name: ClassVar[str] = "convert-fake-quantize"
    contract: ClassVar[Contract] = Exact(tolerance=1e-6)
    needs: ClassVar[tuple[str, ...]] = ("insert-fake-quantize",)

    def run(self, program: Program) -> bool:
        """Convert every linear that is selected and can be.

        Raises:
            InputError: a trained weight or scale is NaN, infinite, or a scale is 0.
        """
        chosen = self.selected(program)
        refusals: list[Refusal] = []
        count = 0
        stored: dict[fx.Node, tuple[Any, ...]] = {}
        with program.edit() as rewriter:
            for node in program.nodes:
                found = _linear(node)
                if found is None:
                    continue
                reason = self._refuse(program, found, chosen(node))
                if reason is not None:
                    refusals.append(Refusal(self.name, node.name, path_of(node), reason, 1))
                    continue
                self._convert(rewriter, found, stored)
                count += 1
            program.notes["linears"] = count
            program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
            return rewriter.changed

    def _refuse(self, program: Program, found: _Linear, selected: bool) -> str | None:
        if not selected:
            return "not selected by where= / ignore="
        protected = tags_of(found.node) & self.respects
        if protected:
            return f"it is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        low, high, group = (found.rounding[key] for key in ("low", "high", "group_size"))
        if found.rounding["x"].op != "get_attr" or found.rounding["scale"].op != "get_attr" or not group:
            return "its weight or scale is computed, not a constant, or has one scale for all"
        columns = program.tensor(found.rounding["x"]).shape[1]
        given = found.input_rounding
        if given is None:
            bits = (high - low + 1).bit_length() - 1
            least = 0 if found.rounding["zero_point"] is not None else -(2 ** (bits - 1))
            if (low, high - low) != (least, 2**bits - 1) or bits not in BITS:
                return f"its codes go from {low} to {high}, which no packed format has"
            return None
        if (given["low"], given["high"], given["group_size"]) != (0, 255, 0) or given["zero_point"] is None:
            return "its input is not rounded on one grid of 8 bits"
        if (low, high) != (-127, 127) or found.rounding["zero_point"] is not None or group < columns:
            return "its input is rounded, and its weight is not INT8 in ±127 with one scale per channel"
        return None

    def _convert(self, rewriter: Rewriter, found: _Linear, stored: dict[fx.Node, tuple[Any, ...]]) -> None:
        key = found.weight
        if found.input_rounding is None:
            if key not in stored:
                stored[key] = _packed(rewriter, found)
            codes, scales, points, bits = stored[key]
            group = found.rounding["group_size"]
            operands = found.x, codes, scales, points, found.bias, bits, group
            new = rewriter.call("graphwright.linear_nbits", *operands, like=found.node, tags=_TAGS)
        else:
            if key not in stored:
                stored[key] = _channels(rewriter, found)
            operands = _with_input(rewriter, found, *stored[key])
            new = rewriter.call("graphwright.linear_int8_static", *operands, like=found.node, tags=_TAGS)
        rewriter.replace(found.node, new)


def _linear(node: fx.Node) -> _Linear | None:
    """The linear on a rounded weight at a node."""
    if op_name(node) != "aten.linear":
        return None
    arguments = arguments_of(node)
    weight, x = arguments["weight"], arguments["input"]
    if op_name(weight) != _ROUNDED:
        return None
    given = arguments_of(x) if op_name(x) == _ROUNDED else None
    source = given["x"] if given is not None else x
    return _Linear(node, source, arguments["bias"], weight, arguments_of(weight), given)


def _trained(program: Program, found: _Linear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes int16 ``[rows, columns]``, scales and zero points ``[rows, G]``."""
    rounding = found.rounding
    weight, scale = program.tensor(rounding["x"]).detach(), program.tensor(rounding["scale"]).detach()
    points = rounding["zero_point"]
    zero = program.tensor(points).detach() if points is not None else None
    for name, value in ((rounding["x"].target, weight), (rounding["scale"].target, scale)):
        if not bool(torch.isfinite(value).all()):
            raise InputError("holds NaN or infinity", where=f"weight {str(name)!r}", hint="training has diverged")
    if bool((scale == 0).any()):
        raise InputError(
            "holds a 0", where=f"scale {str(rounding['scale'].target)!r}", hint="train with a smaller learning rate"
        )
    limits = rounding["low"], rounding["high"], rounding["group_size"]
    return codes_of(weight, scale, zero, *limits), scale, zero


def _packed(rewriter: Rewriter, found: _Linear) -> tuple[Any, ...]:
    """Nodes of the codes, scales and zero points, and the bits."""
    codes, scale, zero = _trained(rewriter.program, found)
    low, high, group = (found.rounding[key] for key in ("low", "high", "group_size"))
    bits = (high - low + 1).bit_length() - 1
    points = zero.to(torch.uint8) if zero is not None else None
    bytes_ = pack((codes - low).to(torch.uint8), bits, group, points)
    half = scale.to(torch.float16)
    scale = half if torch.equal(half.to(scale.dtype), scale) else scale.clone()
    base, like = stem(str(found.rounding["x"].target)), found.node
    codes_node = rewriter.weight(f"{base}qweight", bytes_, like=like, tags=_TAGS)
    scales = rewriter.weight(f"{base}scales", scale, like=like, tags=_TAGS)
    zeros = rewriter.weight(f"{base}zero_points", points, like=like, tags=_TAGS) if points is not None else None
    return codes_node, scales, zeros, bits


def _channels(rewriter: Rewriter, found: _Linear) -> tuple[fx.Node, torch.Tensor]:
    """The node of int8 codes, and a scale for each of their rows."""
    codes, scale, _ = _trained(rewriter.program, found)
    base = stem(str(found.rounding["x"].target))
    node = rewriter.weight(f"{base}qweight", codes.to(torch.int8), like=found.node, tags=_TAGS)
    return node, scale.squeeze(1)


def _with_input(rewriter: Rewriter, found: _Linear, codes: fx.Node, scale: torch.Tensor) -> tuple[Any, ...]:
    """Operands of ``linear_int8_static``."""
    assert found.input_rounding is not None
    program, like = rewriter.program, found.node
    name = str(found.input_rounding["scale"].target)
    step = program.tensor(name).detach().to(torch.float32)
    if not (bool(torch.isfinite(step)) and float(step) > 0):
        raise InputError(
            f"is {float(step)} and must be positive",
            where=f"scale {name!r}",
            hint="train with a smaller learning rate",
        )
    base, columns = stem(str(found.rounding["x"].target)), program.tensor(found.rounding["x"]).shape[1]
    factors = (scale.double() * step.double()).to(torch.float32)
    return (
        found.x,
        codes,
        rewriter.weight(f"{base}scales", factors, like=like, tags=_TAGS),
        found.bias,
        rewriter.weight(f"{base}input_scales", step.expand(columns).contiguous(), like=like, tags=_TAGS),
        int(program.tensor(found.input_rounding["zero_point"])),
    )
