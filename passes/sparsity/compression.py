"""Weights that are mostly zeros, stored as a bit for each and the values that are left, and back again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.ops.quantization import pack, unpack
from graphwright.ir.ops.sparse import bits_of, compress, decompress, dense_codes, pack_codes, unpack_mask
from graphwright.ir.ops.sparse_int8 import int8_weight, stored_values
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import TAGS, path_of, tags_of
from graphwright.ir.pruned import follow
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Exact

SPARSE = "sparse"

# Formats of codes by bits. Codes of fewer bits take hardly more than the mask.
_CODED = {8: "int8", 4: "int4"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Operands of a sparse linear that must be stored to be decompressed.
_STORED = ("mask", "values", "row_offsets", "zero_points")
# linear -> its operands: input and weight
_LINEARS = {
    "aten.linear": ("input", "weight"),
    "graphwright.linear_nbits": ("x", "qweight"),
    "graphwright.linear_int8_dynamic": ("x", "qweight"),
    "graphwright.linear_int8_static": ("x", "qweight"),
}
# Linears that round their activations -> the sparse ones, which take what the dense ones take behind the weight.
_ROUNDED = {
    "graphwright.linear_int8_dynamic": ("graphwright.linear_sparse_dynamic", ("scales", "bias", "activation")),
    "graphwright.linear_int8_static": (
        "graphwright.linear_sparse_static",
        ("scales", "bias", "input_scales", "input_zero_point"),
    ),
}
_DENSE = {sparse: (dense, rest) for dense, (sparse, rest) in _ROUNDED.items()}
_FORM = ("scales", "zero_points", "bits", "group_size", "activation", "input_scales", "input_zero_point")


@dataclass(frozen=True, kw_only=True)
class CompressLinears(Pass):
    """Store the weights of linears that are mostly zeros as a mask and the values that are not zero.

    ::

        %y = aten.linear(%x, %w, %b)
        ->
        %y = graphwright.linear_sparse(%x, %mask, %values, %row_offsets, None, None, %b, "float", 0)

        %y = graphwright.linear_nbits(%x, %qweight, %scales, %zero_points, %b, 8, 128)
        ->
        %y = graphwright.linear_sparse(%x, %mask, %values, %row_offsets, %scales, %zero_points, %b, "int8", 128)

        %y = graphwright.linear_int8_dynamic(%x, %qweight, %scales, %b, "per_token")
        ->
        %y = graphwright.linear_sparse_dynamic(%x, %mask, %values, %row_offsets, %scales, %b, "per_token")

    and likewise ``linear_int8_static``, whose activations have a grid beforehand.

    Nothing is rounded: every weight, and every code with its scale, is the same as before; ``-0.0`` becomes ``0.0``.
    A quantised weight is zero where its code is the zero point. :class:`DecompressLinears` is the exact inverse.
    New weights are named after the old: ``….q_proj.weight`` becomes ``….q_proj.weight_mask``, ``….weight_values`` and
    ``….weight_row_offsets``. Values stay trainable where the weight was; the zeros then stay zeros.

    It does not fire on: linears outside ``where``; nodes with a protected tag; weights with fewer zeros than
    ``min_sparsity``; a weight that is computed, not a floating matrix, or read by something else; codes of 2 or 3 bits;
    zero points between codes.

    Attributes:
        min_sparsity: the share of zeros, of 0..1, from which on a weight is stored so.
    """

    name: ClassVar[str] = "compress-linears"
    contract: ClassVar[Contract] = Exact()
    after: ClassVar[tuple[str, ...]] = (
        *("prune-linears", "prune-by-masks", "release-masks", "quantize-linears"),
        *("merge-adapters", "fuse-qkv", "fuse-gate-up"),
    )

    min_sparsity: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.min_sparsity
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
            raise InputError(
                f"must be a number from 0 to 1, not {given!r}",
                where=f"{self.name}: min_sparsity",
                hint="0.5 compresses weights of which half are zeros",
            )

    def run(self, program: Program) -> bool:
        """Compress every linear that is selected and has enough zeros."""
        chosen = self.selected(program)
        groups: dict[str, list[fx.Node]] = {}
        reasons: dict[fx.Node, str] = {}
        for node in program.nodes:
            if node.op != "call_function" or op_name(node) not in _LINEARS:
                continue
            weight = arguments_of(node)[_LINEARS[op_name(node)][1]]
            reason = self._objection(program, node, weight, selected=chosen(node))
            if reason is not None:
                reasons[node] = reason
            else:
                groups.setdefault(str(weight.target), []).append(node)
        compressed: list[float] = []
        with program.edit() as rewriter:
            for group in groups.values():
                found = self._compress(program, rewriter, group)
                if isinstance(found, str):
                    reasons |= dict.fromkeys(group, found)
                else:
                    compressed += [found] * len(group)
            refusals = [Refusal(self.name, node.name, path_of(node), why, 1) for node, why in reasons.items()]
            program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
            program.notes["linears"] = len(compressed)
            if compressed:
                program.notes["sparsity"] = sum(compressed) / len(compressed)
            return rewriter.changed

    def _objection(self, program: Program, node: fx.Node, weight: Any, *, selected: bool) -> str | None:
        if not selected:
            return "not selected by where= / ignore="
        protected = tags_of(node) & self.respects
        if protected:
            return f"it is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return "its weight is computed, not stored"
        if op_name(node) == "aten.linear":
            stored = program.tensor(weight)
            if stored.dim() != 2 or stored.dtype not in _FLOATS:
                return f"its weight is {stored.dtype} of {stored.dim()} dimensions, not a floating matrix"
            return None
        given = arguments_of(node)
        operands = [given[name] for name in ("scales", "zero_points", "input_scales") if given.get(name) is not None]
        if any(each.op != "get_attr" for each in operands):
            return "its scales are computed, not stored"
        if op_name(node) in _ROUNDED:
            return None
        if given["bits"] not in _CODED:
            return f"codes of {given['bits']} bits take hardly more than the bits of a mask"
        if given["zero_points"] is not None and program.tensor(given["zero_points"]).dtype != torch.uint8:
            return "its zero points lie between codes, so no weight of it is zero"
        return None

    def _compress(self, program: Program, rewriter: Rewriter, nodes: Sequence[fx.Node]) -> float | str:
        """Rewrite linears that share a weight; gives its share of zeros, or why it stays."""
        first = nodes[0]
        name, operand = op_name(first), _LINEARS[op_name(first)][1]
        weight: fx.Node = arguments_of(first)[operand]
        readers = {
            user
            for node in program.nodes
            if node.op == "get_attr" and node.target == weight.target
            for user in node.users
        }
        others = [user for user in readers if user not in nodes]
        if others or len({_form(node) for node in nodes}) > 1:
            reader = others[0] if others else nodes[1]
            return f"its weight is also read by %{reader.name}, which needs it whole"
        tensor = program.tensor(weight)
        if name == "aten.linear":
            dense, stored, format = tensor.detach(), tensor.detach() != 0, "float"
        elif name in _ROUNDED:
            dense, stored, format = stored_values(tensor), tensor != 0, "int8"
        else:
            dense, stored = _codes(program, first)
            format = _CODED[arguments_of(first)["bits"]]
        sparsity = 1.0 - float(stored.sum()) / max(1, stored.numel())
        if stored.numel() == 0 or sparsity < self.min_sparsity:
            return f"{sparsity:.1%} of its weights are zeros, fewer than min_sparsity ({self.min_sparsity:.1%})"
        try:
            mask, values, offsets = compress(dense, stored)
        except ValueError as error:
            return str(error)
        if format != "float":
            values = pack_codes(values, format)
        elif isinstance(tensor, torch.nn.Parameter):
            values = torch.nn.Parameter(values, requires_grad=tensor.requires_grad)
        parts = {"mask": mask, "values": values, "row_offsets": offsets}
        base = str(weight.target)
        made = [rewriter.weight(f"{base}_{part}", each, like=first, tags=(SPARSE,)) for part, each in parts.items()]
        follow(program, [base], str(made[0].target), stored)
        for node in nodes:
            given = arguments_of(node)
            if name in _ROUNDED:
                op, rest = _ROUNDED[name]
                operands = (given["x"], *made, *(given[each] for each in rest))
            else:
                scales, zeros, group = (given.get(each) for each in ("scales", "zero_points", "group_size"))
                op = "graphwright.linear_sparse"
                operands = (given[_LINEARS[name][0]], *made, scales, zeros, given["bias"], format, group or 0)
            rewriter.replace(node, rewriter.call(op, *operands, like=node, tags=(SPARSE,)))
        return sparsity


def _form(node: fx.Node) -> tuple[Any, ...]:
    given = arguments_of(node)
    return op_name(node), *(given.get(name) for name in _FORM)


def _codes(program: Program, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a ``linear_nbits``, uint8 ``[out, in]``, and where they are not the zero point."""
    given = arguments_of(node)
    columns = int(given["x"].meta["val"].shape[-1])
    codes = unpack(program.tensor(given["qweight"]), given["bits"])
    zeros = program.tensor(given["zero_points"]) if given["zero_points"] is not None else None
    stored = codes != (2 ** (given["bits"] - 1) if zeros is None else zeros.unsqueeze(-1))
    return codes.flatten(1)[:, :columns], stored.flatten(1)[:, :columns]


@dataclass(frozen=True, kw_only=True)
class DecompressLinears(Pass):
    """Store the weights of sparse linears densely again; the exact inverse of :class:`CompressLinears`.

    ::

        %y = graphwright.linear_sparse(%x, %mask, %values, %row_offsets, None, None, %b, "float", 0)
        ->
        %y = aten.linear(%x, %w, %b)

    Codes become a ``linear_nbits`` on the same scales and zero points, ``linear_sparse_dynamic`` and ``…_static`` the
    ``linear_int8_dynamic`` and ``…_static`` that they were. For passes that work on dense weights: adapters,
    quantisation, pruning. Weights get back the names that they had.

    It does not fire on: linears outside ``where``; a mask or values that are computed; a floating weight whose dtype is
    not the input's; groups of codes that do not fill whole bytes.
    """

    name: ClassVar[str] = "decompress-linears"
    contract: ClassVar[Contract] = Exact()

    def run(self, program: Program) -> bool:
        """Decompress every sparse linear that is selected; those that share a weight share the dense one."""
        chosen, count = self.selected(program), 0
        reasons: dict[fx.Node, str] = {}
        dense: dict[str, torch.Tensor] = {}
        with program.edit() as rewriter:
            for node in program.nodes:
                if node.op != "call_function" or op_name(node) not in ("graphwright.linear_sparse", *_DENSE):
                    continue
                reason = self._objection(program, node) if chosen(node) else "not selected by where= / ignore="
                if reason is not None:
                    reasons[node] = reason
                    continue
                _decompress(program, rewriter, node, dense)
                count += 1
            refusals = [Refusal(self.name, node.name, path_of(node), why, 1) for node, why in reasons.items()]
            program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
            program.notes["linears"] = count
            return rewriter.changed

    def _objection(self, program: Program, node: fx.Node) -> str | None:
        protected = tags_of(node) & self.respects
        if protected:
            return f"it is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        given = arguments_of(node)
        operands = [given[name] for name in _STORED if given.get(name) is not None]
        if any(each.op != "get_attr" for each in operands):
            return "its weight is computed, not stored"
        if op_name(node) in _DENSE:
            return None
        if given["format"] != "float":
            whole = given["group_size"] * bits_of(given["format"]) % 8 == 0
            return None if whole else f"a group of {given['group_size']} codes does not fill whole bytes"
        own, of = given["x"].meta["val"].dtype, program.tensor(given["values"]).dtype
        return None if own == of else f"its input is {own} and its weight {of}"


def _decompress(program: Program, rewriter: Rewriter, node: fx.Node, dense: dict[str, torch.Tensor]) -> None:
    """Rewrite a linear; ``dense`` has the weights that were made for others, by the name of their mask."""
    given, op = arguments_of(node), op_name(node)
    name, columns = str(given["mask"].target), int(given["x"].meta["val"].shape[-1])
    if name not in dense:
        dense[name] = _dense(program, op, given, columns)
    weight = rewriter.weight(name.removesuffix("_mask"), dense[name], like=node)
    follow(program, [name], str(weight.target), unpack_mask(program.tensor(given["mask"]), columns))
    if op in _DENSE:
        whole, names = _DENSE[op]
        new = rewriter.call(whole, given["x"], weight, *(given[each] for each in names), like=node)
    elif given["format"] == "float":
        new = rewriter.call("aten.linear", given["x"], weight, given["bias"], like=node)
    else:
        rest = given["scales"], given["zero_points"], given["bias"], bits_of(given["format"]), given["group_size"]
        new = rewriter.call("graphwright.linear_nbits", given["x"], weight, *rest, like=node)
    for made in (weight, new):
        made.meta[TAGS] = tags_of(made) - {SPARSE}
    rewriter.replace(node, new)


def _dense(program: Program, op: str, given: Mapping[str, Any], columns: int) -> torch.Tensor:
    """A sparse linear's weight as the dense linear stores it."""
    mask, values, offsets = (program.tensor(given[name]) for name in _STORED[:3])
    if op in _DENSE:
        return int8_weight(mask, values, columns)
    format, group = given["format"], given["group_size"]
    if format == "float":
        whole = decompress(mask, values.detach(), offsets, None, None, format, group, columns, values.dtype)
        trained = isinstance(values, torch.nn.Parameter)
        return torch.nn.Parameter(whole, requires_grad=values.requires_grad) if trained else whole
    zeros = program.tensor(given["zero_points"]) if given["zero_points"] is not None else None
    return pack(dense_codes(mask, values, offsets, zeros, format, group, columns), bits_of(format), group, zeros)
