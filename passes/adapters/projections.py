"""R-LoDA's and S-LoDA's base: the projections of an attention, approximated together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from graphwright.ir.errors import InputError, SelectionError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import PATH, add_tags, path_of, tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.adapters.base import finite, whole
from graphwright.passes.adapters.blocks import projections_at
from graphwright.passes.adapters.sites import ADAPTER, Site
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Retrain
from graphwright.passes.selection import Predicate

# tags of the linears that the pass makes, and of those whose weights it thins out
LOW_RANK, LOW_RANK_INPUT, MASKED = "low-rank", "low-rank-input", "masked"


# Of the published fractions (0.6, 0.5, 0.4), the middle one.
_KEPT = 0.5


@dataclass(frozen=True, kw_only=True)
class ReduceProjections(Pass):
    """Approximate ``W = [Wq; Wk; Wv]`` of each attention as one matrix (Liu et al., "LoDA", R-LoDA and S-LoDA).

    With ``rank=R``, by its best approximation of rank R, ``W ≈ U D``::

        %query = aten.linear(%x, %q_proj_weight, %q_proj_bias)          the same for key and value
        ->
        %low = aten.linear(%x, %low_rank_weight)                        D [R, in]
        %query = aten.linear(%low, %q_proj_up_weight, %q_proj_bias)     rows of U [out, R]; the same for key and value

    which takes ``R (in + out)`` products a token where the whole takes ``in · out``. With ``keep=s``, the fraction s of
    the numbers of W with the largest magnitudes stays and the others become 0; the graph stays as it is. The nodes are
    tagged ``masked``, and the zeros stay zeros as long as these weights do not train, which :class:`InsertAdapters`
    sees to.

    The function changes: put LoDA in and train it. R-LoDA+ is::

        [ReduceProjections(rank=300), InsertAdapters(LoDA(rank=4, outer="activation"), where="*(query|value)")]

    The report has, of each attention, the fraction of W's energy (squared norm) that is kept, and the products that
    are left for a token.

    It does not fire on

    - attentions whose query, key and value do not come from one value by one linear each, or by one for all;
    - weights that are packed, computed, or read by something else;
    - linears that have an adapter beside them: this goes first;
    - projections that it has approximated before.

    Attributes:
        rank: R, less than where the parts take as many products as the whole.
        keep: s, between 0 and 1; 0.5 where there is no rank either.
    """

    name: ClassVar[str] = "reduce-projections"
    contract: ClassVar[Contract] = Retrain()
    before: ClassVar[tuple[str, ...]] = ("insert-adapters", "quantize-linears")

    rank: int | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.keep is not None:
            raise InputError("takes one of rank= and keep=", where=self.name)
        if self.rank is None and self.keep is None:
            object.__setattr__(self, "keep", _KEPT)
        if self.rank is not None:
            whole(self.name, "rank", self.rank)
        if self.keep is not None:
            finite(self.name, "keep", self.keep, positive=True)
            if self.keep >= 1:
                raise InputError(f"must be less than 1, not {self.keep!r}", where=f"{self.name}: keep")

    def run(self, program: Program) -> bool:
        """Approximate every attention's projections.

        Raises:
            InputError: the rank saves nothing.
            SelectionError: there is no attention whose projections it can approximate.
        """
        selected = self.selected(program)
        refusals: list[Refusal] = []
        groups: dict[tuple[fx.Node | None, ...], list[tuple[Site, ...]]] = {}
        known = False
        for node in program.nodes:
            found = projections_at(program, node)
            if isinstance(found, tuple) and any(
                tags_of(site.node) & {LOW_RANK, LOW_RANK_INPUT, MASKED} for site in found
            ):
                known = True
                continue
            reason = found if isinstance(found, str) else _objection(found, selected, self.respects) if found else None
            if reason is not None:
                refusals.append(Refusal(self.name, node.name, path_of(node), reason, 2))
            elif isinstance(found, tuple):
                places = groups.setdefault(tuple(site.weight for site in found), [])
                if found not in places:
                    places.append(found)
        for weights, places in list(groups.items()):
            reader = _other_reader(weights, places)
            if reader is not None:
                first = places[0][0].node
                reason = f"the weight is also read by %{reader.name}"
                refusals.append(Refusal(self.name, first.name, path_of(first), reason, 3))
                del groups[weights]
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        if not groups and not known:
            raise SelectionError(
                "there are no projections to approximate",
                where=f"{self.name}: where={self.where!r}",
                hint=str(refusals[0]) if refusals else "the program has no attention as one operator (FuseAttention)",
            )
        energy: dict[str, float] = {}
        products = 0
        with program.edit() as rewriter:
            for places in groups.values():
                kept, left = self._reduce(rewriter, places)
                energy[places[0][0].path] = kept
                products += left * len(places)
        if energy:
            mean = sum(energy.values()) / len(energy)
            program.notes.update(kept_energy=energy, mean_kept_energy=mean, products_per_token=products)
        return bool(groups)

    def _reduce(self, rewriter: Rewriter, places: Sequence[tuple[Site, ...]]) -> tuple[float, int]:
        """Approximate the weights of one attention, or of several that share them."""
        program, sites = rewriter.program, places[0]
        stored = [program.tensor(site.weight).detach() for site in sites if site.weight is not None]
        parts = [tensor.t() if site.transposed else tensor for site, tensor in zip(sites, stored, strict=True)]
        whole_weight = torch.cat([part.double() for part in parts])
        total = float(whole_weight.square().sum())
        if self.rank is None:
            assert self.keep is not None
            mask = _largest(whole_weight, round(self.keep * whole_weight.numel()))
            kept = float(whole_weight[mask].square().sum())
            for site, tensor, part in zip(sites, stored, mask.split([len(part) for part in parts]), strict=True):
                assert site.weight is not None
                rewriter.rebind(site.weight, torch.where(part.t() if site.transposed else part, tensor, 0))
            for site in (site for group in places for site in group):
                add_tags(site.node, (MASKED,))
            return _fraction(kept, total), int(mask.sum())
        out, into = whole_weight.shape
        if self.rank * (out + into) >= out * into:
            raise InputError(
                f"rank {self.rank} takes {self.rank * (out + into)} products a token, the weight [{out}, {into}] "
                f"{out * into}",
                where=f"{self.name} at {sites[0].path}",
                hint=f"give rank={(out * into - 1) // (out + into)} or less",
            )
        # The right singular vectors are eigenvectors of the smaller WᵀW; float64 leaves their squares enough digits.
        vectors = torch.linalg.eigh(whole_weight.t() @ whole_weight).eigenvectors[:, -self.rank :].flip(1)
        upper = whole_weight @ vectors
        self._take_apart(rewriter, places, vectors.t(), list(upper.split([len(part) for part in parts])))
        return _fraction(float(upper.square().sum()), total), self.rank * (out + into)

    def _take_apart(
        self, rewriter: Rewriter, places: Sequence[tuple[Site, ...]], down: torch.Tensor, ups: list[torch.Tensor]
    ) -> None:
        sites = places[0]
        parent = ".".join(_owner(sites[0]).split(".")[:-1])
        lower = _weight(rewriter, f"{parent}.low_rank.weight".lstrip("."), down, sites[0])
        uppers = [
            _weight(rewriter, f"{_owner(site)}.up.weight".lstrip("."), up, site)
            for site, up in zip(sites, ups, strict=True)
        ]
        for group in places:
            first = min(group, key=lambda site: site.node)
            low = rewriter.call("aten.linear", first.x, lower, None, like=first.node, tags=(LOW_RANK_INPUT,))
            low.meta[PATH] = f"{parent}.low_rank".lstrip(".")
            for site, up in zip(group, uppers, strict=True):
                new = rewriter.call("aten.linear", low, up, site.bias, like=site.node, tags=(LOW_RANK,))
                rewriter.replace(site.node, new, equivalent=False)


def behind_reduction(site: Site) -> Site | str:
    """A linear as a place whose input is that of the whole, where :class:`ReduceProjections` took it apart.

    Returns:
        the place itself for other linears; why not, for the part that all have together.
    """
    tags = tags_of(site.node)
    if LOW_RANK_INPUT in tags:
        return "it is the part of low rank that query, key and value have together"
    if LOW_RANK not in tags:
        return site
    low = site.x
    while LOW_RANK_INPUT not in tags_of(low):  # below adapters
        below = low.args[0]
        assert isinstance(below, fx.Node)
        low = below
    x = low.args[0]
    assert isinstance(x, fx.Node)
    return dataclasses.replace(
        site, x=x, input_name="", weight=None, features=(site.features[0], int(x.meta["val"].shape[-1]))
    )


def _objection(sites: tuple[Site, ...], selected: Predicate, respected: frozenset[str]) -> str | None:
    for site in sites:
        name = site.node.name
        if site.weight is None:
            return f"the weight of %{name} is packed: this goes before quantisation"
        if not selected(site.node):
            return f"%{name} is not selected by where= / ignore="
        if tags_of(site.node) & respected or any(ADAPTER in tags_of(user) for user in site.node.users):
            return f"an adapter lies beside %{name}: this goes before adapters"
    return None


def _other_reader(weights: Sequence[fx.Node | None], places: Sequence[tuple[Site, ...]]) -> fx.Node | None:
    inside = {site.node for group in places for site in group}
    return next((user for weight in weights if weight for user in weight.users if user not in inside), None)


def _largest(weight: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of exactly as many numbers as are wanted, the largest by magnitude."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().topk(count).indices] = True
    return mask.view_as(weight)


def _fraction(part: float, total: float) -> float:
    return part / total if total > 0 and math.isfinite(total) else 1.0


def _owner(site: Site) -> str:
    assert site.weight is not None
    return str(site.weight.target).rpartition(".")[0]


def _weight(rewriter: Rewriter, name: str, values: torch.Tensor, site: Site) -> fx.Node:
    like: Any = rewriter.program.tensor(site.weight) if site.weight is not None else None
    stored = values.to(like.dtype).contiguous()
    if isinstance(like, nn.Parameter):
        stored = nn.Parameter(stored, like.requires_grad)
    return rewriter.weight(name, stored, like=site.node)
