"""Attention: every spelling becomes one operator that computes the same, and near misses say why they do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.arguments import arguments_of
from graphwright.ir.provenance import add_tags
from graphwright.passes.fusion.attention import FuseAttention
from graphwright.passes.verification import precise

Spelling = Callable[..., Any]
Listing = Callable[[gw.Program], list[str]]
BATCH, HEADS, WIDTH = 2, 4, 8
SIZES = ((2, 6), (1, 5), (3, 9), (1, 1))


class Spelled(nn.Module):
    """A function of query, key, value and a padding mask of integers."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.temperature = nn.Parameter(torch.tensor(0.4))
        self.register_buffer("factor", torch.tensor(0.4))
        self.register_buffer("below", torch.ones(16, 16).tril()[None, None])

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> Any:
        return self.spelling(self, q, k, v, padding)


def inputs_of(batch: int, length: int, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key and value, the last two with ``heads`` heads, and a mask with padding but never of a whole row."""
    query = torch.randn(batch, HEADS, length, WIDTH, dtype=dtype)
    key, value = (torch.randn(batch, heads, length, WIDTH, dtype=dtype) for _ in range(2))
    lengths = torch.tensor([length, max(1, length - 2), 1])[:batch, None]
    return [query, key, value, (torch.arange(length) < lengths).to(torch.int64)]


def traced(spelling: Spelling, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> gw.Program:
    tensors = {name: {0: "batch", 2: "sequence"} for name in "qkv"}
    dynamic = {**tensors, "padding": {0: "batch", 1: "sequence"}}
    return gw.trace(Spelled(spelling), tuple(inputs_of(*SIZES[0], heads, dtype)), dynamic=dynamic, check=False)


def attention_of(program: gw.Program) -> fx.Node:
    (node,) = [node for node in program.nodes if gw.op_name(node) == "graphwright.attention"]
    return node


def operators(program: gw.Program) -> set[str]:
    return {gw.op_name(node) for node in program.nodes if node.op == "call_function"}


def assert_equivalent(before: gw.Program, after: gw.Program, heads: int = HEADS) -> None:
    """Equal in float64 and in float32, at several sizes."""
    for batch, length in SIZES:
        inputs = inputs_of(batch, length, heads)
        with torch.no_grad():
            torch.testing.assert_close(after(*inputs), before(*inputs), rtol=2e-5, atol=2e-6)
        exact, found = (precise.run(item, inputs)[item.output.args[0][0].name] for item in (before, after))
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def refusals(item: gw.Pass, program: gw.Program) -> str:
    return "\n".join(map(str, item.refusals(program)))


def rows_and_columns(padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.arange(padding.shape[1])
    return places[:, None], places[None, :]


# -- spellings ---------------------------------------------------------------------------------------------------------


def eager(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """As transformers' eager attention, with the old additive mask of BERT."""
    mask = (1.0 - padding[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(functional.dropout(weights, 0.1, training=False), v)


def nano(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """As nanoGPT: a stored triangle, filled in with -inf."""
    length = q.size(2)
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    scores = scores.masked_fill(m.below[:, :, :length, :length] == 0, float("-inf"))
    return functional.softmax(scores, dim=-1) @ v


def scaled_everywhere(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.softmax((q * 0.5) @ (k / 2.0).mT * m.factor / 0.25, -1) @ v


def permuted_key(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The key goes from [B, S, H, D] to [B, H, D, S] at once."""
    key = k.transpose(1, 2)
    return torch.softmax(q @ key.permute(0, 2, 3, 1), -1) @ v


def filled_where(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.where(p[:, None, None] != 0, q @ k.mT / 3, torch.full((), -1e9)), -1) @ v


def subtracted(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT - 1e9 * (1 - p)[:, None, None], -1) @ v


def no_nan(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(torch.softmax((q @ k.mT).masked_fill(~p.bool()[:, None, None], -math.inf), -1)) @ v


def merged(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """As BLOOM: batch and heads in one axis, ALiBi added within the product."""
    batch, heads, length, width = q.shape
    flat = [t.reshape(batch * heads, length, width) for t in (q, k, v)]
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None]
    alibi = (slopes * padding[:, None, :]).reshape(batch * heads, 1, length)
    scores = torch.baddbmm(alibi, flat[0], flat[1].transpose(1, 2), beta=1.0, alpha=0.3).view(batch, heads, length, -1)
    rows, columns = rows_and_columns(padding)
    weights = torch.softmax(scores.masked_fill(columns > rows, -1e30), -1).view(batch * heads, length, -1)
    return torch.bmm(weights, flat[2]).view(batch, heads, length, width)


def one_head(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    scores = torch.bmm(q[:, 0], k[:, 0].mT) + (1.0 - p[:, None].float()) * -10000.0
    return torch.bmm(torch.softmax(scores, 2), v[:, 0])


def einsums(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Heads after positions throughout."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.3
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def positions(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """As T5 and Falcon: a position bias that is scaled with the scores, and a mask."""
    rows, columns = rows_and_columns(p)
    bias = torch.sin((columns - rows).float())[None, None]
    mask = torch.where(p.bool()[:, None, None], 0.0, torch.finfo(q.dtype).min)
    return torch.softmax((q @ k.mT + bias) * 0.3 + mask, -1) @ v


def grouped(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """As transformers' repeat_kv."""
    k, v = (
        t[:, :, None].expand(t.shape[0], 2, 2, t.shape[2], WIDTH).reshape(t.shape[0], HEADS, t.shape[2], WIDTH)
        for t in (k, v)
    )
    return torch.softmax(q @ k.transpose(2, 3), -1) @ v


def grouped_before(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """As the first Llama: heads are repeated before they are transposed."""
    k, v = (t.transpose(1, 2) for t in (k, v))
    k, v = (t[:, :, :, None].expand(*t.shape[:3], 2, WIDTH).reshape(*t.shape[:2], HEADS, WIDTH) for t in (k, v))
    return functional.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))


def interleaved(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.repeat_interleave(2, dim=1).mT, -1) @ v.repeat_interleave(2, dim=1)


def tiled(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Not grouped heads: the whole run of heads is repeated."""
    return torch.softmax(q @ k.repeat(1, 2, 1, 1).mT, -1) @ v.repeat(1, 2, 1, 1)


def operator_with(**options: Any) -> Spelling:
    def attend(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        mask = p.bool()[:, None, None] if options.get("masked") else None
        rest = {key: value for key, value in options.items() if key != "masked"}
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **rest)

    return attend


def added_truths(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A boolean tensor that is added counts as zeros and ones, not as a mask."""
    return torch.softmax(q @ k.mT + p.bool()[:, None, None] + torch.arange(k.shape[2]), -1) @ v


ROOT = 1 / math.sqrt(WIDTH)
# name -> spelling, key heads, scale, causal, key mask, bias
SPELLINGS: dict[str, tuple[Spelling, int, float, bool, bool, bool]] = {
    "operator": (operator_with(), HEADS, ROOT, False, False, False),
    "operator, causal": (operator_with(is_causal=True), HEADS, ROOT, True, False, False),
    "operator, masked": (operator_with(masked=True, scale=0.2), HEADS, 0.2, False, True, False),
    "operator, grouped": (operator_with(masked=True, enable_gqa=True), 2, ROOT, False, True, False),
    "eager": (eager, HEADS, 0.3, False, True, False),
    "stored triangle": (nano, HEADS, ROOT, True, False, False),
    "scaled everywhere": (scaled_everywhere, HEADS, 0.4, False, False, False),
    "permuted key": (permuted_key, HEADS, 1.0, False, False, False),
    "where": (filled_where, HEADS, 1 / 3, False, True, False),
    "subtracted": (subtracted, HEADS, 1.0, False, True, False),
    "without NaN": (no_nan, HEADS, 1.0, False, True, False),
    "merged heads": (merged, HEADS, 0.3, True, False, True),
    "one head": (one_head, HEADS, 1.0, False, True, False),
    "einsum": (einsums, HEADS, 0.3, False, False, False),
    "position bias": (positions, HEADS, 0.3, False, True, True),
    "truths added": (added_truths, HEADS, 1.0, False, False, True),
    "grouped": (grouped, 2, 1.0, False, False, False),
    "grouped before": (grouped_before, 2, ROOT, False, False, False),
    "interleaved": (interleaved, 2, 1.0, False, False, False),
    "tiled": (tiled, 2, 1.0, False, False, False),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_becomes_one_operator(name: str) -> None:
    spelling, heads, scale, causal, has_keys, has_bias = SPELLINGS[name]
    program = traced(spelling, heads)
    before = program.clone()
    assert FuseAttention()(program)
    assert not operators(program) & {"aten.softmax.int", "aten.matmul", "aten.bmm", "aten.scaled_dot_product_attention"}
    given = arguments_of(attention_of(program))
    assert given["scale"] == pytest.approx(scale, rel=1e-6)
    assert (given["causal"], given["key_mask"] is not None, given["bias"] is not None) == (causal, has_keys, has_bias)
    key = program.type_of(given["key"])
    assert key.shape[1] == {"one head": 1, "tiled": HEADS}.get(name, heads)
    assert_equivalent(before, program, heads)
    assert not FuseAttention()(program)


def test_text(listing: Listing) -> None:
    program = traced(eager)
    assert listing(program)[-9:] == [
        "%transpose = aten.transpose.int(%k, 2, 3)",
        "%matmul = aten.matmul(%q, %transpose)",
        "%mul_1 = aten.mul.Tensor(%matmul, 0.3)",
        "%add = aten.add.Tensor(%mul_1, %mul)",
        "%softmax = aten.softmax.int(%add, -1, torch.float32)",
        "%_assert_tensor_metadata_default_1 = aten._assert_tensor_metadata(%softmax, None, None, torch.float32, "
        "device=device(type='cpu'), layout=torch.strided)",
        "%to_1 = aten.to.dtype(%softmax, torch.float32)",
        "%dropout = aten.dropout(%to_1, 0.1, False)",
        "%matmul_1 = aten.matmul(%dropout, %v)",
    ]
    FuseAttention()(program)
    assert listing(program) == [
        "%ne = aten.ne.Scalar(%padding, 0)",
        "%attention = graphwright.attention(%q, %k, %v, %ne, None, 0.3, False, 0)",
    ]
    assert program.notes["attention"] == {"attention": "key mask (masks are trusted)"}


def test_aligned_at_the_last_key() -> None:
    """More keys than queries: the operator counts from the end, as masks for cached keys do."""

    def attend(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        queries, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        return torch.softmax((q @ k.mT).masked_fill(keys > queries + (k.shape[2] - q.shape[2]), -math.inf), -1) @ v

    query, (_, key, value, padding) = torch.randn(2, HEADS, 3, WIDTH), inputs_of(2, 7)
    dynamic = {"q": {2: "queries"}, "k": {2: "keys"}, "v": {2: "keys"}}
    program = gw.trace(Spelled(attend), (query, key, value, padding), dynamic=dynamic, check=False)
    before = program.clone()
    FuseAttention()(program)
    assert arguments_of(attention_of(program))["causal"] is True
    for queries, keys in ((3, 7), (1, 7), (5, 5), (1, 1)):
        inputs = [torch.randn(2, HEADS, queries, WIDTH), *(torch.randn(2, HEADS, keys, WIDTH) for _ in "kv"), padding]
        torch.testing.assert_close(program(*inputs), before(*inputs), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_to_float32_are_taken_in(dtype: torch.dtype) -> None:
    def attend(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        scores = q.float() @ k.float().mT * 0.3 + torch.where(p.bool()[:, None, None], 0.0, torch.finfo(dtype).min)
        return torch.softmax(scores, -1).to(v.dtype) @ v

    program = traced(attend, dtype=dtype)
    before = program.clone()
    FuseAttention()(program)
    assert [item.op for item in attention_of(program).args[:3]] == ["placeholder"] * 3
    inputs = inputs_of(2, 6, dtype=dtype)
    step = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(program(*inputs), before(*inputs), rtol=step, atol=step)


def test_layers_share_one_mask_and_drop_its_arithmetic() -> None:
    def twice(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        rows, columns = rows_and_columns(p)
        mask = (columns <= rows) & p.bool()[:, None, None]
        first = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return functional.scaled_dot_product_attention(first, k, v, attn_mask=mask)

    program = traced(twice)
    FuseAttention()(program)
    assert operators(program) == {"aten.to.dtype", "graphwright.attention"}
    masks = {node.args[3] for node in program.nodes if gw.op_name(node) == "graphwright.attention"}
    assert len(masks) == 1


@pytest.mark.parametrize("kind", ["padding", "causal"])
def test_torch_modules(kind: str) -> None:
    """torch.nn's encoder layer, whose masks are merged over batch and heads."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(32, HEADS, 64, batch_first=True)

        def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
            if kind == "padding":
                y: torch.Tensor = self.layer(x, src_key_padding_mask=padding == 0)
                return y
            square = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.layer(x, src_mask=square, is_causal=True)  # type: ignore[no-any-return]

    x, padding = torch.randn(2, 6, 32), inputs_of(2, 6)[3]
    axes = {0: "batch", 1: "sequence"}
    program = gw.trace(Encoder().eval(), (x, padding), dynamic={"x": axes, "padding": axes}, check=False)
    before = program.clone()
    FuseAttention()(program)
    given = arguments_of(attention_of(program))
    assert (given["causal"], given["key_mask"] is not None, given["bias"]) == (
        kind == "causal",
        kind == "padding",
        None,
    )
    torch.testing.assert_close(program(x, padding), before(x, padding), rtol=2e-5, atol=2e-6)


# -- what is not fused, and why ----------------------------------------------------------------------------------------


def capped(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.tanh(q @ k.mT / 50.0) * 50.0, -1) @ v


def sink(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    scores = torch.cat([q @ k.mT, torch.zeros_like(q[..., :1])], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


def learned_scale(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT * m.temperature, -1) @ v


def computed_scale(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT / q.norm(), -1) @ v


def dropped(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return functional.dropout(torch.softmax(q @ k.mT, -1), 0.1, training=True) @ v


def over_queries(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT, -2) @ v


def weights_too(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> Any:
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v, weights


def cut_off(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(q @ k.mT, -1)
    return torch.relu(weights - 0.1) @ v


def weak_fill(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.softmax((q @ k.mT).masked_fill(p[:, None, None] == 0, -5.0), -1) @ v


def one_batch(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k[:1].mT, -1) @ v


def five_axes(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.unflatten(1, (2, 2)) for t in (q, k, v))
    return torch.softmax(q @ k.mT, -1) @ v


NOT_FUSED: dict[str, tuple[Spelling, str]] = {
    "soft-capped": (capped, "aten.tanh stands between the scores and softmax"),
    "with a sink": (sink, "aten.slice.Tensor stands between softmax and the values"),
    "learned scale": (learned_scale, "scales the scores by a value that is computed or trained"),
    "computed scale": (computed_scale, "scales the scores by a value that is computed or trained"),
    "dropout": (dropped, "drops attention weights at random"),
    "dropout of the operator": (operator_with(dropout_p=0.1), "at random (dropout_p = 0.1)"),
    "softmax over queries": (over_queries, "softmax runs over axis -2, not over the keys"),
    "weights used": (weights_too, "%softmax, which would no longer be computed, is also used by"),
    "weights changed": (cut_off, "stands between softmax and the values"),
    "filled with a score": (weak_fill, "fills scores with -5, which does not rule them out"),
    "broadcast batch": (one_batch, "broadcast along the batch"),
    "five axes": (five_axes, "5 axes, not 3 or 4"),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_left_alone(name: str) -> None:
    spelling, reason = NOT_FUSED[name]
    program = traced(spelling)
    before = [str(node) for node in program.nodes]
    assert not FuseAttention()(program)
    assert [str(node) for node in program.nodes] == before
    assert reason in refusals(FuseAttention(), program)


def test_operands_of_another_dtype_are_left_alone() -> None:
    def attend(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return torch.softmax(torch.sin(q.float()) @ k.float().mT, -1).to(v.dtype) @ v

    program = traced(attend, dtype=torch.bfloat16)
    assert not FuseAttention()(program)
    assert "query, key and value are float32" in refusals(FuseAttention(), program)


def test_causal_from_the_first_key_is_left_alone() -> None:
    query, (_, key, value, padding) = torch.randn(2, HEADS, 3, WIDTH), inputs_of(2, 7)
    program = gw.trace(Spelled(operator_with(is_causal=True)), (query, key, value, padding), dynamic=None, check=False)
    assert not FuseAttention()(program)
    assert "is_causal counts from the first key" in refusals(FuseAttention(), program)


def test_selection_and_tags() -> None:
    program = traced(eager)
    assert not FuseAttention(ignore=lambda node: True)(program)
    assert "not selected by where= / ignore=" in refusals(FuseAttention(ignore=lambda node: True), program)
    (softmax,) = [node for node in program.nodes if gw.op_name(node) == "aten.softmax.int"]
    add_tags(softmax, ["adapter"])
    assert not FuseAttention()(program)
    assert "%softmax is tagged adapter" in refusals(FuseAttention(), program)


# -- trust -------------------------------------------------------------------------------------------------------------


def test_without_trust_finite_masks_stay_a_bias() -> None:
    """Then even a row that is padding throughout, and a mask of other numbers than 0 and 1, come out the same."""
    program = traced(eager)
    before = program.clone()
    assert FuseAttention(trust_masks=False)(program)
    given = arguments_of(attention_of(program))
    assert given["key_mask"] is None
    assert given["bias"] is not None
    inputs = inputs_of(2, 6)
    inputs[3][1] = 0
    torch.testing.assert_close(program(*inputs), before(*inputs), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["operator, masked", "without NaN", "stored triangle", "operator, causal"])
def test_without_trust_what_is_certain_is_still_read(name: str) -> None:
    spelling, heads, _, causal, has_keys, _ = SPELLINGS[name]
    program = traced(spelling, heads)
    before = program.clone()
    assert FuseAttention(trust_masks=False)(program)
    given = arguments_of(attention_of(program))
    assert (given["causal"], given["key_mask"] is not None, given["bias"]) == (causal, has_keys, None)
    inputs = inputs_of(2, 6)
    inputs[3][1] = 0
    torch.testing.assert_close(program(*inputs), before(*inputs), rtol=2e-5, atol=2e-6)


def test_without_trust_filled_scores_are_left_alone() -> None:
    program = traced(filled_where)
    assert not FuseAttention(trust_masks=False)(program)
    assert "fills scores with -1e+09" in refusals(FuseAttention(trust_masks=False), program)

    def infinite(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return torch.softmax((q @ k.mT).masked_fill(p[:, None, None] == 0, -math.inf), -1) @ v

    program = traced(infinite)
    assert not FuseAttention(trust_masks=False)(program)
    assert "a query with nothing to attend would get zeros" in refusals(FuseAttention(trust_masks=False), program)
    assert FuseAttention()(program)


def test_finite_windows_over_padding_are_not_trusted() -> None:
    """Right padding alone leaves such queries without keys; the mean of all values must come out as before."""

    def attend(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        rows, columns = rows_and_columns(p)
        allowed = (columns <= rows) & (columns > rows - 2) & p.bool()[:, None, None]
        return torch.softmax(q @ k.mT + torch.where(allowed, 0.0, torch.finfo(q.dtype).min), -1) @ v

    program = traced(attend)
    before = program.clone()
    assert FuseAttention()(program)
    given = arguments_of(attention_of(program))
    assert (given["window"], given["key_mask"]) == (0, None)
    assert "finite masks may leave a query no key" in program.notes["attention"]["attention"]
    assert_equivalent(before, program)


@pytest.mark.parametrize("kind", ["where", "masked_fill"])
def test_finite_fills_of_whole_rows_stay_a_bias(kind: str) -> None:
    """As DeBERTa: padding rules out queries too, whose result is the mean of all values."""

    def attend(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        pairs = (p[:, None, :, None] * p[:, None, None, :]).bool()
        lowest, scores = torch.finfo(q.dtype).min, q @ k.mT
        masked = torch.where(pairs, scores, lowest) if kind == "where" else scores.masked_fill(~pairs, lowest)
        return torch.softmax(masked, -1) @ v

    program = traced(attend)
    before = program.clone()
    assert FuseAttention()(program)
    given = arguments_of(attention_of(program))
    assert given["key_mask"] is None
    assert program.type_of(given["bias"]).dtype == torch.float32
    assert_equivalent(before, program)


@pytest.mark.parametrize("fill", [-math.inf, -1e9])
def test_other_fills_of_whole_rows_are_left_alone(fill: float) -> None:
    def attend(m: Spelled, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        rows, columns = rows_and_columns(p)
        near = (columns > rows - 2) & p.bool()[:, None, None]
        return torch.softmax((q @ k.mT).masked_fill(~near, fill), -1) @ v

    program = traced(attend)
    assert not FuseAttention()(program)
    assert "a query with nothing to attend would get zeros" in refusals(FuseAttention(), program)


def test_trust_is_a_truth_value() -> None:
    with pytest.raises(gw.InputError, match="trust_masks"):
        FuseAttention(trust_masks="yes")
