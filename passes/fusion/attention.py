"""Every usual spelling of scaled dot-product attention into one operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Match, Rule
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import fake_of
from graphwright.passes.base import RulePass
from graphwright.passes.fusion.heads import Heads, bare, in_dtype, unfolded, unrepeated, unscaled
from graphwright.passes.fusion.masks import BATCH, SCORES, MaskReader, Reading, Term, never
from graphwright.passes.fusion.matching import ASSERTIONS, drop_assertions, leak, tensor_type
from graphwright.passes.fusion.products import MATRIX_PRODUCTS, weighted_sum
from graphwright.passes.fusion.scores import Scores
from graphwright.passes.fusion.symbolic import size_of

_TARGET = "graphwright.attention"
_RESHAPES = ("aten.view", "aten.reshape", "aten._unsafe_view")


@dataclass(frozen=True, kw_only=True)
class FuseAttention(RulePass):
    """Make one ``graphwright.attention`` of torch's attention operator or of its parts.

    Before::

        %keys = aten.transpose.int(%key, 2, 3)
        %product = aten.matmul(%query, %keys)
        %scores = aten.mul.Tensor(%product, 0.125)
        %masked = aten.add.Tensor(%scores, %mask)
        %softmax = aten.softmax.int(%masked, -1)
        %y = aten.matmul(%softmax, %value)

    After (where ``%mask`` is 0 or ``finfo.min`` by a padding mask and by ``key <= query``)::

        %y = graphwright.attention(%query, %key, %value, %padding, None, 0.125, True, 0)

    The scale may stand on the scores, the query, the key or all of them; masks may be boolean or added, filled in with
    ``where`` or ``masked_fill``, and computed in any way. They are read, see :mod:`graphwright.passes.fusion.masks`,
    into ``causal``, ``window``, ``key_mask`` and, for the rest and for position biases such as ALiBi, ``bias``. Heads
    repeated for grouped queries are no longer repeated; batch and head may be one axis; casts around softmax and
    dropout that is off are taken in. What the masks were read as stands in ``program.notes["attention"]``.

    Does not fire when

    - dropout is on, so that attention weights are dropped at random;
    - something else stands between product and softmax, such as the ``tanh`` of soft-capped scores or a sink;
    - the scale is computed or trained;
    - softmax runs over another axis than the keys;
    - the attention weights or scores are used elsewhere too, for instance returned;
    - ``is_causal`` is set and the numbers of queries and keys differ: torch then counts from the first key;
    - query, key and value differ in dtype, or are broadcast along the batch;
    - scores have other than three or four axes;
    - scores are filled in with -inf, or with a number above -1e30, where that may leave a query no key: within a window
      or by documents, and without ``trust_masks`` wherever there is padding.

    Attributes:
        trust_masks: take it that integer inputs used as masks hold zeros and ones only, and that padding leaves every
            query at least one key. Results for queries without any, as with padding on the left, are then zeros
            instead of the mean of all values or NaN. With ``False``, masks that need either stay as they are, as a
            bias; masks of torch's operator do not.
    """

    name: ClassVar[str] = "fuse-attention"

    trust_masks: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.trust_masks, bool):
            raise InputError(f"must be true or false, not {self.trust_masks!r}", where=f"{self.name}: trust_masks")

    def rules(self, program: Program) -> Sequence[Rule]:
        """Torch's operator, and its parts."""
        return [_Operator(self.trust_masks), _Parts(self.trust_masks)]


@dataclass(frozen=True)
class _Plan:
    """Everything the operator needs: ``heads`` are query, key and value."""

    heads: tuple[Heads, Heads, Heads]
    scale: float
    reader: MaskReader
    reading: Reading


class _Attention(Rule):
    """What both rules share: from heads and terms to the operator."""

    def __init__(self, trusted: bool) -> None:
        self.trusted = trusted

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        plan, root = match["plan"], match.root
        assert isinstance(plan, _Plan)
        drop_assertions(rewriter, match)
        query, key, value = (item.make(rewriter, root) for item in plan.heads)
        key_mask, bias = plan.reader.make(rewriter, plan.reading, int(fake_of(query).shape[1]), root)
        constants = plan.scale, plan.reading.causal, plan.reading.window
        new = rewriter.call(_TARGET, query, key, value, key_mask, bias, *constants, like=root)
        notes = match.program.notes.setdefault("attention", {})
        notes[new.name] = f"{plan.reading}" + (f", in {path_of(root)}" if path_of(root) else "")
        for node, _ in plan.reader.elements.read:
            for user in list(node.users):
                if op_name(user) in ASSERTIONS:
                    rewriter.erase(user)  # so that masks nobody reads any more can go
        order = match.get("order")
        if fake_of(root).dim() == 3:
            new = rewriter.call("aten.squeeze.dim", new, 1, like=root)
        return new if order is None else rewriter.call("aten.permute", new, list(order), like=root)

    def plan(
        self, match: Match, heads: Sequence[Heads], scale: float, terms: Sequence[Term], *, causal: bool = False
    ) -> str | None:
        """Bind the plan, or say why there is none."""
        program, root = match.program, match.root
        typed = [in_dtype(program, item, root) for item in heads]
        query, key, value = (item for item in typed if item is not None) if None not in typed else (None,) * 3
        if query is None or key is None or value is None:
            dtypes = [str(fake_of(item.node).dtype).removeprefix("torch.") for item in heads]
            return f"query, key and value are {', '.join(dtypes)}, the result {fake_of(root).dtype}"
        (short_key, count), (short_value, other) = unrepeated(program, key), unrepeated(program, value)
        if count == other:
            key, value = short_key, short_value
        query, key, value = (bare(program, item) for item in (unscaled(program, query), unscaled(program, key), value))
        reason = _shape_reason(query, key, value) or _result_reason(match, query, value)
        if reason is not None:
            return reason
        shape = query.shape()
        sizes = shape[0], shape[1] if len(shape) == 4 else 1, shape[-2], key.shape()[-2]
        reader = MaskReader(program, sizes, trusted=self.trusted)
        reading = reader.read(terms, causal_from_start=causal)
        if isinstance(reading, str):
            return reading
        factor = scale * query.factor * key.factor
        match.bound["plan"] = _Plan((query, key, value), factor, reader, reading)
        return None


class _Operator(_Attention):
    """``aten.scaled_dot_product_attention``."""

    name = "attention"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        if op_name(node) != "aten.scaled_dot_product_attention":
            return -1, ""
        match = Match(program, node)
        match.inner = [node]
        return match

    def check(self, match: Match) -> str | None:
        arguments = arguments_of(match.root)
        query, mask = arguments["query"], arguments["attn_mask"]
        width = fake_of(query).shape[-1]
        if arguments["dropout_p"] != 0.0:
            return f"it drops attention weights at random (dropout_p = {arguments['dropout_p']})"
        scale = arguments["scale"]
        if isinstance(scale, fx.Node) or (scale is None and not isinstance(width, int)):
            return "the scale is computed"
        rank = fake_of(query).dim()
        axes = SCORES if rank == 4 else (BATCH, *SCORES[2:])
        terms = []
        if mask is not None:
            kind = "add" if fake_of(mask).dtype.is_floating_point else "keep"
            terms.append(Term(kind, mask, axes, is_safe=True))
        heads = [Heads(arguments[name]) for name in ("query", "key", "value")]
        factor = float(scale) if scale is not None else 1.0 / math.sqrt(width)
        return self.plan(match, heads, factor, terms, causal=arguments["is_causal"])


class _Parts(_Attention):
    """Product, scale, masks, softmax and product; rooted at the last product, or at the view that splits its heads."""

    name = "attention, spelled out"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        product = _product_at(node)
        parts = weighted_sum(product) if product is not None else None
        if product is None or parts is None:
            return -1, ""
        scores = Scores(program, never(self.trusted))
        if not scores.read(parts.weights):
            return scores.miss
        assert scores.query is not None
        assert scores.key is not None
        heads, terms = [scores.query, scores.key, parts.value], scores.terms
        if fake_of(product).dim() == 3:
            split = [item for item in (unfolded(program, item) for item in heads) if item is not None]
            root = _split_view(product, split[0]) if len(split) == 3 else None
            if root is not None and root is not node:
                return -1, ""  # the view that follows is the root
            if root is None:
                terms = [replace(term, axes=(BATCH, *term.axes[1:])) for term in terms]
            heads = heads if root is None else split
        else:
            root = product
        if (root or product) is not node or (scores.is_reshaped and (root is None or root is product)):
            return -1, ""
        bound = {"heads": heads, "terms": terms, "scale": scores.scale, "order": parts.order}
        match = Match(program, node, bound)
        match.inner = [*dict.fromkeys([*scores.inner, product, node])]
        return match

    def check(self, match: Match) -> str | None:
        return leak(match) or self.plan(match, match["heads"], match["scale"], match["terms"])


def _product_at(node: fx.Node) -> fx.Node | None:
    """The last product of an attention rooted at a node: the node itself, or the one whose batch it splits."""
    if op_name(node) in (*MATRIX_PRODUCTS, "aten.einsum"):
        return node
    source = node.args[0] if op_name(node) in _RESHAPES else None
    if isinstance(source, fx.Node) and op_name(source) == "aten.bmm" and fake_of(node).dim() == 4:
        return source
    return None


def _split_view(product: fx.Node, query: Heads) -> fx.Node | None:
    """The only user of a product, if it splits batch and heads as the query was."""
    users = [user for user in product.users if op_name(user) not in ASSERTIONS]
    if len(users) != 1 or op_name(users[0]) not in _RESHAPES or fake_of(users[0]).dim() != 4:
        return None
    found, wanted = fake_of(users[0]).shape, query.shape()
    return users[0] if [size_of(size) for size in found[:3]] == [size_of(size) for size in wanted[:3]] else None


def _shape_reason(query: Heads, key: Heads, value: Heads) -> str | None:
    """Why the shapes do not fit the operator."""
    shapes = [item.shape() for item in (query, key, value)]
    if {len(shape) for shape in shapes} not in ({3}, {4}):
        return f"query, key and value have {', '.join(str(len(shape)) for shape in shapes)} axes, not 3 or 4 each"
    batches = [size_of(shape[0]) for shape in shapes]
    if batches[1:] != batches[:1] * 2:
        return "key or value is broadcast along the batch"
    if size_of(shapes[1][-2]) != size_of(shapes[2][-2]):
        return "keys and values differ in number"
    if len(shapes[0]) == 3:
        return None
    heads = [shape[1] for shape in shapes]
    if not all(isinstance(count, int) for count in heads) or heads[1] != heads[2] or heads[0] % heads[1]:
        return f"{heads[0]} query heads cannot share {heads[1]} key and {heads[2]} value heads"
    return None


def _result_reason(match: Match, query: Heads, value: Heads) -> str | None:
    """Why the operator's result would not have the type of what it replaces."""
    sizes = [*query.shape()[:-1], value.shape()[-1]]
    order = match.get("order") or range(len(sizes))
    shape = tuple(match.program.symbols.render(sizes[axis]) for axis in order)
    kind = tensor_type(match.program, match.root)
    return None if kind is not None and kind.shape == shape else f"the result is {kind}, that of the operator {shape}"
