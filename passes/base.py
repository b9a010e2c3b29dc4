"""The base class of every pass."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Outcome, Refusal, Rule, apply_rules
from graphwright.ir.program import Program
from graphwright.passes import selection
from graphwright.passes.contract import Approximate, Contract, Exact
from graphwright.passes.selection import Predicate, Where

_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One rewrite of a program. A pass is a frozen value: its fields are its options.

    Subclasses are frozen, keyword-only dataclasses with a kebab-case :attr:`name` and :meth:`run`. The docstring shows
    the rewrite as IR before and after and lists when the pass does not fire.

    Declarations (class variables):

    - ``contract``: what the pass promises; the pipeline holds it to that.
    - ``after`` / ``before``: names of passes it must follow / precede when both are used.
    - ``needs``: names of passes that must have run before it.
    - ``not_after``: names of passes after which it cannot run -> the reason, with the order that works.
    - ``respects``: tags of nodes it leaves alone.
    - ``judges_history``: whether ``run`` itself refuses what an earlier pass has made impossible, by the nodes that it
      meets; ``not_after`` then counts among passes given together, before anything runs, not for what was done before.

    Attributes:
        where: nodes it may touch (see :mod:`graphwright.passes.selection`); all by default.
        ignore: nodes it must not touch.
        max_error: for approximate passes: largest relative error allowed at any output, against the original.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract] = Exact()
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    not_after: ClassVar[Mapping[str, str]] = {}
    respects: ClassVar[frozenset[str]] = frozenset({"adapter"})
    judges_history: ClassVar[bool] = False

    where: Where = None
    ignore: Where = None
    max_error: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("name")
        if name is not None and not _KEBAB.fullmatch(name):
            raise InputError(f"a pass name is kebab-case, not {name!r}", where=cls.__qualname__)

    def __post_init__(self) -> None:
        selection.check(self.where, "where")
        selection.check(self.ignore, "ignore")
        if self.max_error is None:
            return
        if not isinstance(self.contract, Approximate):
            raise InputError("is only for approximate passes", where=f"{self.name}: max_error", hint="remove it")
        if isinstance(self.max_error, bool) or not isinstance(self.max_error, int | float) or not self.max_error > 0:
            raise InputError(f"must be a positive number, not {self.max_error!r}", where=f"{self.name}: max_error")

    @abstractmethod
    def run(self, program: Program) -> bool:
        """Rewrite the program in place; return whether anything changed. Change it only inside ``program.edit()``."""

    def effective_contract(self) -> Contract:
        """The contract with the user's budget put in."""
        if isinstance(self.contract, Approximate) and self.max_error is not None:
            return dataclasses.replace(self.contract, max_relative_error=float(self.max_error))
        return self.contract

    def conflicts(self) -> Mapping[str, str]:
        """``not_after`` with the options taken into account."""
        return self.not_after

    def selected(self, program: Program) -> Predicate:
        """The nodes this pass may touch.

        Raises:
            SelectionError: ``where`` selects nothing.
        """
        return selection.predicate(program, self.where, self.ignore)

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON values."""
        found: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            if not item.init:
                continue  # it follows from the others
            value = getattr(self, item.name)
            default = item.default if item.default is not dataclasses.MISSING else None
            if item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
            if value != default:
                found[item.name] = as_json(value)
        return found

    def __call__(self, program: Program) -> bool:
        """Run the pass alone, unverified; all or nothing."""
        before = program.snapshot()
        program.replacements, program.notes = {}, {}
        try:
            return self.run(program)
        except BaseException:
            program.restore(before)
            raise

    def refusals(self, program: Program) -> tuple[Refusal, ...]:
        """Why places that looked right would be left alone, nearest misses first; the program is not changed."""
        trial = program.clone()
        self(trial)
        found: tuple[Refusal, ...] = tuple(trial.notes.get("refusals", ()))
        return tuple(sorted(found, key=lambda refusal: -refusal.depth))


@dataclass(frozen=True, kw_only=True)
class RulePass(Pass):
    """A pass made of rules: pattern, check, rewrite, tried at every node."""

    near_miss: ClassVar[int] = 2

    @abstractmethod
    def rules(self, program: Program) -> Sequence[Rule]:
        """The rules, in the order in which they are tried."""

    def run(self, program: Program) -> bool:
        """Apply the rules; counts and refusals go to ``program.notes``."""
        outcome = self.apply(program)
        return outcome.changed

    def apply(self, program: Program) -> Outcome:
        """Apply the rules and note what came of it."""
        outcome = apply_rules(
            program, self.rules(program), self.selected(program), respects=self.respects, near_miss=self.near_miss
        )
        program.notes["rewrites"] = program.notes.get("rewrites", 0) + outcome.rewrites
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *outcome.refusals)
        return outcome


def as_json(value: Any) -> Any:
    """An option as JSON values: what its ``as_option()`` says where it has one; functions by their names."""
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Pass):
        return {"name": value.name, **value.options()}
    if hasattr(type(value), "as_option"):
        return value.as_option()
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: as_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
    return getattr(value, "__qualname__", repr(value))
