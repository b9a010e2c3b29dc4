"""Passes that make a program truly smaller: attention heads, feed-forward channels, dimensions of the hidden states."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

from graphwright.ir.cost import cost_of
from graphwright.ir.errors import InputError, SelectionError
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.passes.base import Pass
from graphwright.passes.calibration import CalibrationData
from graphwright.passes.contract import Contract, Retrain
from graphwright.passes.removal.cutting import cut
from graphwright.passes.removal.following import follow
from graphwright.passes.removal.linears import feed_forward_at
from graphwright.passes.removal.operators import ATTENTION
from graphwright.passes.removal.scores import SCORES, Score, unit_scores
from graphwright.passes.removal.units import Axis
from graphwright.passes.selection import Predicate


@dataclass(frozen=True, kw_only=True)
class RemoveStructure(Pass):
    """What removing heads, channels and hidden dims has in common.

    Attributes:
        fraction: of the units at each place, from 0 and below 1; at least one stays. Units that only go together, such
            as the query heads of one key head, count as one.
        score: which go: those that score lowest by ``"magnitude"``, ``"activation"`` or ``"taylor"``, see
            :func:`graphwright.passes.removal.scores.unit_scores`.
        calibration: batches, for the last two.
        loss: for ``"taylor"``: of outputs and batch; the model's usual loss by default.
        labels: for ``"taylor"``: which entry of a batch has the labels, where they are not the tokens themselves.
        multiple: how many stay is rounded up to a multiple of this, which kernels may want.
    """

    contract: ClassVar[Contract] = Retrain()
    not_after: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("quantize-linears", "quantize-embeddings"),
        "packed weights cannot be made narrower; remove structure first, then quantise",
    )

    fraction: float = 0.25
    score: Score = "magnitude"
    calibration: Iterable[Any] | None = field(default=None, compare=False)
    loss: Callable[[Any, Any], torch.Tensor] | None = field(default=None, compare=False)
    labels: str | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.fraction, int | float) and not isinstance(self.fraction, bool)
        if not number or not 0 <= self.fraction < 1:
            raise InputError(f"must be from 0 and below 1, not {self.fraction!r}", where=f"{self.name}: fraction")
        if self.score not in SCORES:
            raise InputError(f"must be one of {', '.join(SCORES)}, not {self.score!r}", where=f"{self.name}: score")
        if isinstance(self.multiple, bool) or not isinstance(self.multiple, int) or self.multiple < 1:
            raise InputError(f"must be a whole number from 1, not {self.multiple!r}", where=f"{self.name}: multiple")
        if self.calibration is not None:
            object.__setattr__(self, "calibration", CalibrationData.of(self.calibration))

    @property
    def _exact_norms(self) -> bool:
        return True

    @abstractmethod
    def places(self, program: Program, chosen: Predicate) -> list[Axis | Refusal]:
        """The dimensions whose elements may go, each a place of its own, and what looks like one and is none."""

    def run(self, program: Program) -> bool:
        """Choose and cut.

        Raises:
            SelectionError: there is no place, or nothing can be removed at any; the reason names the node.
            InputError: calibration data is missing or does not fit.
        """
        if self.score != "magnitude" and self.calibration is None:
            raise InputError(
                f"the score {self.score!r} needs calibration data",
                where=f"{self.name}: calibration",
                hint="give calibration=[batch, ...]",
            )
        found = self.places(program, self.selected(program))
        refused = [item for item in found if isinstance(item, Refusal)]
        axes = [item for item in found if isinstance(item, Axis)]
        units = follow(program, axes, self.respects)
        scores: Callable[[int], float] | None = None
        gone: set[int] = set()
        removed: dict[str, str] = {}
        for axis in axes:
            labels = units.of(axis)
            free = sorted(set(labels.tolist()) - {0})
            if not free:
                reason = units.reason(units.labels[axis])
                refused.append(Refusal(self.name, axis.node.name, path_of(axis.node), reason, 2))
                continue
            count = self._count(len(free))
            if not count:
                continue
            scores = scores or unit_scores(units, self.score, self.calibration or (), self.loss, self.labels)
            gone.update(sorted(free, key=lambda unit: (scores(unit), unit))[:count])
            removed[path_of(axis.node) or axis.node.name] = f"{count} of {len(free)}"
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refused)
        if not axes or len(refused) == len(found):
            why = f": {refused[0].reason} (at %{refused[0].node})" if refused else ""
            raise SelectionError(f"nothing can be removed{why}", where=self.name)
        if not gone:
            return False
        before = cost_of(program)
        cut(program, units, gone, exact_norms=self._exact_norms)
        after = cost_of(program)
        program.notes["removed"] = removed
        program.notes["parameters"] = [before.parameters, after.parameters]
        program.notes["macs"] = [before.total.macs, after.total.macs]
        return True

    def _count(self, present: int) -> int:
        """How many of so many go."""
        stay = max(present - math.floor(present * self.fraction + 1e-9), 1)
        stay = min(math.ceil(stay / self.multiple) * self.multiple, present)
        return present - stay


@dataclass(frozen=True, kw_only=True)
class RemoveHeads(RemoveStructure):
    """Remove attention heads; with grouped queries a key head goes with all its query heads.

    ::

        %q = aten.linear(%x, %wq [64, 64])     8 heads of 8          %q = aten.linear(%x, %wq [48, 64])
        %k = aten.linear(%x, %wk [32, 64])     4 heads               %k = aten.linear(%x, %wk [24, 64])
        %a = graphwright.attention(%q', ...)                  ->     %a = graphwright.attention(%q', ...)
        %y = aten.linear(%a', %wo [64, 64])                          %y = aten.linear(%a', %wo [64, 48])

    What belongs to a head is followed through the graph: rows and columns of weights, biases, the sizes in views and
    splits; the caches of a decoding step have fewer heads afterwards. It does not fire where it cannot be followed, for
    instance on packed weights, or where the value of an attention leaves the program; the refusal names the node. An
    attention that is spelled out is found after FuseAttention.

    Attributes:
        where: attentions; all by default.
    """

    name: ClassVar[str] = "remove-heads"

    def places(self, program: Program, chosen: Predicate) -> list[Axis | Refusal]:
        """The heads of every attention."""
        nodes = [node for node in program.nodes if op_name(node) in ATTENTION and chosen(node)]
        if not nodes:
            raise SelectionError(
                "there is no attention", where=self.name, hint="FuseAttention makes one operator of one spelled out"
            )
        return [Axis(node, 1) for node in nodes if len(node.meta["val"].shape) == 4]


@dataclass(frozen=True, kw_only=True)
class RemoveChannels(RemoveStructure):
    """Remove channels of feed-forward blocks, gated or not.

    ::

        %g = aten.linear(%x, %wg [128, 64])                   %g = aten.linear(%x, %wg [96, 64])
        %u = aten.linear(%x, %wu [128, 64])           ->      %u = aten.linear(%x, %wu [96, 64])
        %y = aten.linear(silu(%g) * %u, %wd [64, 128])        %y = aten.linear(silu(%g) * %u, %wd [64, 96])

    It does not fire where a channel cannot be followed, for instance on packed weights; the refusal names the node.

    Attributes:
        where: the last linears of blocks; all by default.
    """

    name: ClassVar[str] = "remove-channels"

    def places(self, program: Program, chosen: Predicate) -> list[Axis | Refusal]:
        """What the last linear of every feed-forward block reads."""
        ends = [feed_forward_at(node) for node in program.nodes if node.op == "call_function" and chosen(node)]
        found: list[Axis | Refusal] = [Axis(end.x, len(end.x.meta["val"].shape) - 1) for end in ends if end is not None]
        if not found:
            raise SelectionError("there is no feed-forward block", where=self.name)
        return found


@dataclass(frozen=True, kw_only=True)
class RemoveHiddenDims(RemoveStructure):
    """Remove dimensions of the hidden states that all layers read and add to.

    ::

        %h = aten.embedding(%table [1000, 64], %ids)          %h = aten.embedding(%table [1000, 48], %ids)
        %n = graphwright.rms_norm(%h, %w, 1e-05)      ->      %n = graphwright.rms_norm(%h, %w', 1.33e-05)
        %q = aten.linear(%n, %wq [64, 64])                    %q = aten.linear(%n, %wq [64, 48])

    Embeddings, positions, norms, every linear that reads or makes hidden states and a tied head lose the same
    dimensions. What is left computes what the program computes with zeros in the removed places: an RMS norm over fewer
    features gets another epsilon and a scaled weight; a layer norm is spelled out (``exact_norms``).

    It does not fire where hidden states leave the program, as those of a bare encoder do, are read through a norm that
    is spelled out (FuseRMSNorm and FuseLayerNorm make one operator of it), or meet something that cannot be followed;
    the refusal names the node.

    Attributes:
        where: lookups that begin the hidden states; the widest table's by default.
        exact_norms: layer norms compute what they did of zeros in the removed places, spelled out in several
            operators. With ``False`` they are layer norms over what is left, which is faster and another function.
    """

    name: ClassVar[str] = "remove-hidden-dims"

    exact_norms: bool = True

    @property
    def _exact_norms(self) -> bool:
        return self.exact_norms

    def places(self, program: Program, chosen: Predicate) -> list[Axis | Refusal]:
        """What the largest table of embeddings gives."""
        lookups = [node for node in program.nodes if op_name(node) == "aten.embedding" and chosen(node)]
        if not lookups:
            raise SelectionError("there is no embedding that begins hidden states", where=self.name)
        # Tables of rotations, which steps look up too, are no parameters.
        lookups = [node for node in lookups if isinstance(_table(program, node), nn.Parameter)] or lookups
        first = max(lookups, key=lambda node: math.prod(node.args[0].meta["val"].shape))  # type: ignore[union-attr]
        return [Axis(first, len(first.meta["val"].shape) - 1)]


def _table(program: Program, lookup: fx.Node) -> object:
    table = lookup.args[0]
    return program.tensor(table) if isinstance(table, fx.Node) and table.op == "get_attr" else None
