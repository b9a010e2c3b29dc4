"""Patterns over the graph: match, check, rewrite, each refusal with its reason.

A pattern is a tree of small matchers, written as the expression it matches::

    x, w = any_("x"), weight("w")
    square = op("aten.pow.Tensor_Scalar", x, 2)
    pattern = op("aten.mul.Tensor", w, op("aten.mul.Tensor", x, op("aten.rsqrt", ...), commutative=True),
    commutative=True)

The same name (or the same matcher object) must match the same node everywhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphwright.ir import provenance
from graphwright.ir.arguments import arguments_of, schema_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter

Select = Callable[[fx.Node], bool]


@dataclass(frozen=True)
class Refusal:
    """Why a place that looked right was left alone.

    Attributes:
        rule: the rule or pass that refused.
        node: name of the node it looked at.
        path: module path of that node.
        reason: one sentence.
        depth: how many operators of the pattern had matched before it failed; larger means a nearer miss.
    """

    rule: str
    node: str
    path: str
    reason: str
    depth: int = 0

    def __str__(self) -> str:
        where = f"%{self.node} in {self.path}" if self.path else f"%{self.node}"
        return f"{self.rule}: {where}: {self.reason}"


@dataclass
class Match:
    """What a pattern bound: nodes and constants by name, and the inner nodes it covers."""

    program: Program
    root: fx.Node
    bound: dict[str, Any] = field(default_factory=dict)
    inner: list[fx.Node] = field(default_factory=list)
    _by_matcher: dict[int, fx.Node] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The bound value, or a default when an optional part was absent."""
        return self.bound.get(name, default)

    def node(self, name: str) -> fx.Node:
        """A bound node."""
        value = self.bound[name]
        assert isinstance(value, fx.Node)
        return value

    def escapes(self) -> fx.Node | None:
        """An inner node, other than the root, that something outside the match uses; rewriting then keeps it alive."""
        inside = set(self.inner)
        for node in self.inner:
            if node is not self.root and any(user not in inside for user in node.users):
                return node
        return None


@dataclass
class _Trial:
    """State of one attempt: bindings, and the nearest miss seen."""

    match: Match
    depth: int = 0
    miss: tuple[int, str] = (-1, "")

    def fail(self, reason: str) -> bool:
        if self.depth > self.miss[0]:
            self.miss = (self.depth, reason)
        return False

    def save(self) -> tuple[dict[str, Any], list[fx.Node], dict[int, fx.Node], int]:
        return dict(self.match.bound), list(self.match.inner), dict(self.match._by_matcher), self.depth

    def back_to(self, saved: tuple[dict[str, Any], list[fx.Node], dict[int, fx.Node], int]) -> None:
        self.match.bound, self.match.inner = dict(saved[0]), list(saved[1])
        self.match._by_matcher, self.depth = dict(saved[2]), saved[3]

    def bind(self, name: str | None, value: Any, then: Callable[[], bool]) -> bool:
        """Bind a name and match the rest; the name is free again if that fails."""
        if name is None:
            return then()
        if name in self.match.bound:
            present = self.match.bound[name]
            nodes = isinstance(value, fx.Node) or isinstance(present, fx.Node)
            same = present is value or (not nodes and bool(present == value))
            return then() if same else self.fail(f"two places for {name!r} hold different values")
        self.match.bound[name] = value
        if then():
            return True
        self.match.bound.pop(name, None)
        return False


class Matcher(ABC):
    """One part of a pattern."""

    @abstractmethod
    def accepts(self, value: Any, trial: _Trial, then: Callable[[], bool]) -> bool:
        """Try to match a node or constant, binding what it names, and then the rest of the pattern.

        Where there are several ways to match, the first one is taken with which the rest matches too.

        Args:
            value: what stands at this place.
            trial: the bindings so far; left as they were when this fails.
            then: matches the rest.
        """


@dataclass(frozen=True, eq=False)
class _Any(Matcher):
    name: str | None

    def accepts(self, value: Any, trial: _Trial, then: Callable[[], bool]) -> bool:
        if not isinstance(value, fx.Node):
            return trial.fail(f"{value!r} stands where a computed value is needed")
        return trial.bind(self.name, value, then)


@dataclass(frozen=True, eq=False)
class _Constant(Matcher):
    name: str | None
    kinds: tuple[type, ...]

    def accepts(self, value: Any, trial: _Trial, then: Callable[[], bool]) -> bool:
        if (isinstance(value, bool) and bool not in self.kinds) or not isinstance(value, self.kinds):
            found = f"%{value.name}" if isinstance(value, fx.Node) else repr(value)
            return trial.fail(f"{found} stands where the constant {self.name or ''} is needed")
        return trial.bind(self.name, value, then)


@dataclass(frozen=True, eq=False)
class _Weight(Matcher):
    name: str | None

    def accepts(self, value: Any, trial: _Trial, then: Callable[[], bool]) -> bool:
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            found = f"%{value.name}" if isinstance(value, fx.Node) else repr(value)
            return trial.fail(f"{found} is not a weight")
        return trial.bind(self.name, value, then)


@dataclass(frozen=True, eq=False)
class _Literal(Matcher):
    value: Any

    def accepts(self, value: Any, trial: _Trial, then: Callable[[], bool]) -> bool:
        if isinstance(value, fx.Node):
            return trial.fail(f"%{value.name} stands where the constant {self.value!r} is needed")
        if isinstance(self.value, bool) or isinstance(value, bool):
            same = value is self.value
        elif isinstance(self.value, float) or isinstance(value, float):
            same = _close(value, self.value)
        else:
            same = _plain(value) == _plain(self.value)
        return then() if same else trial.fail(f"the constant is {value!r}, not {self.value!r}")


@dataclass(frozen=True, eq=False)
class _Op(Matcher):
    ops: tuple[str, ...]
    operands: tuple[Matcher, ...]
    named: Mapping[str, Matcher]
    commutative: bool
    name: str | None

    def accepts(self, value: Any, trial: _Trial, then: Callable[[], bool]) -> bool:
        if not isinstance(value, fx.Node) or op_name(value) not in self.ops:
            found = f"%{value.name} = {op_name(value)}" if isinstance(value, fx.Node) else repr(value)
            return trial.fail(f"{found} stands where {' or '.join(self.ops)} is needed")
        seen = trial.match._by_matcher.get(id(self))
        if seen is not None:
            return then() if seen is value else trial.fail(f"%{value.name} is not %{seen.name}, which it should be")

        def covered() -> bool:
            trial.match._by_matcher[id(self)] = value
            trial.match.inner.append(value)
            return then()

        def named() -> bool:
            return trial.bind(self.name, value, covered)

        saved = trial.save()
        arguments = arguments_of(value)
        for operands in self._orders(value):
            trial.depth += 1
            if len(operands) < len(self.operands):
                trial.fail(f"%{value.name} has {len(operands)} operands, not {len(self.operands)}")
            else:
                pairs = [*zip(self.operands, operands), *((self.named[key], arguments.get(key)) for key in self.named)]
                if _all_accept(pairs, trial, named):
                    return True
            trial.back_to(saved)
        return False

    def _orders(self, node: fx.Node) -> Iterator[list[Any]]:
        arguments = arguments_of(node)
        schema = schema_of(node)
        names = [item.name for item in schema.arguments] if schema else [str(index) for index in range(len(node.args))]
        values = [arguments.get(name) for name in names]
        yield values
        if self.commutative and len(values) >= 2:
            yield [values[1], values[0], *values[2:]]


@dataclass(frozen=True, eq=False)
class _Either(Matcher):
    choices: tuple[Matcher, ...]

    def accepts(self, value: Any, trial: _Trial, then: Callable[[], bool]) -> bool:
        for choice in self.choices:
            saved = trial.save()
            if choice.accepts(value, trial, then):
                return True
            trial.back_to(saved)
        return False


@dataclass(frozen=True, eq=False)
class _Where(Matcher):
    inner: Matcher
    condition: Callable[[Any], bool]
    reason: str

    def accepts(self, value: Any, trial: _Trial, then: Callable[[], bool]) -> bool:
        def checked() -> bool:
            return then() if self.condition(value) else trial.fail(self.reason)

        return self.inner.accepts(value, trial, checked)


def _all_accept(pairs: Sequence[tuple[Matcher, Any]], trial: _Trial, then: Callable[[], bool]) -> bool:
    """Whether every matcher accepts its value, and the rest of the pattern matches as well."""
    if not pairs:
        return then()
    (matcher, value), rest = pairs[0], pairs[1:]
    return matcher.accepts(value, trial, lambda: _all_accept(rest, trial, then))


def _close(value: Any, wanted: Any) -> bool:
    """Numbers to six digits: what is written in a pattern has often been rounded in a model, or the other way round."""
    if not isinstance(value, int | float) or not isinstance(wanted, int | float):
        return False
    # A tolerance relative to infinity would let every number pass.
    near = math.isfinite(wanted) and abs(float(value) - float(wanted)) <= 1e-6 * abs(float(wanted))
    return value == wanted or near


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _matcher(value: Any) -> Matcher:
    return value if isinstance(value, Matcher) else _Literal(value)


def any_(name: str | None = None) -> Matcher:
    """Any computed value (node)."""
    return _Any(name)


def const(name: str | None = None, *kinds: type) -> Matcher:
    """A constant; by default an int or float."""
    return _Constant(name, kinds or (int, float))


def weight(name: str | None = None) -> Matcher:
    """A weight (``get_attr`` node)."""
    return _Weight(name)


def op(
    ops: str | Sequence[str], *operands: Any, commutative: bool = False, name: str | None = None, **named: Any
) -> Matcher:
    """A call of one of ``ops``; operands by schema position, further ones by schema name.

    Plain values match equal constants (floats to six digits). With ``commutative`` the first two operands may be
    swapped. Operands of the node beyond those given are not looked at; name them when they matter.
    """
    names = (ops,) if isinstance(ops, str) else tuple(ops)
    return _Op(
        names, tuple(map(_matcher, operands)), {key: _matcher(value) for key, value in named.items()}, commutative, name
    )


def either(*choices: Any) -> Matcher:
    """The first of several matchers that accepts."""
    return _Either(tuple(map(_matcher, choices)))


def maybe(ops: str | Sequence[str], inner: Any) -> Matcher:
    """``inner``, or one of the unary ``ops`` applied to it, such as a cast that may or may not be there."""
    matcher = _matcher(inner)
    return _Either((op(ops, matcher), matcher))


def where(inner: Matcher, condition: Callable[[Any], bool], reason: str) -> Matcher:
    """``inner``, under a condition on what it matched; ``reason`` says why not."""
    return _Where(inner, condition, reason)


def match_at(program: Program, pattern: Matcher, node: fx.Node) -> Match | tuple[int, str]:
    """Match a pattern with its root at a node; a miss gives how deep it got and why it stopped."""
    trial = _Trial(Match(program, node))
    return trial.match if pattern.accepts(node, trial, lambda: True) else trial.miss


class Rule(ABC):
    """One rewrite: where it applies, what forbids it, what it makes.

    Subclasses set :attr:`pattern` (or override :meth:`match`), and implement :meth:`rewrite`.
    """

    name: str = ""
    pattern: Matcher | Sequence[Matcher]

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        """A match rooted at the node, or the nearest miss."""
        best = (-1, "")
        for pattern in [self.pattern] if isinstance(self.pattern, Matcher) else self.pattern:
            found = match_at(program, pattern, node)
            if isinstance(found, Match):
                return found
            best = max(best, found)
        return best

    def check(self, match: Match) -> str | None:
        """The reason not to rewrite this match, or ``None``."""
        return None

    @abstractmethod
    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node | None:
        """Make the replacement of ``match.root``; ``None`` when the rule has replaced nodes itself."""


@dataclass(frozen=True)
class Outcome:
    """What rules did: how many places changed, and why others did not."""

    rewrites: int
    refusals: tuple[Refusal, ...]
    touched: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything was rewritten."""
        return self.rewrites > 0


def apply_rules(
    program: Program,
    rules: Sequence[Rule],
    select: Select | None = None,
    *,
    respects: frozenset[str] = frozenset(),
    near_miss: int = 2,
) -> Outcome:
    """Apply rules wherever they match, first rule first, each node once, all or nothing.

    Args:
        program: changed in place.
        rules: tried in order at every node.
        select: which root nodes may be rewritten.
        respects: tags; a match that covers a node with one of them is refused.
        near_miss: a partial match of at least this many operators is reported as a refusal.
    """
    refusals: list[Refusal] = []
    touched: list[str] = []
    with program.edit() as rewriter:
        for node in program.nodes:
            if node.op != "call_function" or node._erased:
                continue
            for rule in rules:
                found = rule.match(program, node)
                if isinstance(found, Match):
                    reason = _objection(rule, found, select, respects)
                    if reason is None:
                        _apply(rewriter, rule, found)
                        touched.append(node.name)
                        break
                    refusals.append(_refusal(rule, node, reason, len(found.inner) + 1))
                elif found[0] >= near_miss:
                    refusals.append(_refusal(rule, node, found[1], found[0]))
    return Outcome(len(touched), tuple(refusals), tuple(touched))


def _objection(rule: Rule, match: Match, select: Select | None, respects: frozenset[str]) -> str | None:
    if select is not None and not select(match.root):
        return "not selected by where= / ignore="
    for node in {match.root, *match.inner}:
        protected = provenance.tags_of(node) & respects
        if protected:
            return f"%{node.name} is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
    return rule.check(match)


def _apply(rewriter: Rewriter, rule: Rule, match: Match) -> None:
    new = rule.rewrite(rewriter, match)
    if new is not None and new is not match.root:
        rewriter.replace(match.root, new)


def _refusal(rule: Rule, node: fx.Node, reason: str, depth: int) -> Refusal:
    return Refusal(rule.name or type(rule).__name__, node.name, provenance.path_of(node), reason, depth)
