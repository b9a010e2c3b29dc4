"""Rotary embeddings: every spelling becomes one operator that computes the same, and near misses say why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import graphwright as gw
from graphwright.ir.arguments import arguments_of
from graphwright.ir.provenance import add_tags
from graphwright.passes.fusion.rotary import FuseRotaryEmbedding
from graphwright.passes.verification import precise

Spelling = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]
Listing = Callable[[gw.Program], list[str]]
HEADS, WIDTH = 3, 8
SIZES = ((2, 6), (1, 5), (3, 1), (1, 1))


class Spelled(nn.Module):
    """A function of x and tables of cosines and sines."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return self.spelling(x, cos, sin)


def inputs_of(
    batch: int, length: int, width: int = WIDTH, batched: bool = False, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """``[B, H, S, D]``, and tables ``[B or 1, S, width]``."""
    tables = (torch.randn(batch if batched else 1, length, width, dtype=dtype) for _ in range(2))
    return [torch.randn(batch, HEADS, length, WIDTH, dtype=dtype), *tables]


def traced(
    spelling: Spelling, width: int = WIDTH, batched: bool = False, dtype: torch.dtype = torch.float32
) -> gw.Program:
    table = {0: "batch", 1: "sequence"} if batched else {1: "sequence"}
    dynamic = {"x": {0: "batch", 2: "sequence"}, "cos": table, "sin": table}
    inputs = tuple(inputs_of(*SIZES[0], width, batched, dtype))
    return gw.trace(Spelled(spelling), inputs, dynamic=dynamic, check=False)


def rotations(program: gw.Program) -> list[fx.Node]:
    return [node for node in program.nodes if gw.op_name(node) == "graphwright.rotary_embedding"]


def operators(program: gw.Program) -> list[str]:
    return [gw.op_name(node) for node in program.nodes if node.op == "call_function"]


def assert_equivalent(before: gw.Program, after: gw.Program, width: int = WIDTH, batched: bool = False) -> None:
    """Equal in float64 and in float32, at several sizes."""
    for batch, length in SIZES:
        inputs = inputs_of(batch, length, width, batched)
        torch.testing.assert_close(after(*inputs), before(*inputs), rtol=1e-6, atol=1e-6)
        exact, found = (precise.run(item, inputs)[item.output.args[0][0].name] for item in (before, after))
        torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-13)


def refusals(program: gw.Program) -> str:
    return "\n".join(map(str, FuseRotaryEmbedding().refusals(program)))


# -- spellings ---------------------------------------------------------------------------------------------------------


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-high, low), dim=-1)


def rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rotate_pairs_by_shape(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[..., 1::2] * -1, x[..., 0::2]], dim=-1).reshape(x.shape)


def rotate_chunks(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([-high, low], -1)


def rotate_split(x: torch.Tensor) -> torch.Tensor:
    low, high = torch.split(x, x.shape[-1] // 2, dim=-1)
    return torch.cat([-high, low], -1)


def llama(turn: Callable[[torch.Tensor], torch.Tensor]) -> Spelling:
    return lambda x, cos, sin: (x * cos.unsqueeze(1)) + (turn(x) * sin.unsqueeze(1))


def partial(turn: Callable[[torch.Tensor], torch.Tensor]) -> Spelling:
    """As Phi and GPT-NeoX: only leading features are rotated."""

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        width = cos.shape[-1]
        return torch.cat([llama(turn)(x[..., :width], cos, sin), x[..., width:]], dim=-1)

    return rotate


def heads_last(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As GPT-J: positions come before heads while it is rotated."""
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(2), sin.unsqueeze(2)
    return (x * cos + rotate_pairs(x) * sin).permute(0, 2, 1, 3)


def partial_heads_last(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x, cos, sin = x.transpose(1, 2), cos[:, :, None], sin[:, :, None]
    turned, rest = x[:, :, :, :4], x[:, :, :, 4:]
    return torch.cat([turned * cos + rotate_pairs(turned) * sin, rest], dim=-1).permute(0, 2, 1, 3)


def by_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As GPT-OSS: tables of half the width, each half rotated apart."""
    low, high = torch.chunk(x, 2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def by_halves_tables_first(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = torch.chunk(x, 2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((cos * low - sin * high, sin * low + cos * high), dim=-1)


def swapped(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Every product and the sum the other way round; tables of fewer axes."""
    return sin[0] * rotate_half(x) + cos[0] * x


def in_float(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As Qwen2-VL: rotated in float32 and cast back."""
    wide = x.float()
    return (wide * cos.unsqueeze(1).float() + rotate_half(wide) * sin.unsqueeze(1).float()).to(x.dtype)


# name -> spelling, width of the tables, whether they have a batch, whether pairs are neighbours
SPELLINGS: dict[str, tuple[Spelling, int, bool, bool]] = {
    "llama": (llama(rotate_half), WIDTH, False, False),
    "llama, positions by row": (llama(rotate_half), WIDTH, True, False),
    "chunks": (llama(rotate_chunks), WIDTH, False, False),
    "split": (llama(rotate_split), WIDTH, False, False),
    "pairs": (llama(rotate_pairs), WIDTH, False, True),
    "pairs by shape": (llama(rotate_pairs_by_shape), WIDTH, True, True),
    "partial": (partial(rotate_half), 4, False, False),
    "partial pairs": (partial(rotate_pairs), 2, False, True),
    "partial, of all": (partial(rotate_half), WIDTH, False, False),
    "heads last": (heads_last, WIDTH, True, True),
    "partial, heads last": (partial_heads_last, 4, False, True),
    "by halves": (by_halves, WIDTH // 2, False, False),
    "by halves, tables first": (by_halves_tables_first, WIDTH // 2, False, False),
    "swapped": (swapped, WIDTH, False, False),
    "in float": (in_float, WIDTH, False, False),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_becomes_one_operator(name: str) -> None:
    spelling, width, batched, neighbours = SPELLINGS[name]
    program = traced(spelling, width, batched)
    before = program.clone()
    assert FuseRotaryEmbedding()(program)
    (node,) = rotations(program)
    given = arguments_of(node)
    assert given["interleaved"] is neighbours
    assert program.type_of(given["cos"]).shape == (
        "batch" if batched else 1,
        "sequence",
        2 * width if "halves" in name else width,
    )
    assert not {"aten.neg", "aten.mul.Tensor", "aten.stack"} & set(operators(program))
    assert_equivalent(before, program, width, batched)
    assert not FuseRotaryEmbedding()(program)


def test_text(listing: Listing) -> None:
    program = traced(llama(rotate_half))
    assert listing(program) == [
        "%unsqueeze = aten.unsqueeze(%cos, 1)",
        "%mul = aten.mul.Tensor(%x, %unsqueeze)",
        "%slice_1 = aten.slice.Tensor(%x, 3, 0, 4)",
        "%slice_2 = aten.slice.Tensor(%x, 3, 4, 9223372036854775807)",
        "%neg = aten.neg(%slice_2)",
        "%cat = aten.cat([%neg, %slice_1], -1)",
        "%unsqueeze_1 = aten.unsqueeze(%sin, 1)",
        "%mul_1 = aten.mul.Tensor(%cat, %unsqueeze_1)",
        "%add = aten.add.Tensor(%mul, %mul_1)",
    ]
    FuseRotaryEmbedding()(program)
    assert listing(program) == ["%rotary_embedding = graphwright.rotary_embedding(%x, %cos, %sin, False)"]


def test_transpositions_on_both_sides_are_met_half_way(listing: Listing) -> None:
    program = traced(heads_last, batched=True)
    FuseRotaryEmbedding()(program)
    gw.RemoveNoOps()(program)
    assert listing(program) == ["%rotary_embedding = graphwright.rotary_embedding(%x, %cos, %sin, True)"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "in float", "partial"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    spelling, width, _, _ = SPELLINGS[name]
    program = traced(spelling, width, dtype=dtype)
    before = program.clone()
    assert FuseRotaryEmbedding()(program)
    (node,) = rotations(program)
    assert node.args[0].op == "placeholder"
    inputs = inputs_of(2, 6, width, dtype=dtype)
    step = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(program(*inputs), before(*inputs), rtol=step, atol=step)


def test_queries_and_keys_share_tables() -> None:
    def both(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return by_halves(x, cos, sin), by_halves(x + 1, cos, sin)

    program = traced(both, WIDTH // 2)
    FuseRotaryEmbedding()(program)
    first, second = rotations(program)
    assert first.args[1:] == second.args[1:]


# -- what is not fused, and why ----------------------------------------------------------------------------------------


def of_another(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos.unsqueeze(1) + rotate_half(torch.sin(x)) * sin.unsqueeze(1)


def wrong_sign(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((high, -low), -1) * sin.unsqueeze(1)


def wrong_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-low, high), -1) * sin.unsqueeze(1)


def uneven_parts(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos.unsqueeze(1) + torch.cat((-x[..., 3:], x[..., :3]), -1) * sin.unsqueeze(1)


def mixed_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)[0], torch.sin(x).chunk(2, -1)[1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def three_axes(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = x[:, 0]
    return x * cos + rotate_half(x) * sin


def by_head(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = (torch.stack([t, t + 1, t + 2], 1) for t in (cos, sin))
    return x * cos + rotate_half(x) * sin


def one_position(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos[:, None, :1], sin[:, None, :1]
    return x * cos + rotate_half(x) * sin


def wider(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos.unsqueeze(1).double() + rotate_half(x) * sin.unsqueeze(1).double()


def turned_wider(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos.unsqueeze(1) + rotate_half(x.double()) * sin.unsqueeze(1)


def turned_too(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    turned = rotate_half(x)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1), turned


def other_rest(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.cat([llama(rotate_half)(x[..., :4], cos[..., :4], sin[..., :4]), torch.sin(x)[..., 4:]], dim=-1)


NOT_FUSED: dict[str, tuple[Spelling, str]] = {
    "another value": (of_another, "the halves of %sin_1 are turned, but another value is multiplied by cos"),
    "three axes": (three_axes, "not of four axes"),
    "table by head": (by_head, "has no entry for each position of f32[batch, 3, sequence, 8], or one for each head"),
    "one position": (one_position, "has no entry for each position"),
    "wider result": (wider, "the result f64"),
    "turned in another dtype": (turned_wider, "is turned in another dtype than %x is multiplied by cos"),
    "turned half used": (turned_too, "%cat, which would no longer be computed, is also used by"),
    "halves of two values": (mixed_halves, "are not the two halves of one value"),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_left_alone(name: str) -> None:
    spelling, reason = NOT_FUSED[name]
    program = traced(spelling, WIDTH // 2 if name == "halves of two values" else WIDTH)
    before = [str(node) for node in program.nodes]
    assert not FuseRotaryEmbedding()(program)
    assert [str(node) for node in program.nodes] == before
    assert reason in refusals(program)


@pytest.mark.parametrize("spelling", [wrong_sign, wrong_halves, uneven_parts], ids=lambda item: item.__name__)
def test_other_functions_are_left_alone(spelling: Spelling) -> None:
    assert not FuseRotaryEmbedding()(traced(spelling))


def test_features_of_another_value_are_not_taken_in() -> None:
    program = traced(other_rest)
    before = program.clone()
    assert FuseRotaryEmbedding()(program)
    assert "aten.cat" in operators(program)
    assert "are not the parts of one value" in refusals(program)
    assert_equivalent(before, program)


def test_tags_are_respected() -> None:
    program = traced(llama(rotate_half))
    (node,) = [node for node in program.nodes if gw.op_name(node) == "aten.neg"]
    add_tags(node, ["adapter"])
    assert not FuseRotaryEmbedding()(program)
    assert "%neg is tagged adapter" in refusals(program)
