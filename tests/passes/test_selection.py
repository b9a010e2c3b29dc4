"""``where=`` and ``ignore=`` select the same nodes in every pass, and say so when they select none."""

from __future__ import annotations

import pytest
import torch
from tests.passes.conftest import DropDropout, Stack

import graphwright as gw
from graphwright.passes.selection import Where, predicate


def paths(program: gw.Program, where: Where, ignore: Where = None) -> list[str]:
    chosen = predicate(program, where, ignore)
    return [gw.path_of(node) for node in program.nodes if gw.op_name(node) == "aten.linear" and chosen(node)]


@pytest.fixture
def program(stack: Stack, batch: dict[str, torch.Tensor]) -> gw.Program:
    return gw.trace(stack, batch)


ALL = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, ALL),
        ("head", ["head"]),
        ("layers.0", ["layers.0.up", "layers.0.down"]),
        ("layers.*.up", ["layers.0.up", "layers.1.up"]),
        ("*", ALL),
        (r"re:layers\.\d+\.down", ["layers.0.down", "layers.1.down"]),
        (["head", "layers.1.*"], ["layers.1.up", "layers.1.down", "head"]),
        (gw.Select(op="aten.linear", path="layers.1"), ["layers.1.up", "layers.1.down"]),
        (gw.Select(shape=(None, None, 32)), ["layers.0.up", "layers.1.up"]),
        (gw.Select(shape=("batch", "sequence", 16)), ["layers.0.down", "layers.1.down"]),
        (lambda node: gw.path_of(node).endswith("up"), ["layers.0.up", "layers.1.up"]),
    ],
)
def test_where(program: gw.Program, where: Where, expected: list[str]) -> None:
    assert paths(program, where) == expected


def test_ignore(program: gw.Program) -> None:
    assert paths(program, None, "layers.*") == ["head"]
    assert paths(program, "layers.*", "re:.*down") == ["layers.0.up", "layers.1.up"]


def test_a_prefix_of_a_name_is_not_the_module(program: gw.Program) -> None:
    with pytest.raises(gw.SelectionError, match="selects nothing"):
        paths(program, "layer")


def test_a_typo_is_met_with_the_nearest_paths(program: gw.Program) -> None:
    with pytest.raises(gw.SelectionError) as caught:
        paths(program, "layers.0.upp")
    assert "layers.0.up" in str(caught.value)


@pytest.mark.parametrize(
    ("where", "message"), [(3, "selects nothing"), ("re:(", "regular expression"), ([None, 3], "int")]
)
def test_malformed_selection_is_refused_at_construction(where: Where, message: str) -> None:
    with pytest.raises(gw.SelectionError, match=message):
        DropDropout(where=where)
