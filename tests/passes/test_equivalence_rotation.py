"""Rotations of hidden states: exact, folded, and refused where they would not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.passes.quantization.equivalence.hadamard import hadamard, random_orthogonal, random_rotation

IDS = torch.arange(10).reshape(2, 5)


class Layer(nn.Module):
    def __init__(self, kind: type[nn.Module], post: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = kind(24), nn.Linear(24, 32), nn.Linear(32, 24)
        self.post = post

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.post:
            result: torch.Tensor = self.norm(x + self.down(torch.relu(self.up(x))))
            return result
        result = x + self.down(torch.relu(self.up(self.norm(x))))
        return result


class Model(nn.Module):
    def __init__(
        self, kind: type[nn.Module] = nn.RMSNorm, *, tied: bool = True, post: bool = False, raw: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.layers = nn.ModuleList([Layer(kind, post), Layer(kind, post)])
        self.norm, self.lm_head = kind(24), nn.Linear(24, 40, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.raw = raw
        with torch.no_grad():
            for name, each in self.named_parameters():
                if "norm" in name:
                    each.add_(0.5 * torch.randn(24))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        found = {"logits": self.lm_head(self.norm(x))}
        return {**found, "hidden": x} if self.raw else found


@pytest.mark.parametrize("size", [1, 2, 12, 20, 24, 28, 36, 40, 44, 60, 64, 96, 384, 768])
def test_hadamard_matrices(size: int) -> None:
    found = hadamard(size)
    assert found is not None
    assert torch.allclose(found @ found.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found.abs(), torch.full_like(found, size**-0.5))
    turn = random_rotation(size, 3)
    assert torch.allclose(turn @ turn.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(turn, random_rotation(size, 3))


def test_sizes_without_hadamard_matrix() -> None:
    assert hadamard(6) is None
    assert hadamard(0) is None
    with pytest.raises(gw.InputError, match="size 6"):
        random_rotation(6, 0)
    turn = random_orthogonal(6, 0)
    assert torch.allclose(turn @ turn.T, torch.eye(6, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("how", ["hadamard", "orthogonal"])
def test_hidden_states_turn_and_outputs_stay(kind: type[nn.Module], how: str) -> None:
    torch.manual_seed(1)
    model = Model(kind).eval()
    fused = gw.optimize(model, [gw.FuseLayerNorm(), gw.FuseRMSNorm()], example_inputs=IDS)
    found = gw.optimize(fused, [gw.RotateHiddenStates(kind=how, seed=5)], example_inputs=IDS)
    (row,) = found.report.rows
    assert row.notes["hidden_states"] == 1
    assert row.notes["untied_bytes"] == 40 * 24 * 4
    assert torch.allclose(found(IDS)["logits"], model(IDS)["logits"], atol=1e-5)
    names = found.tensors()
    old, new = model.embed.weight.detach(), names["embed.weight"].detach()
    centred = old - old.mean(1, keepdim=True) if kind is nn.LayerNorm else old
    assert torch.allclose(new @ new.T, centred @ centred.T, atol=1e-4)  # turned, not stretched
    assert not torch.allclose(new, centred, atol=0.1)
    assert torch.equal(names["norm.weight"], torch.ones(24))
    assert "lm_head.weight" in names
    assert "aten.layer_norm" not in str(found)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "leaves the model": ({"raw": True}, {}, "leaves the model"),
    "norms behind the sums": ({"post": True}, {}, "%layer_norm gives is added to"),
    "tied": ({}, {"untie": False}, "set untie=True"),
    "not selected": ({}, {"where": "layers.0"}, "not selected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    shape, options, reason = REFUSED[case]
    torch.manual_seed(1)
    program = gw.trace(Model(nn.LayerNorm, **shape).eval(), example_inputs=IDS)
    turn = gw.RotateHiddenStates(**options)
    reasons = [item.reason for item in turn.refusals(program)]
    assert any(reason in each for each in reasons), reasons
    assert not turn(program)


def test_bad_options_and_order() -> None:
    with pytest.raises(gw.InputError, match="kind"):
        gw.RotateHiddenStates(kind="random")
    with pytest.raises(gw.InputError, match="seed"):
        gw.RotateHiddenStates(seed=-1)
    with pytest.raises(gw.OrderError, match="must come before"):
        gw.optimize(Model().eval(), [gw.QuantizeLinears(), gw.RotateHiddenStates()], example_inputs=IDS)
