"""How it is decided which weights of a linear go, and what the others become."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.sparsity import SparsityPattern
from graphwright.passes.calibration import Observed
from graphwright.passes.quantization.loss import Loss

# method -> module of this package and class
METHODS: dict[str, tuple[str, str]] = {
    "magnitude": ("methods", "Magnitude"),
    "sparsegpt": ("sparsegpt", "SparseGpt"),
    "wanda": ("methods", "Wanda"),
}


@dataclass(frozen=True)
class Norms:
    """What is known of a linear's inputs where products between features are not needed.

    Attributes:
        squares: ``Σ x²`` of every feature over all rows, ``[in]`` float32.
        count: how many rows there were.
    """

    squares: torch.Tensor
    count: int

    @classmethod
    def over(cls, batches: Iterable[torch.Tensor]) -> Norms:
        """Over batches of rows ``[n, in]`` float32; at least one batch."""
        total, count = torch.zeros(()), 0
        for rows in batches:
            total = total + rows.square().sum(0, dtype=torch.float64)
            count += len(rows)
        return cls(total.to(torch.float32), count)

    def __add__(self, other: Norms) -> Norms:
        return Norms(self.squares + other.squares, self.count + other.count)


@dataclass(frozen=True)
class Pruned:
    """A weight that was pruned.

    Attributes:
        weight: ``[out, in]`` float32, 0 where it was pruned.
        loss: of the outputs for methods that look at second moments, of the weight elsewhere.
    """

    weight: torch.Tensor
    loss: Loss = field(default_factory=Loss)


@dataclass(frozen=True)
class PruningMethod(ABC):
    """A method; its fields are its options.

    Attributes:
        method: its name in recipes and reports.
        needs: what it looks at besides the weight: ``"nothing"``, ``"norms"`` or ``"moments"`` of the inputs.
    """

    method: ClassVar[str]
    needs: ClassVar[str] = "nothing"

    @abstractmethod
    def prune(
        self,
        weight: torch.Tensor,
        pattern: SparsityPattern,
        sparsity: float,
        inputs: Observed | Norms | None,
        *,
        fixed: bool,
    ) -> Pruned:
        """Prune a weight.

        Args:
            weight: ``[out, in]`` float32, finite, of a shape that the pattern divides; it is not written into.
            pattern: of the zeros.
            sparsity: fraction that goes; the pattern's own for N:M.
            inputs: what the method needs; a moment may be overwritten.
            fixed: what is 0 now was pruned before and goes first.

        Raises:
            InputError: the inputs do not serve; without ``where``, which the caller knows.
        """

    def as_option(self) -> dict[str, Any]:
        """As it stands in recipes and reports: ``method`` and :meth:`options`."""
        return {"method": self.method, **self.options()}

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if getattr(self, item.name) != item.default
        }


@dataclass(frozen=True)
class Magnitude(PruningMethod):
    """The weights of each linear with the least magnitude go; no data is looked at."""

    method: ClassVar[str] = "magnitude"

    def prune(
        self,
        weight: torch.Tensor,
        pattern: SparsityPattern,
        sparsity: float,
        inputs: Observed | Norms | None,
        *,
        fixed: bool,
    ) -> Pruned:
        """See :class:`Magnitude`; blocks are compared by the sum of their magnitudes."""
        return without(weight, pattern.mask(scored(weight, None, fixed=fixed), sparsity))


@dataclass(frozen=True)
class Wanda(PruningMethod):
    """The weights of each output with the least ``|w_ij| ‖x_j‖₂`` go (Sun et al. 2023, "A Simple and Effective Pruning
    Approach for Large Language Models", equation 1 and section 3).

    Attributes:
        by_row: compare within the weights of one output, as published; else within the whole linear.
    """

    method: ClassVar[str] = "wanda"
    needs: ClassVar[str] = "norms"
    by_row: bool = True

    def prune(
        self,
        weight: torch.Tensor,
        pattern: SparsityPattern,
        sparsity: float,
        inputs: Observed | Norms | None,
        *,
        fixed: bool,
    ) -> Pruned:
        """See :class:`Wanda`; blocks are compared by the sums of their scores."""
        assert inputs is not None
        scores = scored(weight, squares_of(inputs), fixed=fixed)
        return without(weight, pattern.mask(scores, sparsity, by_row=self.by_row))


def squares_of(inputs: Observed | Norms) -> torch.Tensor:
    """``Σ x²`` of every feature, ``[in]`` float32."""
    return inputs.squares if isinstance(inputs, Norms) else inputs.moment.diagonal()


def scored(weight: torch.Tensor, squares: torch.Tensor | None, *, fixed: bool) -> torch.Tensor:
    """``|w_ij| ‖x_j‖₂``, or ``|w_ij|`` without inputs, ``[out, in]`` float32; below 0 for what was pruned before."""
    found = weight.abs() if squares is None else weight.abs() * squares.clamp_min(0).sqrt()
    return found.masked_fill_(weight == 0, -1.0) if fixed else found


def without(weight: torch.Tensor, mask: torch.Tensor) -> Pruned:
    """A weight with nothing but zeros where the mask ``[out, in]`` is not set."""
    kept = torch.where(mask, weight, 0)
    size, left = (float(torch.linalg.vector_norm(each, dtype=torch.float64)) ** 2 for each in (weight, kept))
    return Pruned(kept, Loss(max(size - left, 0.0), size))


def method_of(given: object, *, where: str) -> PruningMethod:
    """A method by its name, with the options' defaults, or as it is.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(given, PruningMethod):
        return given
    if given not in METHODS or not isinstance(given, str):
        near = difflib.get_close_matches(str(given), METHODS, n=1)
        raise InputError(
            f"must be one of {', '.join(map(repr, METHODS))} or a PruningMethod, not {given!r}",
            where=where,
            hint=f"did you mean {near[0]!r}?" if near else "a method with options is made like SparseGpt(damping=0.1)",
        )
    module, name = METHODS[given]
    found: type[PruningMethod] = getattr(importlib.import_module(f"graphwright.passes.sparsity.{module}"), name)
    return found()
