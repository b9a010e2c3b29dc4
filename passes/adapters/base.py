"""What every kind of adapter is: a value whose fields are its options, that says what it adds to a site."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.passes.adapters.layers import layer_site
from graphwright.passes.adapters.sites import Site, linear_sites
from graphwright.passes.selection import Predicate

if TYPE_CHECKING:
    from graphwright.passes.adapters.builder import Builder


@dataclass(frozen=True)
class Factor:
    """A tensor that an adapter brings.

    Attributes:
        value: what it starts as, in the dtype in which it is stored.
        trained: whether it becomes a parameter; others are constants, such as VeRA's projections.
        shared: the name under which several sites have it together; ``None`` for one of the site's own.
    """

    value: torch.Tensor
    trained: bool = True
    shared: str | None = None


@dataclass(frozen=True)
class Dense:
    """A site's weight in float64, as merging sees it.

    Attributes:
        weight: ``[out, in]`` of a linear, ``[rows, dim]`` of an embedding, ``[out, in / groups, …]`` of a
            convolution.
        bias: ``[out]``, or ``None``.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


class Draw:
    """Random numbers of one site: they depend on the seed and the site's path, not on what other sites there are."""

    def __init__(self, seed: int, path: str) -> None:
        self.seed = seed
        digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=7).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    def uniform(self, *shape: int, bound: float) -> torch.Tensor:
        """float32, uniform between ``-bound`` and ``bound``."""
        return torch.empty(shape).uniform_(-bound, bound, generator=self.generator)

    def kaiming_uniform(self, *shape: int) -> torch.Tensor:
        """float32, as ``torch.nn.init.kaiming_uniform_(a=√5)`` draws it: within ``1 / √fan_in``.

        Args:
            shape: the first size is the outputs', the others are the inputs'.
        """
        fan_in = 1
        for size in shape[1:]:
            fan_in *= size
        return self.uniform(*shape, bound=max(fan_in, 1) ** -0.5)

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        """float32, normal."""
        return torch.randn(shape, generator=self.generator) * std


@dataclass(frozen=True)
class AdapterKind(ABC):
    """One published shape of adapter. A kind is a frozen value: its fields are its options.

    Subclasses give the class variables and implement :meth:`factors` and :meth:`build`; one that can be merged
    implements :meth:`merged` too. Their docstring gives the formula, the source and the number of trained parameters.

    Class variables:

    - ``kind``: its name, lower case, as recipes and files have it.
    - ``unmergeable``: why it cannot become part of the weights; ``None`` when it can.
    - ``stored``: what it starts with is of the weight, rounded to the weight's dtype, so the same means that much.
    - ``identity``: whether the model computes the same right after it was put in; see also :meth:`starts_as_identity`.
    """

    kind: ClassVar[str]
    unmergeable: ClassVar[str | None] = None
    identity: ClassVar[bool] = True
    stored: ClassVar[bool] = False

    def sites(self, program: Program, selected: Predicate, *, head: bool) -> Iterator[Site | Refusal]:
        """The places of a program for this kind, each whole or with the reason why not; linears by default.

        Args:
            program: where.
            selected: what ``where=`` and ``ignore=`` leave.
            head: the output head too.
        """
        return linear_sites(program, selected, head=head)

    def site_at(self, program: Program, node: fx.Node) -> Site | str | None:
        """The place at one node, which merging writes into; why it cannot be adapted; ``None`` where there is none."""
        return layer_site(program, node)

    def check(self, site: Site) -> str | None:
        """Why the kind does not fit a site, or ``None``. Wrong options are errors, not reasons.

        Raises:
            InputError: an option does not go with the site's shape, such as a rank above its dimensions.
        """
        return None

    def settled(self, sites: Sequence[Site]) -> AdapterKind:
        """The kind with options filled in that follow from all its sites together, such as VeRA's shared sizes."""
        return self

    @abstractmethod
    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """The tensors of a site by name, as they start."""

    def like(self, site: Site) -> dict[str, Factor]:
        """What a saved adapter must have at a site, and the values of tensors that are not saved (:meth:`drawn`)."""
        return self.factors(site, Draw(0, site.path))

    def drawn(self) -> frozenset[str]:
        """Tensors that are not saved, because :meth:`factors` gives the same ones again from the kind's options."""
        return frozenset()

    @abstractmethod
    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """Put the nodes in, by ``builder.adapt`` (users of a value read another) or ``builder.feed`` (a node does)."""

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """Weight and bias, in float64, with which the bare site computes what it does with the adapter.

        Args:
            site: where.
            dense: as they are without.
            factors: the tensors in float64.
        """
        raise InputError(f"{self.kind} cannot be merged: {self.unmergeable}", where=site.path)

    def starts_as_identity(self) -> bool:
        """Whether inserting it with these options leaves the function as it was, which then is verified."""
        return self.identity

    def options(self) -> dict[str, Any]:
        """Every field as a JSON value."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}


def whole(kind: str, option: str, value: object, *, least: int = 1) -> None:
    """Check an option that is a whole number.

    Raises:
        InputError: it is not, or is less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"must be an integer, {least} or more, not {value!r}", where=f"{kind}: {option}")


def finite(kind: str, option: str, value: object, *, positive: bool = False) -> None:
    """Check an option that is a number.

    Raises:
        InputError: it is not a finite number, or not positive where it must be.
    """
    good = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < float("inf")
    if not good or (positive and not value > 0):  # type: ignore[operator]
        words = "a positive number" if positive else "a finite number"
        raise InputError(f"must be {words}, not {value!r}", where=f"{kind}: {option}")


def check_rank(kind: str, rank: int, site: Site) -> None:
    """Check a rank against a site.

    Raises:
        InputError: it is above the smaller side of the weight, where it would only cost.
    """
    most = min(site.features)
    if rank > most:
        raise InputError(
            f"rank {rank} is above the smaller side of its weight {list(site.features)}",
            where=f"{kind} at {site.path}",
            hint=f"give rank={most} or less, or leave the module out with ignore=",
        )
