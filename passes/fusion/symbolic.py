"""Symbolic values of single tensor elements: what a mask holds at batch b, head h, query i and key j.

Integers are linear forms in the indices and the sizes, truths are conditions on them, and everything that is not
understood is an :class:`Element`: a node at an index, equal only to itself. A statement made with these is therefore
true at all sizes and for all inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

# A value that branches more often than this is left as an element.
_MOST_BRANCHES = 16


@dataclass(frozen=True)
class Linear:
    """``constant + sum(coefficient * name)`` over indices (``i``) and sizes (``#s0``), in canonical order."""

    terms: tuple[tuple[str, int], ...] = ()
    constant: int = 0

    def __add__(self, other: Linear | int) -> Linear:
        if isinstance(other, int):
            return Linear(self.terms, self.constant + other)
        total = dict(self.terms)
        for name, coefficient in other.terms:
            total[name] = total.get(name, 0) + coefficient
        terms = tuple(sorted((name, value) for name, value in total.items() if value))
        return Linear(terms, self.constant + other.constant)

    def __sub__(self, other: Linear | int) -> Linear:
        return self + (-other if isinstance(other, int) else other * -1)

    def __mul__(self, factor: int) -> Linear:
        if factor == 0:
            return Linear()
        return Linear(tuple((name, value * factor) for name, value in self.terms), self.constant * factor)

    @property
    def is_constant(self) -> bool:
        """Whether it is a plain number."""
        return not self.terms

    @property
    def names(self) -> frozenset[str]:
        """The indices and sizes in it."""
        return frozenset(name for name, _ in self.terms)


def index(name: str) -> Linear:
    """The linear form that is one index."""
    return Linear(((name, 1),))


def size_of(size: Any) -> Linear:
    """A size, or an integer computed from sizes, as a linear form.

    Sizes of dimensions are written ``#s0`` and are at least 1; of other expressions (``?Max(0, s0 - 4)``) nothing is
    known.
    """
    if not isinstance(size, torch.SymInt):
        return Linear((), int(size))
    expression: Any = size.node.expr
    terms: list[tuple[str, int]] = []
    constant = 0
    for monomial, coefficient in expression.expand().as_coefficients_dict().items():
        if not coefficient.is_Integer:
            return Linear(((f"?{expression}", 1),))
        if monomial.is_number:
            constant += int(coefficient * monomial)
        else:
            positive = all(factor.is_Symbol for factor in monomial.as_powers_dict())
            terms.append((f"{'#' if positive else '?'}{monomial}", int(coefficient)))
    return Linear(tuple(sorted(terms)), constant)


@dataclass(frozen=True)
class Number:
    """A float constant."""

    value: float


@dataclass(frozen=True)
class Element:
    """The element of a node's tensor at an index; nothing else is known of it."""

    node: fx.Node
    index: tuple[Linear, ...]


@dataclass(frozen=True)
class Known:
    """A truth that holds, or does not, for every element."""

    value: bool


@dataclass(frozen=True)
class AtLeastZero:
    """``form >= 0``."""

    form: Linear


@dataclass(frozen=True)
class Holds:
    """An element that is true, or not zero."""

    element: Element
    wanted: bool = True


@dataclass(frozen=True)
class Every:
    """All of several truths, none of them an ``Every``."""

    parts: frozenset[Truth]


@dataclass(frozen=True)
class Some:
    """At least one of several truths, none of them a ``Some``."""

    parts: frozenset[Truth]


Truth = Known | AtLeastZero | Holds | Every | Some


@dataclass(frozen=True)
class Choice:
    """``yes`` where the condition holds, otherwise ``no``."""

    condition: Truth
    yes: Value
    no: Value


@dataclass(frozen=True)
class Sum:
    """A sum of floats that is no constant."""

    parts: tuple[Value, ...]


Value = Linear | Number | Element | Truth | Choice | Sum

Index = tuple[Linear, ...]
# Reads one kind of operator: (elements, node, its arguments, index of the element) -> the element, or None.
Handler = Callable[[Any, fx.Node, dict[str, Any], Index], Value | None]

TRUE, FALSE = Known(True), Known(False)


def every(*truths: Truth) -> Truth:
    """The conjunction."""
    parts: set[Truth] = set()
    for truth in truths:
        if truth == FALSE:
            return FALSE
        parts.update(truth.parts if isinstance(truth, Every) else () if truth == TRUE else (truth,))
    if any(negation(part) in parts for part in parts if not isinstance(part, Some)):
        return FALSE
    return parts.pop() if len(parts) == 1 else Every(frozenset(parts)) if parts else TRUE


def some(*truths: Truth) -> Truth:
    """The disjunction."""
    return negation(every(*map(negation, truths)))


def negation(truth: Truth) -> Truth:
    """The contrary, with negations pushed to the leaves."""
    if isinstance(truth, Known):
        return FALSE if truth.value else TRUE
    if isinstance(truth, AtLeastZero):
        return AtLeastZero(truth.form * -1 - 1)
    if isinstance(truth, Holds):
        return Holds(truth.element, not truth.wanted)
    turned = [negation(part) for part in truth.parts]
    if isinstance(truth, Some):
        return every(*turned)
    flat: set[Truth] = set()
    for part in turned:
        flat.update(part.parts if isinstance(part, Some) else (part,))
    return Some(frozenset(flat))


def conjuncts(truth: Truth) -> tuple[Truth, ...]:
    """The truths that must all hold."""
    if truth == TRUE:
        return ()
    return tuple(sorted(truth.parts, key=str)) if isinstance(truth, Every) else (truth,)


def choice(condition: Truth, yes: Value, no: Value) -> Value:
    """``Choice``, simplified where the condition is known or does not matter."""
    if isinstance(condition, Known):
        return yes if condition.value else no
    yes, no = given(yes, condition), given(no, negation(condition))
    return yes if yes == no else Choice(condition, yes, no)


def given(value: Value, truth: Truth) -> Value:
    """The value, knowing that a truth holds."""
    if not isinstance(value, Choice):
        return value
    if value.condition == truth:
        return given(value.yes, truth)
    if value.condition == negation(truth):
        return given(value.no, truth)
    return choice(value.condition, given(value.yes, truth), given(value.no, truth))


def truth_of(value: Value) -> Truth | None:
    """Whether a value is not zero; ``None`` when that is not a truth about indices and elements."""
    if isinstance(value, Truth):
        return value
    if isinstance(value, Number):
        return Known(value.value != 0)
    if isinstance(value, Element):
        return Holds(value)
    if isinstance(value, Linear):
        return Known(value.constant != 0) if value.is_constant else None
    if isinstance(value, Choice):
        yes, no = truth_of(value.yes), truth_of(value.no)
        if yes is None or no is None:
            return None
        return some(every(value.condition, yes), every(negation(value.condition), no))
    return None


def branches(value: Value) -> int:
    """How many values a value may come to."""
    return branches(value.yes) + branches(value.no) if isinstance(value, Choice) else 1


def through_choices(function: Callable[..., Value | None], *operands: Value) -> Value | None:
    """Apply a function of plain values to values that branch, branch by branch."""
    total = 1
    for operand in operands:
        total *= branches(operand)
    if total > _MOST_BRANCHES:
        return None
    for place, operand in enumerate(operands):
        if isinstance(operand, Choice):
            sides = []
            for branch in (operand.yes, operand.no):
                side = through_choices(function, *operands[:place], branch, *operands[place + 1 :])
                if side is None:
                    return None
                sides.append(side)
            return choice(operand.condition, *sides)
    return function(*operands)


def indices_of(value: Value) -> frozenset[str]:
    """The names a value depends on."""

    def of_all(values: Iterable[Any]) -> frozenset[str]:
        return frozenset[str]().union(*(indices_of(item) for item in values))

    if isinstance(value, Linear):
        return value.names
    if isinstance(value, AtLeastZero):
        return value.form.names
    if isinstance(value, Element):
        return of_all(value.index)
    if isinstance(value, Holds):
        return indices_of(value.element)
    if isinstance(value, Every | Some | Sum):
        return of_all(value.parts)
    if isinstance(value, Choice):
        return of_all((value.condition, value.yes, value.no))
    return frozenset()
