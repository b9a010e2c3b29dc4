"""Prefix tuning: trained keys and values in front of every attention's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.types import fake_of
from graphwright.passes.adapters.base import AdapterKind, Draw, Factor, finite, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.sites import ADAPTER, Site, refusal
from graphwright.passes.adapters.virtual import in_front, lengthen, token_inputs
from graphwright.passes.selection import Predicate

_ATTENTIONS = frozenset({"aten.scaled_dot_product_attention", "graphwright.attention"})
# What repeats keys and values for the queries that share them.
_REPEATS = frozenset(
    f"aten.{name}" for name in ("view", "reshape", "expand", "unsqueeze", "contiguous", "clone", "slice.Tensor")
)
_INPUTS = "inputs"


@dataclass(frozen=True)
class PrefixTuning(AdapterKind):
    """``softmax(q [Pₖ; k]ᵀ) [Pᵥ; v]`` in every attention (Li & Liang 2021), with n trained positions.

    Trains ``2 n h d_h`` numbers an attention of h key heads. Tokens have the positions that they would have behind n
    others, and keys are trained as they are after any rotation. Inside, the sequence is n longer, and keys and values
    of the first n places are overwritten, so it goes for every model whose attentions are one operator; what the other
    layers compute for these places is work that no result depends on.

    A longest sequence that the program has is n shorter with it.

    Attributes:
        tokens: n.
        std: with which they start, normal.
    """

    kind: ClassVar[str] = "prefix"
    unmergeable: ClassVar[str | None] = "it is more keys and values, not another weight"
    identity: ClassVar[bool] = False

    tokens: int = 8
    std: float = 0.02

    def __post_init__(self) -> None:
        whole(self.kind, "tokens", self.tokens)
        finite(self.kind, "std", self.std, positive=True)

    def sites(self, program: Program, selected: Predicate, *, head: bool) -> Iterator[Site | Refusal]:
        """The inputs, and every attention of the tokens to themselves."""
        found = token_inputs(program)
        if isinstance(found, str):
            yield refusal(program.output, found)
            return
        places: list[Site] = []
        for node in attentions(program):
            key, value = (_unrepeated(argument(node, name)) for name in ("key", "value"))
            if not selected(node):
                yield refusal(node, "not selected by where= / ignore=")
            elif str(program.symbols.render(fake_of(key).shape[2])) != found.dim:
                yield refusal(node, f"its keys are not those of the tokens but {program.type_of(key)}")
            else:
                heads, width = int(fake_of(key).shape[1]), int(fake_of(key).shape[3])
                extra = (("key", key), ("value", value))
                dtype = fake_of(key).dtype
                places.append(Site(path_of(node), node, key, "", (heads, width), dtype, op="prefix", extra=extra))
        if places:
            yield replace(found.site, op=_INPUTS)
            yield from places
        else:
            yield refusal(program.output, "there is no attention as one operator (FuseAttention)")

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``prefix_keys [h, n, d_h]`` and ``prefix_values [h, n, d_h]``; the inputs have none."""
        if site.op == _INPUTS:
            return {}
        heads, width = site.features
        return {
            name: Factor(draw.normal(heads, self.tokens, width, std=self.std).to(site.dtype))
            for name in ("prefix_keys", "prefix_values")
        }

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """Longer inputs first, then the prefix in the first places."""
        if site.op == _INPUTS:
            found = token_inputs(builder.rewriter.program)
            assert not isinstance(found, str)
            lengthen(builder, found, self.tokens)
            return
        for (_, node), name in zip(site.extra, ("prefix_keys", "prefix_values"), strict=True):
            prefix = builder.call("aten.unsqueeze", factors[name], 0)
            builder.adapt(node, in_front(builder, node, prefix, 2, self.tokens))


def attentions(program: Program) -> Iterator[fx.Node]:
    """Every attention of a program that is one operator, in order, whatever it attends to."""
    for node in program.nodes:
        if op_name(node) in _ATTENTIONS and ADAPTER not in tags_of(node):
            yield node


def _unrepeated(node: fx.Node) -> fx.Node:
    """Keys or values ``[batch, heads, sequence, d_h]`` before they are repeated for groups of queries."""
    found = current = node
    while op_name(current) in _REPEATS:
        source = current.args[0]
        assert isinstance(source, fx.Node)
        current = source
        same = fake_of(current).dim() == 4 and fake_of(current).shape[2:] == fake_of(node).shape[2:]
        found = current if same else found
    return found
