"""What masks and additive terms say about which keys a query attends: causal, window, key mask, and what is left.

Every term of an attention is read as a truth about (batch b, head h, query i, key j), see
:mod:`graphwright.passes.fusion.elements`, and taken apart into conditions that must all hold. A condition

- ``j <= i + T - S`` is ``causal``;
- ``j > i + T - S - w`` is a ``window`` of w;
- on b and j alone is (part of) the key mask;
- on anything else stays a bias, as does every term that is no mask.

Two things cannot be read off a program: that an integer input holds zeros and ones only, which ``(1 - mask) * -1e9``
needs to be a mask; and that every query has some key to attend. Where none is left, a finite mask value such as
``finfo.min`` makes softmax give the mean of all values (-inf: NaN), while the operator gives zeros. Masks that need
either are taken apart only if they are ``trusted``; otherwise they stay a bias. Trust goes as far as padding and
causality: with padding on the right, a key is left to every query. Within a window or a document, all may be padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import fake_of
from graphwright.passes.fusion.calculation import number_of
from graphwright.passes.fusion.elements import Elements
from graphwright.passes.fusion.layout import Laid, Maker, Recipe, Whole, Written, find
from graphwright.passes.fusion.symbolic import (
    FALSE,
    TRUE,
    AtLeastZero,
    Choice,
    Index,
    Linear,
    Sum,
    Truth,
    Value,
    conjuncts,
    every,
    given,
    index,
    indices_of,
    negation,
    size_of,
    some,
    truth_of,
)

BATCH, HEAD, QUERY, KEY = "b", "h", "i", "j"
SCORES = (BATCH, HEAD, QUERY, KEY)


# The lowest float32.
_LOWEST = -3.4028234663852886e38


def never(trusted: bool) -> float:
    """What makes a score stand for "never attended", whatever it is added to: this and everything below.

    Below -1e30 no finite score can make up for it. Masks that are trusted may use smaller values, as -10000 in BERT.
    """
    return -1e4 if trusted else -1e30


@dataclass(frozen=True)
class Term:
    """One thing that acts on the scores.

    Attributes:
        kind: ``"keep"`` (attend where true), ``"drop"`` (attend where false) or ``"add"``.
        node: its tensor.
        axes: what the axes of the scores are where it acts, such as ``SCORES``; it is broadcast against them from the
            right. ``None`` stands for batch and head in one.
        factor: of an added term.
        fill: what takes the place of scores that are not attended, for other terms.
        is_safe: whether a query whose scores it makes -inf attends nothing, as in torch's attention, rather than NaN.
    """

    kind: str
    node: fx.Node
    axes: tuple[str | None, ...] = SCORES
    factor: float = 1.0
    fill: float = -math.inf
    is_safe: bool = False


@dataclass(frozen=True)
class Reading:
    """What the terms come to.

    Attributes:
        causal: query ``i`` attends keys ``j <= i + T - S`` only.
        window: when above 0, only keys ``j > i + T - S - window``.
        keys: conditions ``[B or 1, T]``, all of which must hold.
        rest: further conditions, broadcastable to ``[B, H, S, T]``.
        biases: what is added to the scores, with factors.
        is_trusted: whether this relies on trust in the masks.
        why_bias: why masks were not taken apart.
    """

    causal: bool = False
    window: int = 0
    keys: tuple[Recipe, ...] = ()
    rest: tuple[Recipe, ...] = ()
    biases: tuple[tuple[Recipe, float], ...] = ()
    is_trusted: bool = False
    why_bias: str = ""

    def __str__(self) -> str:
        said = ["causal"] if self.causal else []
        said += [f"window {self.window}"] if self.window else []
        said += ["key mask"] if self.keys else []
        said += ["mask as bias"] if self.rest else []
        said += ["bias"] if self.biases else []
        remark = self.why_bias or ("masks are trusted" if self.is_trusted else "")
        return (", ".join(said) or "no mask") + (f" ({remark})" if remark else "")


@dataclass(frozen=True)
class _Read:
    """One term, read: where it lets attend, what it adds there, and whether rows it empties give zeros."""

    truth: Truth
    parts: tuple[Value | Whole, ...] = ()
    is_safe: bool = True


class MaskReader:
    """Reads the terms of one attention.

    Args:
        program: only read.
        sizes: batch, heads, queries and keys: shape of the scores.
        trusted: masks hold zeros and ones only and leave every query a key.
    """

    def __init__(self, program: Program, sizes: Sequence[object], *, trusted: bool) -> None:
        self.sizes: Mapping[str, Linear] = {name: size_of(size) for name, size in zip(SCORES, sizes, strict=True)}
        self.trusted = trusted
        self.elements = Elements(program, self.sizes, binary_inputs=trusted)
        self._never = never(trusted)

    def read(self, terms: Sequence[Term], *, causal_from_start: bool = False) -> Reading | str:
        """Classify the terms, or say why they cannot be expressed.

        Args:
            terms: what acts on the scores.
            causal_from_start: query ``i`` attends keys ``j <= i`` only, as aligned at the first key.
        """
        for term in terms:
            if fake_of(term.node).dim() > len(term.axes):
                return f"%{term.node.name} has more axes than the scores it acts on"
        reads = [self._read(term) for term in terms]
        start = AtLeastZero(index(QUERY) - index(KEY)) if causal_from_start else TRUE
        allowed = self.elements.simplified(every(start, *(item.truth for item in reads)))
        if allowed == FALSE:
            return "no query may attend any key"
        causal, window, left = self._diagonals(conjuncts(allowed))
        recipes = {truth: find(self.elements, truth, (BATCH, KEY)) for truth in left if self._is_about_keys(truth)}
        keys = [recipe for recipe in recipes.values() if recipe is not None]
        others = [find(self.elements, truth, SCORES) for truth in left if recipes.get(truth) is None]
        biases = [
            (part if isinstance(part, Whole) else find(self.elements, part, SCORES), term.factor)
            for term, item in zip(terms, reads, strict=True)
            for part in item.parts
        ]
        rest = [recipe for recipe in others if recipe is not None]
        added = [(recipe, factor) for recipe, factor in biases if recipe is not None]
        shift = self.sizes[KEY] - self.sizes[QUERY]
        never_empty = not left and (not (causal or window) or self.elements.is_at_least_zero(shift))
        is_safe = never_empty or all(item.is_safe for item in reads)
        is_credible = is_safe or (self.trusted and not window and not others)
        if len(rest) == len(others) and len(added) == len(biases) and is_credible:
            relies = not is_safe or self.elements.assumed
            return Reading(causal, window, tuple(keys), tuple(rest), tuple(added), is_trusted=relies)
        if causal_from_start:
            return "is_causal counts from the first key, and the numbers of queries and keys differ"
        return self._as_they_are(terms, is_credible)

    def make(self, rewriter: Rewriter, reading: Reading, heads: int, like: fx.Node) -> tuple[fx.Node | None, ...]:
        """The key mask ``[B or 1, T]`` and the bias ``[B or 1, H or 1, S or 1, T]`` of a reading.

        Args:
            rewriter: the edit they are made in.
            reading: from :meth:`read`.
            heads: number of query heads.
            like: the node that stands for the attention.
        """
        key_maker = Maker(rewriter, self.elements, (BATCH, KEY), heads, like)
        maker = Maker(rewriter, self.elements, SCORES, heads, like)
        key_mask = key_maker.make(_conjunction(reading.keys)) if reading.keys else None
        allowed = maker.make(_conjunction(reading.rest)) if reading.rest else None
        bias: fx.Node | None = None
        for recipe, factor in reading.biases:
            part = maker.make(recipe)
            if not fake_of(part).dtype.is_floating_point:
                # What is added as a number must not be taken for a mask.
                part = rewriter.call("aten.to.dtype", part, fake_of(like).dtype, like=like)
            if factor != 1.0:
                part = rewriter.call("aten.mul.Tensor", part, factor, like=like)
            bias = part if bias is None else rewriter.call("aten.add.Tensor", bias, part, like=like)
        if bias is not None and allowed is not None:
            return key_mask, rewriter.call("aten.where.ScalarOther", allowed, bias, -math.inf, like=like)
        return key_mask, bias if bias is not None else allowed

    # -- single terms ----------------------------------------------------------------------------------------------

    def _read(self, term: Term) -> _Read:
        where = self._index(term)
        if where is None:
            return _Read(TRUE, (Whole(term.node, term.axes),)) if term.kind == "add" else _unreadable(term)
        value = self.elements.at(term.node, where)
        if term.kind == "add":
            found = self._split(value, term.factor)
            return _Read(found.truth, found.parts, term.is_safe and found.is_safe)
        truth = truth_of(value)
        assert truth is not None  # the tensor is boolean
        return _Read(truth if term.kind == "keep" else negation(truth), (), term.is_safe)

    def _index(self, term: Term) -> Index | None:
        """The index into a term's tensor at (b, h, i, j); ``None`` if it is not plain how it is broadcast."""
        shape = fake_of(term.node).shape
        found: list[Linear] = []
        for size, axis in zip(shape, term.axes[len(term.axes) - len(shape) :], strict=True):
            if isinstance(size, int) and size == 1:
                found.append(Linear())
            elif axis is not None and size_of(size) == self.sizes[axis]:
                found.append(index(axis))
            else:
                return None
        return tuple(found)

    def _split(self, value: Value, factor: float) -> _Read:
        """An added value as a mask and what is added besides; ``is_safe`` when the mask value is -inf."""
        number = number_of(value)
        if number is not None and number * factor == 0:
            return _Read(TRUE)
        if number is not None and number * factor <= self._never:
            return _Read(FALSE, (), math.isinf(number * factor))
        if isinstance(value, Sum):
            reads = [self._split(part, factor) for part in value.parts]
            parts = tuple(part for item in reads for part in item.parts)
            return _Read(every(*(item.truth for item in reads)), parts, all(item.is_safe for item in reads))
        if not isinstance(value, Choice):
            return _Read(TRUE, (value,))
        condition = value.condition
        yes, no = self._split(value.yes, factor), self._split(value.no, factor)
        if no.truth == FALSE:
            kept = self._split(given(value.yes, condition), factor)
            return _Read(every(condition, kept.truth), kept.parts, no.is_safe and kept.is_safe)
        if yes.truth == FALSE:
            kept = self._split(given(value.no, negation(condition)), factor)
            return _Read(every(negation(condition), kept.truth), kept.parts, yes.is_safe and kept.is_safe)
        if yes.parts or no.parts:
            return _Read(TRUE, (value,))
        truth = some(every(condition, yes.truth), every(negation(condition), no.truth))
        return _Read(truth, (), yes.is_safe and no.is_safe)

    # -- all terms together ----------------------------------------------------------------------------------------

    def _diagonals(self, truths: Sequence[Truth]) -> tuple[bool, int, list[Truth]]:
        """Whether conditions make it causal, the window they set, and the other conditions."""
        shift = self.sizes[KEY] - self.sizes[QUERY]
        causal, windows = False, list[int]()
        left, later = list[Truth](), list[tuple[Truth, Linear]]()
        for truth in truths:
            form = truth.form if isinstance(truth, AtLeastZero) else Linear()
            slopes = {name: coefficient for name, coefficient in form.terms if name in SCORES}
            width = form + index(QUERY) - index(KEY) + shift + 1
            if slopes == {QUERY: 1, KEY: -1}:
                later.append((truth, form - index(QUERY) + index(KEY) - shift))
                causal |= later[-1][1] == Linear()
            elif slopes == {QUERY: -1, KEY: 1} and width.is_constant and width.constant > 0:
                windows.append(width.constant)
            else:
                left.append(truth)
        # Looser conditions of the same kind say nothing more.
        left += [truth for truth, room in later if not (causal and self.elements.is_at_least_zero(room))]
        return causal, min(windows, default=0), left

    def _is_about_keys(self, truth: Truth) -> bool:
        names = indices_of(truth) & set(SCORES)
        return KEY in names and names <= {BATCH, KEY}

    def _as_they_are(self, terms: Sequence[Term], is_credible: bool) -> Reading | str:
        """Every term as a bias."""
        why = "it is not known of what parts the mask is" if is_credible else "finite masks may leave a query no key"
        rest: list[Recipe] = []
        biases: list[tuple[Recipe, float]] = []
        for term in terms:
            if term.kind == "add":
                biases.append((Whole(term.node, term.axes), term.factor))
                continue
            where = self._index(term)
            if where is None or None in term.axes:
                return f"%{term.node.name} masks scores in a way that cannot be laid out as [batch, head, query, key]"
            kept: Recipe = Laid(term.node, where)
            if term.is_safe or is_credible:
                rest.append(kept if term.kind == "keep" else Written("aten.logical_not", (kept,)))
            elif _LOWEST <= term.fill <= never(trusted=False):
                # Scores vanish beside such a number, so that adding it comes to the same as putting it in their place.
                values = (0.0, term.fill) if term.kind == "keep" else (term.fill, 0.0)
                biases.append((Written("aten.where.Scalar", (kept,), values), 1.0))
            else:
                return "a query with nothing to attend would get zeros instead of the mean of all values or NaN"
        return Reading(rest=tuple(rest), biases=tuple(biases), why_bias=why)


def _conjunction(recipes: Sequence[Recipe]) -> Recipe:
    found = recipes[0]
    for recipe in recipes[1:]:
        found = Written("aten.logical_and", (found, recipe))
    return found


def _unreadable(term: Term) -> _Read:
    """A truth about nothing that is known, so that no place is found for it."""
    return _Read(AtLeastZero(Linear(((f"?{term.node.name}", 1),))), (), term.is_safe)
