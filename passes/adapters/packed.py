"""Weights that are packed, as merging needs them: taken apart, changed, and rounded again in the same format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.ops.codebook import codebook, dequantize_codebook
from graphwright.ir.ops.quantization import dequantize
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.quantization.checks import local_limit
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.loss import Loss
from graphwright.passes.quantization.weights import quantize_weight, quantize_weight_int8

_CODES = ("qweight", "scales", "zero_points")


@dataclass(frozen=True)
class PackedBase:
    """The packed weight of a linear, or some rows of it.

    Attributes:
        operands: the nodes of codes, scales and, where there are some, zero points.
        form: how they are stored.
        columns: of the weight.
        activations: ``"none"``, ``"int8"``, ``"int4"`` or ``"fp8"``: how inputs are rounded.
        factors: ``[in]``, what the weight was multiplied with before it was rounded; ``None`` for nothing.
        rows: the first of the weight and the one behind the last; ``None`` for all.
    """

    operands: Mapping[str, fx.Node]
    form: Format
    columns: int
    activations: str
    factors: torch.Tensor | None = None
    rows: tuple[int, int] | None = None

    @staticmethod
    def at(program: Program, node: fx.Node, rows: tuple[int, int] | None = None) -> PackedBase:
        """The weight of one of :data:`~graphwright.passes.adapters.sites.PACKED_LINEARS`."""
        given, name = arguments_of(node), op_name(node)
        operands = {key: given[key] for key in _CODES if isinstance(given.get(key), fx.Node)}
        columns = int(node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
        if name in ("graphwright.linear_int8_dynamic", "graphwright.linear_int8_static"):
            factors = given.get("input_scales")
            found = program.tensor(factors) if factors is not None else None
            return PackedBase(
                operands, Format(8, None, True, True, integer_products=True), columns, "int8", found, rows
            )
        is_fp8 = name == "graphwright.linear_fp8_dynamic"
        book = "fp8_e4m3" if is_fp8 else given.get("format")
        bits = codebook(book).bits if book is not None else given["bits"]
        form = Format(bits, given["group_size"], "zero_points" not in operands, True, codebook=book)
        rounded = "fp8" if is_fp8 else {8: "int8", 4: "int4"}.get(given.get("activation_bits", 0), "none")
        return PackedBase(operands, form, columns, rounded, None, rows)

    @property
    def codes(self) -> fx.Node:
        """The node that has the codes."""
        return self.operands["qweight"]

    @property
    def span(self) -> slice:
        """The rows."""
        return slice(None) if self.rows is None else slice(*self.rows)

    @property
    def local_limit(self) -> float:
        """The largest relative error of the linear's outputs that rounding anew may make."""
        return local_limit(self.form.codebook or "int", self.form.bits, self.form.clip_search, self.activations)

    def dense(self, program: Program) -> torch.Tensor:
        """What the codes stand for, ``[out, in]`` float64."""
        parts = {key: program.tensor(node).detach()[self.span] for key, node in self.operands.items()}
        codes, scales = parts["qweight"], parts["scales"]
        if self.form.integer_products:
            weight = codes.double() * scales.double().unsqueeze(-1)
            return weight if self.factors is None else weight / self.factors.double()
        if self.form.codebook is not None:
            return dequantize_codebook(codes, scales, self.form.codebook, self.columns, torch.float32).double()
        zeros = parts.get("zero_points")
        return dequantize(codes, scales, zeros, self.form.bits, self.columns, torch.float32).double()

    def write(self, rewriter: Rewriter, weight: torch.Tensor) -> Loss:
        """Round a weight and store it in place of the present one.

        Args:
            rewriter: of the program.
            weight: ``[out, in]`` float64.

        Returns:
            what rounding cost it.

        Raises:
            InputError: it is not finite, or its scales do not fit the dtype that they are stored in.
        """
        program, name = rewriter.program, str(self.codes.target)
        exact = (weight if self.factors is None else weight * self.factors.double()).float()
        parts: dict[str, Any]
        if self.form.integer_products:
            channels = quantize_weight_int8(exact, clip_search=True, name=name)
            parts, loss = {"qweight": channels.qweight, "scales": channels.scales}, channels.loss
        else:
            packed = quantize_weight(exact, self.form, name=name)
            parts, loss = {"qweight": packed.qweight, "scales": packed.scales}, packed.loss
            if packed.zero_points is not None:
                parts["zero_points"] = packed.zero_points
        stored = program.tensor(self.operands["scales"]).dtype
        if not torch.equal(parts["scales"].to(stored).float(), parts["scales"].float()):
            raise InputError(
                f"the merged weight has scales that {stored} does not hold",
                where=f"weight {str(self.operands['scales'].target)!r}",
                hint="keep the adapter beside the packed weight",
            )
        for key, node in self.operands.items():
            values = program.tensor(node).detach().clone()
            values[self.span] = parts[key].to(values.dtype)
            rewriter.rebind(node, values)
        return loss
