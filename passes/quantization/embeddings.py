"""The pass that quantises embedding tables."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import Pass
from graphwright.passes.contract import Approximate, Contract
from graphwright.passes.quantization.checks import check_format, local_limit
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.loss import Loss, report_entries
from graphwright.passes.quantization.storing import packed_linear, stem, store
from graphwright.passes.quantization.targets import LinearTarget, embedding_objection, linear_target
from graphwright.passes.quantization.weights import PackedWeight, quantize_weight
from graphwright.passes.selection import Predicate


@dataclass(frozen=True, kw_only=True)
class QuantizeEmbeddings(Pass):
    """Store embedding tables as integers of 2 to 8 bits.

    ::

        %e = aten.embedding(%table, %ids)
        ->
        %e = graphwright.embedding_nbits(%ids, %qweight, %scales, %zero_points, 8, 384, 384)

    A table that is tied to the output head is left alone unless ``tied`` is set; then table and head read the same
    packed storage, and the head becomes ``graphwright.linear_nbits``.

    It does not fire on: embeddings outside ``where``; tables tied to something else; tables that are computed or not
    floating.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: columns to a scale, a multiple of 16; ``None`` for one scale per row.
        symmetric: zero point fixed at the middle code.
        clip_search: choose the range with the least squared error instead of the full one.
        tied: quantise a tied table together with the linear that shares it.
    """

    name: ClassVar[str] = "quantize-embeddings"
    contract: ClassVar[Contract] = Approximate()
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "masked", "quantized"})

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    clip_search: bool = True
    tied: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.name, self.bits, self.group_size)

    def effective_contract(self) -> Contract:
        """Approximate, with a limit for each table by bits."""
        base = Approximate(max_local_error=local_limit("int", self.bits, self.clip_search))
        return base if self.max_error is None else dataclasses.replace(base, max_relative_error=float(self.max_error))

    def run(self, program: Program) -> bool:
        """Quantise every table that is selected and can be.

        Raises:
            InputError: a table holds NaN or infinity.
        """
        tables = self._tables(program)
        form = Format(self.bits, self.group_size, self.symmetric, self.clip_search)
        losses: dict[str, Loss] = {}
        with program.edit() as rewriter:
            for table, users in tables.items():
                name = str(table.target)
                packed = quantize_weight(program.tensor(table), form, name=name)
                losses[name] = packed.loss
                operands = store(rewriter, packed, stem(name), users[0])
                columns = program.tensor(table).shape[1]
                for user in users:
                    self._rewrite(rewriter, program, user, operands, packed, columns)
            program.notes["tables"] = len(tables)
            if losses:
                program.notes.update(report_entries(losses))
            return rewriter.changed

    def _tables(self, program: Program) -> dict[fx.Node, list[fx.Node]]:
        chosen = self.selected(program)
        tables: dict[fx.Node, list[fx.Node]] = {}
        reasons: dict[fx.Node, str] = {}
        for node in program.nodes:
            if op_name(node) != "aten.embedding":
                continue
            reason = self._refuse(program, node, chosen)
            if reason is None:
                table = arguments_of(node)["weight"]
                tables[table] = list(table.users)
            else:
                reasons[node] = reason
        refusals = [Refusal(self.name, node.name, path_of(node), reason, 1) for node, reason in reasons.items()]
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        return tables

    def _refuse(self, program: Program, node: fx.Node, chosen: Predicate) -> str | None:
        if not chosen(node):
            return "not selected by where= / ignore="
        for reader in arguments_of(node)["weight"].users:
            protected = tags_of(reader) & self.respects
            if protected:
                place = "it" if reader is node else f"%{reader.name}, which reads the same table,"
                return f"{place} is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
            if op_name(reader) == "aten.embedding" and not chosen(reader):
                return f"its table is also read by %{reader.name}, which is not selected, and would be stored twice"
        return embedding_objection(program, node, tied=self.tied)

    def _rewrite(
        self,
        rewriter: Rewriter,
        program: Program,
        user: fx.Node,
        operands: tuple[fx.Node, fx.Node, fx.Node | None],
        packed: PackedWeight,
        columns: int,
    ) -> None:
        if op_name(user) == "aten.embedding":
            indices = arguments_of(user)["indices"]
            new = rewriter.call(
                "graphwright.embedding_nbits",
                indices,
                *operands,
                self.bits,
                packed.group_size,
                columns,
                like=user,
                tags=("quantized",),
            )
            new = self._as_before(rewriter, program, user, new)
        else:
            found = linear_target(program, user)
            assert isinstance(found, LinearTarget)
            new = packed_linear(rewriter, found, packed, operands)
        rewriter.replace(user, new)

    @staticmethod
    def _as_before(rewriter: Rewriter, program: Program, user: fx.Node, new: fx.Node) -> fx.Node:
        """The rows in the table's dtype; scales are kept in half precision."""
        wanted = user.meta["val"].dtype
        return new if new.meta["val"].dtype == wanted else rewriter.call("aten.to.dtype", new, wanted, like=user)
