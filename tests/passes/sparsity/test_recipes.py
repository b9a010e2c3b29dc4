"""Pruning passes in recipes: methods and allocations with options are tables."""

from __future__ import annotations

import pytest

import graphwright as gw
from graphwright.frontends.recipes import format_recipe, parse_recipe

DATA = [{"input_ids": 1}]
PASSES = [
    gw.PruneLinears(),
    gw.PruneLinears(sparsity=0.7, pattern="16x1", method="magnitude", allocation="erk"),
    gw.PruneLinears(method=gw.SparseGpt(damping=0.1, block=64), calibration=DATA, overrides={"a.*": {"sparsity": 0.2}}),
    gw.PruneLinears(method=gw.Wanda(by_row=False), calibration=DATA, allocation=gw.LossDriven(measure="output")),
    gw.QuantizeLinears(bits=4, rounding=gw.Gptq(sparsity=0.5, pattern="4x1"), calibration=DATA),
    gw.HoldMasks(where="layers"),
    gw.ReleaseMasks(),
]


@pytest.mark.parametrize("item", PASSES, ids=[f"{index} {item.name}" for index, item in enumerate(PASSES)])
def test_what_is_written_is_read_again(item: gw.Pass) -> None:
    given = {"calibration": DATA} if getattr(item, "calibration", None) else {}
    text = format_recipe([item])
    assert parse_recipe(text, **given).passes == (item,)
    assert item.options() == parse_recipe(text, **given).passes[0].options()


def test_methods_that_are_none() -> None:
    text = '[[pass]]\nname = "prune-linears"\nmethod = { method = "magnitud" }\n'
    with pytest.raises(gw.RecipeError, match="did you mean 'magnitude'|must be one of"):
        parse_recipe(text)
