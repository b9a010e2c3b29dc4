"""Makes the nodes of one adapter at one site, tagged so that later passes know whose they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from graphwright.ir import provenance
from graphwright.ir.arguments import arguments_of
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.adapters.base import Factor
from graphwright.passes.adapters.sites import ADAPTER, Site


def tag_of(name: str) -> str:
    """The tag of an adapter's nodes, beside ``adapter``."""
    return f"{ADAPTER}/{name}"


def exit_tag(name: str) -> str:
    """The tag of nodes that give an adapted value, in place of the one they are computed from."""
    return f"{ADAPTER}/{name}/exit"


def fed_tag(name: str) -> str:
    """The tag of those of them that a layer reads as its input, in place of what it read."""
    return f"{ADAPTER}/{name}/fed"


class Builder:
    """What a kind's ``build`` makes nodes with.

    Attributes:
        rewriter: of the program.
        name: of the adapter.
        site: where.
        exits: nodes that give adapted values so far.
    """

    def __init__(self, rewriter: Rewriter, name: str, site: Site) -> None:
        self.rewriter, self.name, self.site = rewriter, name, site
        self.exits: list[fx.Node] = []
        self._made: set[fx.Node] = set()

    def weights(self, factors: Mapping[str, Factor]) -> dict[str, fx.Node]:
        """Nodes of a site's tensors: parameters where they are trained, constants elsewhere."""
        nodes: dict[str, fx.Node] = {}
        for key, factor in factors.items():
            base = f"{self.site.path}.{key}" if factor.shared is None else f"adapters.{factor.shared}"
            value: torch.Tensor = nn.Parameter(factor.value) if factor.trained else factor.value
            nodes[key] = self._weight(f"{base.lstrip('.')}.{self.name}", value, factor.shared is not None)
        return nodes

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node; of a value that has an adapter already it reads the adapted one."""
        args, kwargs = fx.node.map_arg((args, kwargs), self._standing)
        node = self.rewriter.call(target, *args, like=self.site.node, **kwargs)
        node.meta[provenance.TAGS] = frozenset({ADAPTER, tag_of(self.name)})
        self._made.add(node)
        return node

    def linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
        """``x Wᵀ + b``."""
        return self.call("aten.linear", x, weight, bias)

    def through(self, weight: fx.Node, x: fx.Node | None = None) -> fx.Node:
        """What the site's layer does, with another weight and no bias.

        Args:
            weight: ``[out, in]`` of a linear, whatever the layer's own is stored as; ``[rows, dim]`` of an embedding;
                ``[out, in / groups, …]`` of a convolution.
            x: in place of the site's input.
        """
        given = arguments_of(self.site.node)
        x = self.site.x if x is None else x
        if self.site.op == "embedding":
            return self.call("aten.embedding", weight, x)
        if self.site.op == "conv":
            return self.call(self.site.node.target, **{**given, "input": x, "weight": weight, "bias": None})
        return self.linear(x, weight)

    def pointwise(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
        """A convolution ``[out, channels, 1…]`` over the channels of every place, where the site is a convolution."""
        return self.call(self.site.node.target, x, weight, *([] if bias is None else [bias]))

    def scaled(self, x: fx.Node, factor: float) -> fx.Node:
        """``factor · x``; x itself for 1."""
        return x if factor == 1.0 else self.call("aten.mul.Tensor", x, factor)

    def plus(self, y: fx.Node, branch: fx.Node) -> fx.Node:
        """``y + branch``: the value that stands without the adapter is always the first operand."""
        return self.call("aten.add.Tensor", y, branch)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """x in another dtype; x itself where it has that one."""
        return x if x.meta["val"].dtype == dtype else self.call("aten.to.dtype", x, dtype)

    def as_used(self, weights: Mapping[str, fx.Node], stored: torch.dtype) -> dict[str, fx.Node]:
        """Weights in the dtype of the site, where they are stored in another."""
        used = dict(weights)
        for key, node in weights.items():
            if stored != self.site.dtype and node.meta["val"].dtype == stored:
                used[key] = self.cast(node, self.site.dtype)
        return used

    def sink(self) -> None:
        """Move what is computed from weights alone to where it is read, so that it lies in its layer.

        New nodes without other operands are put in front of everything, where the layers' own order is not seen.
        """
        made, alone = sorted(self._made), set[fx.Node]()
        for node in made:
            if all(source.op == "get_attr" or source in alone for source in node.all_input_nodes):
                alone.add(node)
        for node in reversed(made):
            if node in alone and node.users:
                min(node.users).prepend(node)

    def adapt(self, old: fx.Node, new: fx.Node, *, besides: Collection[fx.Node] = (), retyped: bool = False) -> None:
        """Let all users of ``old``, but the adapter, read ``new``, whose first operands lead back to ``old``.

        Args:
            old: the bare value.
            new: the adapted one.
            besides: further users that go on reading ``old``.
            retyped: the shapes differ: :meth:`Rewriter.retype` is called afterwards.
        """
        # Values of other shapes are not compared.
        self.rewriter.redirect(
            self._standing(old), new, besides={*self._made, *besides}, equivalent=not retyped, retyped=retyped
        )
        self._exit(new)

    def feed(self, node: fx.Node, name: str, new: fx.Node) -> None:
        """Let a node read ``new`` as its argument ``name``; the first operands of ``new`` lead back to the old one."""
        given = {**arguments_of(node), name: new}
        self.rewriter.set_arguments(node, **given)
        new.meta[provenance.TAGS] = tags_of(new) | {fed_tag(self.name)}
        self._exit(new)

    def _standing(self, value: fx.Node) -> fx.Node:
        """The site's value as the adapters that were put in before leave it: adapters stand in the order in which
        they came."""
        if value is not self.site.node:
            return value
        while (above := self._exit_over(value)) is not None:
            value = above
        return value

    def _exit_over(self, value: fx.Node) -> fx.Node | None:
        """The adapted value that first operands lead from to ``value``."""
        for user in value.users:
            node, below = user, value
            while node.args and node.args[0] is below and ADAPTER in tags_of(node) and node not in self._made:
                ends = {tag.rpartition("/")[2] for tag in tags_of(node)}
                if "exit" in ends and "fed" not in ends and path_of(node) == self.site.path:
                    return node
                node, below = next((each for each in node.users if each.args and each.args[0] is node), node), node
        return None

    def _exit(self, node: fx.Node) -> None:
        node.meta[provenance.TAGS] = tags_of(node) | {exit_tag(self.name)}
        self.exits.append(node)

    def _weight(self, name: str, value: torch.Tensor, shared: bool) -> fx.Node:
        present = self.rewriter.program.tensors().get(name) if shared else None
        node = self.rewriter.weight(name, value if present is None else present, like=self.site.node)
        node.meta[provenance.TAGS] = frozenset({ADAPTER, tag_of(self.name)})
        return node
