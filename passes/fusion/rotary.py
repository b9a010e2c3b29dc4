"""Spelled-out rotary position embeddings into one operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Match, Rule
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import RulePass
from graphwright.passes.cleanup.views import permutation
from graphwright.passes.fusion.heads import given_back
from graphwright.passes.fusion.layout import shared_call
from graphwright.passes.fusion.matching import CASTS, drop_assertions, leak, tensor_type, without_casts
from graphwright.passes.fusion.spans import Span, bases_of, is_last, joined, span_of, width_of

_TARGET = "graphwright.rotary_embedding"
_SPLITS = (
    "aten.split.Tensor",
    "aten.split_with_sizes",
    "aten.chunk",
    "aten.unsafe_chunk",
    "aten.tensor_split.sections",
)
_FLATTENS = ("aten.flatten.using_ints", "aten.view", "aten.reshape", "aten._unsafe_view")


@dataclass(frozen=True, kw_only=True)
class FuseRotaryEmbedding(RulePass):
    """Make one ``graphwright.rotary_embedding`` of a spelled-out rotation (Su et al. 2021, RoFormer).

    Before (Llama)::

        %cosines = aten.unsqueeze(%cos, 1)
        %sines = aten.unsqueeze(%sin, 1)
        %straight = aten.mul.Tensor(%x, %cosines)
        %low = aten.slice.Tensor(%x, 3, 0, 32)
        %high = aten.slice.Tensor(%x, 3, 32, 9223372036854775807)
        %negative = aten.neg(%high)
        %turned = aten.cat([%negative, %low], -1)
        %crossed = aten.mul.Tensor(%turned, %sines)
        %y = aten.add.Tensor(%straight, %crossed)

    After::

        %y = graphwright.rotary_embedding(%x, %cos, %sin, False)

    Pairs may be the two halves of the head dim or neighbours (``stack`` and ``flatten``), cut out by slices, ``chunk``
    or ``split``. The two halves may be rotated apart, by ``cos`` and ``sin`` of half the width. A rotation of the
    leading features that is put together with the others (partial rotary) is taken in, as are casts to a wider dtype
    around it. Where heads come after positions (``[B, S, H, D]``), the operand is transposed.

    Does not fire when

    - the halves are not those of the value that is multiplied by ``cos``;
    - ``x`` has other than four axes, or ``cos`` varies by head;
    - ``cos`` or ``sin`` is as long as another number of positions, or is broadcast along them;
    - the result has another dtype than ``x``, and is not cast back;
    - a value in between, such as the turned half, is used elsewhere too.
    """

    name: ClassVar[str] = "fuse-rotary-embedding"
    near_miss: ClassVar[int] = 3

    def rules(self, program: Program) -> Sequence[Rule]:
        """The rotation as a sum and by halves, the features beside it, and the cast back."""
        return [_Sum(), _Halves(), _Partial(), _CastBack()]


class _Rotation(Rule):
    """What both spellings share: the layout, and the operator."""

    def check(self, match: Match) -> str | None:
        program, x, cos, sin = match.program, match.node("x"), match.node("cos"), match.node("sin")
        kind, root = tensor_type(program, x), tensor_type(program, match.root)
        tables = tensor_type(program, cos), tensor_type(program, sin)
        if kind is None or root is None or tables[0] is None or tables[1] is None:
            return "the operands are not tensors"
        if len(kind.shape) != 4:
            return f"x is {kind}, not of four axes"
        if root.dtype != kind.dtype:
            return f"x is {kind}, the result {root}"
        if tables[0].shape != tables[1].shape:
            return f"cos is {tables[0]}, sin {tables[1]}"
        axis = _head_axis(kind.shape, tables[0].shape, match.get("halves", False))
        if axis is None:
            return f"cos is {tables[0]}, which has no entry for each position of {kind}, or one for each head"
        match.bound["head_axis"] = axis
        return leak(match)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node | None:
        root, axis = match.root, match["head_axis"]
        drop_assertions(rewriter, match)
        cos, sin = (self._table(rewriter, match, name, axis) for name in ("cos", "sin"))
        x = match.node("x")
        if axis == 1:
            return rewriter.call(_TARGET, x, cos, sin, match["interleaved"], like=root)
        turned = shared_call(rewriter, "aten.transpose.int", x, 1, 2, like=root)
        return _turn_back(rewriter, root, rewriter.call(_TARGET, turned, cos, sin, match["interleaved"], like=root))

    def _table(self, rewriter: Rewriter, match: Match, name: str, axis: int) -> fx.Node:
        """cos or sin as ``[B or 1, S, R]``."""
        program, node, like = match.program, given_back(match.program, match.node(name)), match.root
        kind = tensor_type(program, node)
        assert kind is not None
        if op_name(node) == "aten.unsqueeze" and argument(node, "dim") % 4 == axis and len(kind.shape) == 4:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node = source
        elif len(kind.shape) == 4:
            node = shared_call(rewriter, "aten.squeeze.dim", node, axis, like=like)
        elif len(kind.shape) == 2:
            node = shared_call(rewriter, "aten.unsqueeze", node, 0, like=like)
        if not match.get("halves", False):
            return node
        return _doubled(rewriter, node, like)


def _turn_back(rewriter: Rewriter, root: fx.Node, new: fx.Node) -> fx.Node | None:
    """``[B, H, S, D]`` in place of a root that is ``[B, S, H, D]``; users that transpose the root take it as it is."""
    for user in list(root.users):
        if permutation(rewriter.program, user) == (0, 2, 1, 3):
            rewriter.replace(user, new)
    if not root._erased and root.users:
        return rewriter.call("aten.transpose.int", new, 1, 2, like=root)
    if not root._erased:
        rewriter.erase(root)
    return None


def _doubled(rewriter: Rewriter, node: fx.Node, like: fx.Node) -> fx.Node:
    """A table for half of the features, twice side by side."""
    for user in node.users:
        if op_name(user) == "aten.cat" and user.args == ([node, node], -1) and user < like:
            return user
    return rewriter.call("aten.cat", [node, node], -1, like=like)


def _head_axis(shape: Sequence[int | str], table: Sequence[int | str], halves: bool) -> int | None:
    """Which axis of ``[B, H, S, D]`` or ``[B, S, H, D]`` holds the heads, by the table that is broadcast to it."""
    width = shape[-1]
    wanted = width // 2 if halves and isinstance(width, int) else width
    padded = [1] * (4 - len(table)) + list(table)
    if len(table) > 4 or padded[3] != wanted or padded[0] not in (1, shape[0]):
        return None
    if padded[1] == 1 and padded[2] == shape[2]:
        return 1
    # Transposed: only a table of four axes has positions before heads.
    return 2 if len(table) == 4 and padded[2] == 1 and padded[1] == shape[1] else None


class _Sum(_Rotation):
    """``x * cos + turned(x) * sin``."""

    name = "rotary embedding"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        if op_name(node) != "aten.add.Tensor" or argument(node, "alpha") != 1:
            return -1, ""
        best = (-1, "")
        for straight, crossed in (node.args[:2], node.args[1::-1]):
            for turned, sin in _factors(crossed):
                found = _turned(program, turned)
                if found is None:
                    continue
                x, interleaved, inner = found
                for other, cos in _factors(straight):
                    if without_casts(program, given_back(program, other)) is not without_casts(
                        program, given_back(program, x)
                    ):
                        best = max(
                            best, (3, f"the halves of %{x.name} are turned, but another value is multiplied by cos")
                        )
                        continue
                    if program.type_of(x) != program.type_of(other):
                        best = (4, f"%{x.name} is turned in another dtype than %{other.name} is multiplied by cos")
                        continue
                    match = Match(program, node, {"x": x, "cos": cos, "sin": sin, "interleaved": interleaved})
                    match.inner = [*inner, crossed, straight, node]  # type: ignore[list-item]
                    return match
        return best


def _factors(node: Any) -> list[tuple[fx.Node, fx.Node]]:
    """The two factors of a product, in both orders."""
    if not isinstance(node, fx.Node) or op_name(node) != "aten.mul.Tensor":
        return []
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return []
    return [(left, right), (right, left)]


def _negated(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """What a node is the negative of, and the operator that says so."""
    if not isinstance(node, fx.Node):
        return None
    is_product = op_name(node) == "aten.mul.Tensor" and node.args[1] in (-1, -1.0)
    if op_name(node) != "aten.neg" and not is_product:
        return None
    source = node.args[0]
    return (source, node) if isinstance(source, fx.Node) else None


def _turned(program: Program, node: fx.Node) -> tuple[fx.Node, bool, list[fx.Node]] | None:
    """The x whose pairs ``(a, b)`` a node holds as ``(-b, a)``, whether they are neighbours, and the operators used."""
    bare = given_back(program, node)
    halves = joined(program, bare)
    inner = [bare] if bare is node else [bare, node]
    interleaved = halves is None
    if halves is None:
        stack = bare.args[0] if op_name(bare) in _FLATTENS else None
        if not isinstance(stack, fx.Node) or op_name(stack) != "aten.stack" or len(stack.args[0]) != 2:  # type: ignore[arg-type]
            return None
        if not is_last(program, stack, argument(stack, "dim")):
            return None
        halves, inner = list(stack.args[0]), [stack, *inner]  # type: ignore[arg-type]
    negative = _negated(halves[0])
    if negative is None or not isinstance(halves[1], fx.Node):
        return None
    inner.insert(0, negative[1])
    for base in bases_of(program, halves[1]):
        width = width_of(program, base)
        if width is None or width % 2 or program.type_of(base) != program.type_of(bare):
            continue
        low, high = span_of(program, halves[1], base), span_of(program, negative[0], base)
        half = width // 2
        wanted = (Span(0, half, 2), Span(1, half, 2)) if interleaved else (Span(0, half), Span(half, half))
        if (low, high) == wanted:
            return base, interleaved, inner
    return None


class _Halves(_Rotation):
    """``cat([a * cos - b * sin, b * cos + a * sin])`` for the halves a and b of x."""

    name = "rotary embedding by halves"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        parts = joined(program, node)
        if parts is None or not all(isinstance(part, fx.Node) for part in parts):
            return -1, ""
        first, second = parts
        if op_name(first) != "aten.sub.Tensor" or op_name(second) != "aten.add.Tensor":
            return -1, ""
        if argument(first, "alpha") != 1 or argument(second, "alpha") != 1:
            return -1, ""
        best = (-1, "")
        for low, cos in _factors(first.args[0]):
            for high, sin in _factors(first.args[1]):
                if not _is_sum(second, (high, cos), (low, sin)):
                    continue
                x = _whole(program, low, high)
                if x is None:  # or these are the tables, written first
                    best = (4, f"%{low.name} and %{high.name} are not the two halves of one value")
                    continue
                match = Match(program, node, {"x": x, "cos": cos, "sin": sin, "interleaved": False, "halves": True})
                match.inner = [*first.args[:2], *second.args[:2], first, second, node]
                return match
        return best


def _is_sum(node: fx.Node, *products: tuple[fx.Node, fx.Node]) -> bool:
    """Whether a node adds these two products."""
    first, second = node.args[0], node.args[1]
    return any(
        products[0] in _factors(left) and products[1] in _factors(right)
        for left, right in ((first, second), (second, first))
    )


def _whole(program: Program, low: fx.Node, high: fx.Node) -> fx.Node | None:
    for base in bases_of(program, low):
        width = width_of(program, base)
        if width is None or width % 2:
            continue
        half = width // 2
        if (span_of(program, low, base), span_of(program, high, base)) == (Span(0, half), Span(half, half)):
            return base
    return None


class _Partial(Rule):
    """``cat([rotated(x[..., :R]), x[..., R:]])``: the operator itself leaves further features alone."""

    name = "partial rotary embedding"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        parts = joined(program, node)
        rotated = given_back(program, parts[0]) if parts is not None else None
        if parts is None or rotated is None:
            return -1, ""
        transposition: fx.Node | None = None
        if permutation(program, rotated) == (0, 2, 1, 3):
            transposition, rotated = rotated, _node(rotated.args[0])
        if op_name(rotated) != _TARGET:
            return -1, ""
        x = given_back(program, _node(rotated.args[0]))
        if transposition is not None:
            if permutation(program, x) != (0, 2, 1, 3):
                return -1, ""
            x = given_back(program, _node(x.args[0]))
        inner = [item for item in (rotated, transposition, parts[0], node) if item is not None]
        match = Match(program, node, {"x": x, "rest": parts[1], "rotated": rotated, "moved": transposition is not None})
        match.inner = list(dict.fromkeys(inner))
        return match

    def check(self, match: Match) -> str | None:
        program, x = match.program, match.node("x")
        width = width_of(program, x)
        for base in [*bases_of(program, x), x]:
            whole = width_of(program, base)
            if width is None or whole is None or program.type_of(base) != program.type_of(match.root):
                continue
            wanted = Span(0, width), Span(width, whole - width)
            if (span_of(program, x, base), span_of(program, match["rest"], base)) == wanted:
                match.bound["base"] = base
                return leak(match)
        return f"%{x.name} and the features beside it are not the parts of one value"

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node | None:
        rotated, root, base = match.node("rotated"), match.root, given_back(match.program, match.node("base"))
        if not match["moved"]:
            return rewriter.call(_TARGET, base, *rotated.args[1:], like=root)
        turned = shared_call(rewriter, "aten.transpose.int", base, 1, 2, like=root)
        return _turn_back(rewriter, root, rewriter.call(_TARGET, turned, *rotated.args[1:], like=root))


class _CastBack(Rule):
    """The cast of a rotation back to the dtype that its operand was cast from."""

    name = "rotary embedding, cast back"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        rotated = node.args[0] if op_name(node) in CASTS else None
        if not isinstance(rotated, fx.Node) or op_name(rotated) != _TARGET:
            return -1, ""
        x = _node(rotated.args[0])
        source = without_casts(program, x)
        if source is x or program.type_of(source) != program.type_of(node):
            return -1, ""
        match = Match(program, node, {"x": source, "rotated": rotated})
        match.inner = [rotated, node]
        return match

    def check(self, match: Match) -> str | None:
        return leak(match)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        drop_assertions(rewriter, match)
        return rewriter.call(_TARGET, match.node("x"), *match.node("rotated").args[1:], like=match.root)


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value
