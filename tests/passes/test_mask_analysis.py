"""Masks read symbolically: what is said of an element is true of it, and masks come apart into the right conditions."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn

import graphwright as gw
from graphwright.ir.names import op_name
from graphwright.passes.fusion.attention import FuseAttention
from graphwright.passes.fusion.elements import Elements
from graphwright.passes.fusion.symbolic import (
    AtLeastZero,
    Choice,
    Element,
    Every,
    Holds,
    Known,
    Linear,
    Number,
    Some,
    Sum,
    index,
    size_of,
)

BATCH, HEADS, LENGTH, WIDTH = 3, 2, 6, 4
Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Masked(nn.Module):
    """The mask of ``[batch, length]`` padding, and torch's attention with it."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask
        table = torch.ones(16, 16, dtype=torch.bool).tril()
        self.register_buffer("table", table[None, None])
        self.register_buffer("uneven", table.clone().index_fill(0, torch.tensor([3]), True)[None, None])

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = self.mask(self, padding) if self.mask.__code__.co_varnames[0] == "self" else self.mask(x, padding)
        return mask, nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def padding_of(batch: int, length: int) -> torch.Tensor:
    """Every row valid at its first key at least, the first row throughout."""
    lengths = torch.tensor([length, max(1, length - 2), 1, length])[:batch, None]
    return (torch.arange(length) < lengths).to(torch.int64)


def traced(mask: Mask, *, dynamic: bool = True) -> tuple[gw.Program, list[torch.Tensor]]:
    x, padding = torch.randn(BATCH, HEADS, LENGTH, WIDTH), padding_of(BATCH, LENGTH)
    open_sizes = {"x": {0: "batch", 2: "sequence"}, "padding": {0: "batch", 1: "sequence"}}
    program = gw.trace(Masked(mask), (x, padding), dynamic=open_sizes if dynamic else None, check=False)
    return program, [x, padding]


# -- symbolic values against real ones ---------------------------------------------------------------------------------


class Recorder(fx.Interpreter):
    """Runs a program and keeps the value of every node."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values = {**getattr(self, "values", {}), n: value}
        return value


def evaluated(value: Any, names: Mapping[str, int], values: Mapping[fx.Node, Any]) -> Any:
    """A symbolic value as a number, for given indices and sizes."""
    if isinstance(value, Linear):
        return value.constant + sum(coefficient * names[name] for name, coefficient in value.terms)
    if isinstance(value, Number | Known):
        return value.value
    if isinstance(value, AtLeastZero):
        return evaluated(value.form, names, values) >= 0
    if isinstance(value, Element):
        return values[value.node][tuple(evaluated(place, names, values) for place in value.index)].item()
    if isinstance(value, Holds):
        return (evaluated(value.element, names, values) != 0) == value.wanted
    if isinstance(value, Every):
        return all(evaluated(part, names, values) for part in value.parts)
    if isinstance(value, Some):
        return any(evaluated(part, names, values) for part in value.parts)
    if isinstance(value, Choice):
        side = value.yes if evaluated(value.condition, names, values) else value.no
        return evaluated(side, names, values)
    assert isinstance(value, Sum)
    return sum(evaluated(part, names, values) for part in value.parts)


def assert_true_of_every_element(program: gw.Program, inputs: list[torch.Tensor], *, binary: bool) -> Elements:
    """Whatever the analysis says of the first output's elements holds for the tensors a real run gives."""
    mask = program.output.args[0][0]
    sizes = {f"axis{k}": size_of(size) for k, size in enumerate(mask.meta["val"].shape)}
    elements = Elements(program, sizes, binary_inputs=binary)
    places = tuple(
        index(f"axis{k}") if not size.is_constant or size.constant != 1 else Linear()
        for k, size in enumerate(sizes.values())
    )
    value = elements.at(mask, places)
    recorder = Recorder(program.body)
    recorder.run(*inputs)
    actual = recorder.values[mask]
    for place in itertools.product(*map(range, actual.shape)):
        names = {f"axis{k}": number for k, number in enumerate(place)}
        for dim, size in (("batch", inputs[0].shape[0]), ("sequence", inputs[0].shape[2])):
            if dim in program.dims:
                names[size_of(program.symbols.size(dim)).terms[0][0]] = size
        found = evaluated(value, names, recorder.values)
        expected = actual[place].item()
        assert found == expected, (place, value)
    return elements


def rows_and_columns(padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.arange(padding.shape[1])
    return places[:, None], places[None, :]


def by_index(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """As transformers writes it: the padding mask gathered by index tensors."""
    batch, keys = torch.arange(padding.shape[0]), torch.arange(padding.shape[1])
    causal = keys[None, None, None, :] <= keys[None, None, :, None]
    return causal & padding.bool()[batch[:, None, None, None], keys[None, None, None, :]]


def merged_heads(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """As torch.nn.MultiheadAttention writes it: batch and heads merged and split again."""
    batch, length = padding.shape
    flat = padding[:, None, None, :].expand(-1, HEADS, -1, -1).reshape(batch * HEADS, 1, length)
    return flat.to(torch.bool).view(batch, HEADS, 1, length)


def additive(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return (1.0 - padding[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min


def inverted_twice(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """As transformers wrote it: inverted, and filled where inverted."""
    inverted = 1.0 - padding[:, None, None, :].expand(-1, 1, padding.shape[1], -1).to(x.dtype)
    return inverted.masked_fill(inverted.to(torch.bool), torch.finfo(x.dtype).min)


def sliced_table(self: Any, padding: torch.Tensor) -> torch.Tensor:
    length = padding.shape[1]
    mask: torch.Tensor = self.table[:, :, :length, :length]
    return mask


def shifted_table(self: Any, padding: torch.Tensor) -> torch.Tensor:
    length = padding.shape[1]
    mask: torch.Tensor = self.table[:, :, 4 : 4 + length, :length]
    return mask


def uneven_table(self: Any, padding: torch.Tensor) -> torch.Tensor:
    length = padding.shape[1]
    mask: torch.Tensor = self.uneven[:, :, :length, :length]
    return mask


def causal(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    rows, columns = rows_and_columns(padding)
    return columns <= rows


def windowed(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    rows, columns = rows_and_columns(padding)
    return (columns <= rows) & (columns > rows - 3) & padding.bool()[:, None, None]


def documents(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Keys of the same document as the query."""
    number = padding.cumsum(-1) // 3
    return (number[:, None, :, None] == number[:, None, None, :]) & causal(x, padding)


def restarts(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """As transformers writes it without a mask: documents begin where positions do not go on by one."""
    positions = torch.arange(padding.shape[1])[None].repeat(padding.shape[0], 1)
    steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    number = (steps != 1).cumsum(-1)
    batch, places = torch.arange(padding.shape[0])[:, None, None, None], torch.arange(padding.shape[1])
    same = number[batch, places[None, None, :, None]] == number[batch, places[None, None, None, :]]
    return same & causal(x, padding)


MASKS: dict[str, Mask] = {
    "restarts": restarts,
    "uneven steps": lambda x, p: (torch.diff(torch.arange(p.shape[1]) * 3, prepend=torch.tensor([1])) < 3)[None],
    "later steps": lambda x, p: torch.diff(torch.arange(LENGTH + 1)).cumsum(0)[:, None] > torch.arange(LENGTH),
    "repeated": lambda x, p: p.bool()[:, None, None].repeat(1, HEADS, p.shape[1], 1),
    "by index": by_index,
    "merged heads": merged_heads,
    "additive": additive,
    "inverted twice": inverted_twice,
    "sliced table": sliced_table,
    "shifted table": shifted_table,
    "uneven table": uneven_table,
    "windowed": windowed,
    "documents": documents,
    "infinite above": lambda x, p: torch.full((p.shape[1], p.shape[1]), float("-inf")).triu(1),
    "ones below": lambda x, p: torch.ones(p.shape[1], p.shape[1]).tril(-1).eq(0),
    "two diagonals": lambda x, p: torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(2).triu(-1),
    "not above": lambda x, p: ~torch.ones(p.shape[1], p.shape[1], dtype=torch.bool).triu(1),
    "distance": lambda x, p: operator.sub(*rows_and_columns(p)).abs() < 3,
    "blocks": lambda x, p: rows_and_columns(p)[0] // 2 == rows_and_columns(p)[1] // 2,
    "prefix": lambda x, p: causal(x, p) | (rows_and_columns(p)[1] < 2),
    "reversed": lambda x, p: causal(x, p).flip(0),
    "from the end": lambda x, p: causal(x, p)[-LENGTH:] & p.bool()[:, None, None, -LENGTH:],
    "every other": lambda x, p: (torch.arange(2 * LENGTH) % 4 == 0)[::2][None, :] | causal(x, p),
    "queries too": lambda x, p: p.bool()[:, None, :, None] & p.bool()[:, None, None, :],
    "transposed": lambda x, p: (p[:, None, :, None] == 1).transpose(-1, -2),
    "selected": lambda x, p: torch.stack([p, 1 - p]).bool()[0][:, None, None],
    "float to bool": lambda x, p: torch.where(causal(x, p), 0.0, -1e30).to(torch.bool).logical_not(),
    "negative indices": lambda x, p: p.bool()[:, torch.arange(LENGTH) - LENGTH][:, None, None],
}


@lru_cache
def traced_by_name(name: str) -> tuple[gw.Program, list[torch.Tensor]]:
    fixed = name in ("two diagonals", "from the end", "every other", "negative indices", "later steps")
    return traced(MASKS[name], dynamic=not fixed)


@pytest.mark.parametrize("name", MASKS)
def test_what_is_said_of_an_element_is_true(name: str) -> None:
    program, inputs = traced_by_name(name)
    assert_true_of_every_element(program, inputs, binary=False)
    assert_true_of_every_element(program, inputs, binary=True)
    if program.dims:
        for batch, length in ((1, 1), (2, 5), (4, 3)):
            other = [torch.randn(batch, HEADS, length, WIDTH), padding_of(batch, length)]
            assert_true_of_every_element(program, other, binary=True)


# Random masks: a tree of operators over row, column, padding and constants.
NUMBERS: st.SearchStrategy[Any] = st.deferred(
    lambda: st.one_of(
        st.sampled_from([("row",), ("column",)]),
        st.integers(-3, 3).map(lambda number: ("number", number)),
        st.tuples(st.sampled_from(["add", "sub"]), NUMBERS, NUMBERS),
        st.tuples(st.just("times"), NUMBERS, st.integers(-2, 2)),
    )
)
TRUTHS: st.SearchStrategy[Any] = st.deferred(
    lambda: st.one_of(
        st.sampled_from([("keys",), ("queries",), ("gathered",), ("below",)]),
        st.tuples(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), NUMBERS, NUMBERS),
        st.tuples(st.sampled_from(["and", "or", "where"]), TRUTHS, TRUTHS),
        st.tuples(st.sampled_from(["not", "float", "filled", "tril", "negative"]), TRUTHS),
    )
)


def built(tree: Any, x: torch.Tensor, padding: torch.Tensor) -> Any:
    """The tensor that a random tree describes."""
    name, parts = tree[0], [built(part, x, padding) if isinstance(part, tuple) else part for part in tree[1:]]
    rows, columns = rows_and_columns(padding)
    keys = padding.bool()[:, None, None, :]
    leaves = {
        "row": lambda: rows,
        "column": lambda: columns,
        "keys": lambda: keys,
        "queries": lambda: padding.bool()[:, None, :, None],
        "gathered": lambda: padding.bool()[torch.arange(padding.shape[0])[:, None, None, None], columns[None, None]],
        "below": lambda: torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(),
    }
    if name in leaves:
        return leaves[name]()
    if name == "number":
        return torch.full((1, 1), parts[0])
    if name in ("and", "or"):
        return parts[0] & parts[1] if name == "and" else parts[0] | parts[1]
    if name in ("add", "sub", "lt", "le", "gt", "ge", "eq", "ne"):
        return getattr(operator, name)(*parts)
    if name == "times":
        return parts[0] * parts[1]
    if name == "where":
        return torch.where(keys, parts[0], parts[1])
    if name == "not":
        return ~parts[0]
    if name == "float":
        return torch.where(parts[0], 0.0, float("-inf")) == 0
    if name == "negative":
        return ((1.0 - parts[0].float()) * -1e9).masked_fill(~keys, 3.0) == 0
    if name == "filled":
        return parts[0].masked_fill(~keys, False)
    assert name == "tril"
    return parts[0].expand(BATCH, HEADS, LENGTH, LENGTH).tril(1)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tree=TRUTHS, added=st.booleans())
def test_random_masks_are_read_truly_and_fused_exactly(tree: Any, added: bool) -> None:
    def mask(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        allowed: torch.Tensor = built(tree, x, padding)
        return torch.where(allowed, 0.0, float("-inf")) if added else allowed

    program, inputs = traced(mask, dynamic=False)
    if not isinstance(program.output.args[0][0], fx.Node):
        return
    assert_true_of_every_element(program, inputs, binary=True)
    before = program.clone()
    FuseAttention()(program)
    expected, found = before(*inputs)[1], program(*inputs)[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# -- classification --------------------------------------------------------------------------------------------------

# name -> causal, window, key mask, bias
READINGS: dict[str, tuple[bool, int, bool, bool]] = {
    "restarts": (True, 0, False, False),
    "repeated": (False, 0, True, False),
    "by index": (True, 0, True, False),
    "merged heads": (False, 0, True, False),
    "additive": (False, 0, True, False),
    "inverted twice": (False, 0, True, False),
    "sliced table": (True, 0, False, False),
    "windowed": (True, 3, True, False),
    "infinite above": (True, 0, False, False),
    "not above": (True, 0, False, False),
    "selected": (False, 0, True, False),
    "float to bool": (True, 0, False, False),
    "transposed": (False, 0, True, False),
    "uneven table": (False, 0, False, True),
    "documents": (True, 0, False, True),
    "distance": (False, 0, False, True),
    "blocks": (False, 0, False, True),
    "prefix": (False, 0, False, True),
    "reversed": (False, 0, False, True),
    "shifted table": (False, 0, False, True),
    "ones below": (False, 1, False, False),
    "queries too": (False, 0, True, True),
}


@pytest.mark.parametrize("name", READINGS)
def test_masks_are_taken_apart(name: str) -> None:
    before, _ = traced_by_name(name)
    program = before.clone()
    assert FuseAttention()(program)
    (node,) = [node for node in program.nodes if op_name(node) == "graphwright.attention"]
    key_mask, bias, _, causal, window = node.args[3:]
    assert (causal, window, key_mask is not None, bias is not None) == READINGS[name]
    for batch, length in ((BATCH, LENGTH), (1, 1), (2, 5), (4, 3)):
        other = [torch.randn(batch, HEADS, length, WIDTH), padding_of(batch, length)]
        torch.testing.assert_close(program(*other)[1], before(*other)[1], rtol=1e-5, atol=1e-5)
    if key_mask is not None:
        kind = program.type_of(key_mask)
        assert kind.dtype == torch.bool
        assert kind.shape == ("batch", "sequence")
    if bias is not None:
        assert len(program.type_of(bias).shape) == 4
