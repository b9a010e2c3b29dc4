"""Taps: values from within beside the output, and nothing else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tests.passes.adapters.families import BATCH, FAMILIES, traced
from torch import nn
from torch.utils import _pytree as pytree

import graphwright as gw

pytest.importorskip("transformers")


def hidden_states(family: str) -> list[torch.Tensor]:
    """What transformers itself says the layers give; its last one is normed where the model ends in a norm."""
    with torch.no_grad():
        found = FAMILIES[family]()(**BATCH, output_hidden_states=True).hidden_states
    return list(found[1:])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_hidden_states_of_every_layer(family: str) -> None:
    program = traced(family)
    tapped = gw.optimize(program, [gw.TapFeatures()], example_inputs=BATCH)
    with torch.no_grad():
        given, plain = tapped(**BATCH), program(**BATCH)
    assert isinstance(given, gw.Tapped)
    assert type(given.output) is type(plain)
    assert torch.equal(given[0], plain[0])
    wanted = hidden_states(family)
    assert len(given.features) == len(wanted) == 2
    for index, (path, found) in enumerate(given.features.items()):
        assert path.endswith(f".{index}")
        if index == 0 or family == "bert":
            torch.testing.assert_close(found, wanted[index], rtol=1e-5, atol=1e-6)
    assert gw.optimize(tapped, [gw.TapFeatures()], example_inputs=BATCH).report.rows[0].changed is False


def test_they_are_named_saved_held_to_contracts_and_removed(tmp_path: Path) -> None:
    program = traced("llama")
    tapped = gw.optimize(program, [gw.TapFeatures()], example_inputs=BATCH)
    names = tapped.signature.output_names()
    assert names == [*program.signature.output_names(), "features.model.layers.0", "features.model.layers.1"]
    assert list(tapped.report.rows[0].outputs) == names
    tapped.save(tmp_path / "tapped")
    again = gw.Program.load(tmp_path / "tapped")
    assert torch.equal(again(**BATCH).features["model.layers.1"], tapped(**BATCH).features["model.layers.1"])
    # what later passes make of the features is measured as any output
    small = gw.optimize(tapped, [gw.FuseAll(), gw.QuantizeLinears(bits=4, group_size=16)], example_inputs=BATCH)
    assert small.report.rows[-1].outputs["features.model.layers.0"]["original"]["relative"] > 1e-3
    bare = gw.optimize(tapped, [gw.RemoveTaps()], example_inputs=BATCH)
    assert gw.structurally_equal(bare, program)
    assert torch.equal(bare(**BATCH).logits, program(**BATCH).logits)
    assert gw.optimize(bare, [gw.RemoveTaps()], example_inputs=BATCH).report.rows[0].changed is False


def test_only_some_layers_and_other_taps() -> None:
    program = traced("llama")
    one = gw.TapFeatures(where="model.layers.1")
    tapped = gw.optimize(program, [one], example_inputs=BATCH)
    assert list(tapped(**BATCH).features) == ["model.layers.1"]
    with pytest.raises(gw.InputError, match="has taps already"):
        gw.optimize(tapped, [gw.TapFeatures()], example_inputs=BATCH)


def test_a_layer_that_gives_two_values_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for layer in self.layers:
                x, y = layer["a"](x + y), layer["b"](x * y)
            return x - y

    program = gw.trace(Two(), torch.ones(2, 4))
    with pytest.raises(
        gw.SelectionError, match=r"there is no layer to tap: the layer layers\.0 gives %\w+, %\w+, %\w+ to"
    ):
        gw.TapFeatures()(program)
    with pytest.raises(gw.SelectionError, match="there is no layer to tap"):
        gw.TapFeatures()(gw.trace(nn.Linear(4, 4), torch.ones(2, 4)))


@dataclass(frozen=True, kw_only=True)
class TapWrongly(gw.Pass):
    """Taps, and leaves the last linear without its bias; or takes an output that is no tap."""

    name: ClassVar[str] = "tap-wrongly"
    contract: ClassVar[gw.Exact] = gw.Exact(bitwise=True)
    way: str = "bias"

    def run(self, program: gw.Program) -> bool:
        if self.way == "bias":
            gw.TapFeatures().run(program)
            linear = [node for node in program.nodes if gw.op_name(node) == "aten.linear"][-1]
            with program.edit() as rewriter:
                rewriter.replace(linear, rewriter.call("aten.linear", *linear.args[:2], like=linear), equivalent=False)
            return True
        with program.edit() as rewriter:
            program.output.args = (program.output.args[0][:1],)
            spec = pytree.tree_structure({"hidden": 0})
            program.signature = dataclasses.replace(program.signature, out_spec=spec)
            rewriter.changed = True
        return True


@pytest.mark.parametrize("way", ["bias", "output"])
def test_whoever_changes_the_other_outputs_is_caught(
    way: str, stack: nn.Module, batch: dict[str, torch.Tensor]
) -> None:
    program = gw.trace(stack, batch)
    gw.optimize(program, [gw.TapFeatures()], example_inputs=batch)
    with pytest.raises(gw.ContractViolation, match="promises exact"):
        gw.optimize(program, [TapWrongly(way=way)], example_inputs=batch)
