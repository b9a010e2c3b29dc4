"""The pass that computes attention's matrix products in INT8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.types import TensorType
from graphwright.passes.base import Pass
from graphwright.passes.contract import Approximate, Contract

_FUSED, _CACHED = "graphwright.attention", "graphwright.cached_attention"
_PLAIN = "aten.scaled_dot_product_attention"


@dataclass(frozen=True, kw_only=True)
class QuantizeAttention(Pass):
    """Compute both matrix products of attention in INT8: queries with keys, and probabilities with values.

    ::

        %y = graphwright.attention(%query, %key, %value, %mask, None, 0.125, False, 0)
        ->
        %y = graphwright.attention_int8(%query, %key, %value, %mask, None, 0.125, False, 0)

    Queries, keys and values are rounded symmetrically, each head and position with a scale of its own, and
    probabilities to unsigned 8 bits (:mod:`graphwright.ir.ops.attention_int8`); keys and values so stored are an 8-bit
    cache (Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of Large Language Models", sec. 3). No
    calibration is needed: all scales come from the data as the model runs.

    It does not fire on: attention outside ``where``; nodes with a protected tag; attention that is not fused
    (:class:`FuseAttention` makes one operator of it); a decoding step's, whose session stores the cache in INT8 by
    itself (``cache="int8"``) and whose kernel reads it so.
    """

    name: ClassVar[str] = "quantize-attention"
    contract: ClassVar[Contract] = Approximate(max_local_error=0.3)
    after: ClassVar[tuple[str, ...]] = ("fuse-all", "fuse-attention", "fuse-rotary-embedding", "prepare-decoder")
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "quantized"})

    def run(self, program: Program) -> bool:
        """Rewrite every attention that is selected and can be."""
        chosen = self.selected(program)
        refusals: list[Refusal] = []
        count = 0
        with program.edit() as rewriter:
            for node in program.nodes:
                if node.op != "call_function" or op_name(node) not in (_FUSED, _CACHED, _PLAIN):
                    continue
                reason = self._refuse(program, node, chosen(node))
                if reason is not None:
                    refusals.append(Refusal(self.name, node.name, path_of(node), reason, 1))
                    continue
                operands = arguments_of(node).values()
                new = rewriter.call("graphwright.attention_int8", *operands, like=node, tags=("quantized",))
                rewriter.replace(node, new)
                count += 1
            program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
            program.notes["attentions"] = count
            return rewriter.changed

    def _refuse(self, program: Program, node: fx.Node, selected: bool) -> str | None:
        if not selected:
            return "not selected by where= / ignore="
        if protected := tags_of(node) & self.respects:
            return f"it is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        if op_name(node) == _PLAIN:
            return "it is not fused: put fuse-attention before this pass"
        if op_name(node) == _CACHED:
            return "it reads a decoder's cache, which a session stores in INT8 by itself: cache='int8'"
        kind = program.type_of(arguments_of(node)["query"])
        if not isinstance(kind, TensorType) or not kind.dtype.is_floating_point:
            return "its query is not a floating tensor"
        return None
