"""The pass that lets attention heads share their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.stacks import Stack
from graphwright.ir.types import TensorType
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Retrain
from graphwright.passes.fusion.linears import attention_operands
from graphwright.passes.sharing.choosing import check_untouched, choose_stack
from graphwright.passes.sharing.layers import TOO_LATE

_ATTENTION = frozenset({"aten.scaled_dot_product_attention", "graphwright.attention", "graphwright.cached_attention"})
_FARTHEST = 40


@dataclass(frozen=True)
class _Site:
    """Query and key linears of one attention, ``groups`` key heads, each with the query heads that read it."""

    query: fx.Node
    key: fx.Node
    groups: int

    def units(self, program: Program) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of each key head's group, ``[groups, rows, in]``."""
        found = [program.tensor(argument(node, "weight")).detach() for node in (self.query, self.key)]
        first, second = (each.reshape(self.groups, -1, each.shape[1]) for each in found)
        return first, second


@dataclass(frozen=True, kw_only=True)
class ShareHeads(Pass):
    """Let attention heads of different layers that are alike share their query and key weights (Cao et al. 2024,
    "Head-wise shareable attention for large language models", DirectShare).

    ::

        %q = aten.linear(%x, %q_weight)
        ->
        %chosen = aten.index_select(%shared_q_weight, 0, %heads)     [heads, rows, in] of all distinct ones
        %q = aten.linear(%x, aten.reshape(%chosen, [out, in]))

    Likeness is the cosine of the query and key weights of a head, one after the other; where several query heads read
    one key head, they go together. Pairs are taken from the most alike on: the head of the later layer gets the weights
    of the other. Each distinct head is stored once for all layers, and trains once. Biases stay each layer's own.

    The function changes until the model is trained; the weights are gathered with every call, so this saves memory,
    not time, and the linears cannot be quantised. It is an error if one linear gives query and key together.

    Attributes:
        share: the fraction of the stack's heads that get the weights of others, from 0 to below 1.
    """

    name: ClassVar[str] = "share-heads"
    contract: ClassVar[Contract] = Retrain()
    not_after: ClassVar[Mapping[str, str]] = {
        **TOO_LATE,
        "fuse-qkv": "query and key are one linear; share heads first",
        "share-layers": "whole layers share already; share the heads alone, or the layers",
    }
    respects: ClassVar[frozenset[str]] = frozenset()

    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share < 1:
            raise InputError(f"must be from 0 to below 1, not {self.share!r}", where=f"{self.name}: share")

    def run(self, program: Program) -> bool:
        """Share; all or nothing.

        Raises:
            InputError: no block is repeated, its weights are quantised or adapted, its attention has no query and key
                linears of their own, or heads differ in shape.
        """
        stack = choose_stack(program, self.selected(program), self.name)
        check_untouched(program, stack, self.name)
        sites = _sites(program, stack, self.name)
        units = [site.units(program) for site in sites]
        shapes = {(each[0].shape, each[1].shape, each[0].dtype) for each in units}
        if len(shapes) > 1:
            raise InputError("heads differ in shape from layer to layer", where=self.name, context=[str(stack)])
        total = sum(site.groups for site in sites)
        leaders = _leaders(units, int(self.share * total))
        if leaders == list(range(total)):
            return False
        kept = sorted(set(leaders))
        places = [kept.index(leader) for leader in leaders]
        with program.edit() as rewriter:
            for role in (0, 1):
                table = torch.cat([each[role] for each in units])[kept].clone()
                self._rewrite(rewriter, sites, role, table, places)
        program.notes.update({"heads": total, "distinct": len(kept)})
        return True

    def _rewrite(
        self, rewriter: Rewriter, sites: Sequence[_Site], role: int, table: torch.Tensor, places: Sequence[int]
    ) -> None:
        linears = [(site.query, site.key)[role] for site in sites]
        old = rewriter.program.tensor(argument(linears[0], "weight"))
        value = torch.nn.Parameter(table, old.requires_grad) if isinstance(old, torch.nn.Parameter) else table
        name = ("shared_query_heads", "shared_key_heads")[role]
        weight = rewriter.weight(f"{name}.weight", value, like=argument(linears[0], "weight"))
        start = 0
        for number, (site, linear) in enumerate(zip(sites, linears, strict=True)):
            wanted = torch.tensor(places[start : start + site.groups])
            start += site.groups
            index = rewriter.weight(f"{name}.heads_{number}", wanted, like=linear)
            chosen = rewriter.call("aten.index_select", weight, 0, index, like=linear)
            out = table.shape[1] * site.groups
            matrix = rewriter.call("aten.reshape", chosen, [out, table.shape[2]], like=linear)
            given, _, *rest = linear.args
            rewriter.set_arguments(linear, given, matrix, *rest)


def _leaders(units: Sequence[tuple[torch.Tensor, torch.Tensor]], count: int) -> list[int]:
    """For each head, over all layers, the one whose weights it has in the end."""
    rows = torch.cat([torch.cat((query.flatten(1), key.flatten(1)), 1).double() for query, key in units])
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    alike = rows @ rows.T
    layer = torch.tensor([at for at, (query, _) in enumerate(units) for _ in range(len(query))])
    pairs = torch.nonzero(layer[:, None] < layer[None, :])
    order = torch.argsort(alike[pairs[:, 0], pairs[:, 1]], descending=True, stable=True)
    leaders, leading = list(range(len(rows))), set[int]()
    for first, second in pairs[order].tolist():
        if count == 0:
            break
        if leaders[first] == first and leaders[second] == second and second not in leading:
            leaders[second] = first
            leading.add(first)
            count -= 1
    return leaders


def _sites(program: Program, stack: Stack, where: str) -> list[_Site]:
    found: list[_Site] = []
    for number, layer in enumerate(stack.layers):
        attentions = [node for node in layer.nodes if op_name(node) in _ATTENTION]
        linears = [_linear(each) for node in attentions for each in attention_operands(node)[:2]]
        kind = program.type_of(attention_operands(attentions[0])[0]) if attentions else None
        fit = len(linears) == 2 and None not in linears and linears[0] is not linears[1]
        if not fit or not isinstance(kind, TensorType) or not isinstance(kind.shape[-1], int):
            raise InputError(
                "has no attention whose query and key come from a linear each",
                where=f"{where}: layer {number} {layer.path}".rstrip(),
                hint="models with joint projections (GPT-2, GPT-NeoX, MPT) share whole layers: ShareLayers",
            )
        query, key = linears
        assert query is not None
        assert key is not None
        found.append(_Site(query, key, program.tensor(argument(key, "weight")).shape[0] // kind.shape[-1]))
    return found


def _linear(value: fx.Node) -> fx.Node | None:
    """The nearest linear with a stored weight that a value comes from."""
    waiting, seen = [value], set[fx.Node]()
    while waiting and len(seen) < _FARTHEST:
        node = waiting.pop(0)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if op_name(node) == "aten.linear":
            return node if argument(node, "weight").op == "get_attr" else None
        waiting += node.all_input_nodes
    return None
