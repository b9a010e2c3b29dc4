"""Passes that rescale what adapters read leave their values right, and their tensors alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from tests.passes.adapters.cases import stirred
from torch import nn
from torch.nn import functional

import graphwright as gw

G = torch.Generator().manual_seed(0)
X = torch.randn(4, 6, 16, generator=G)
DATA = [torch.randn(8, 6, 16, generator=G) for _ in range(8)]


class Layer(nn.Module):
    """Norms before linears that have adapters, of which some see features much larger than others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.norm_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        with torch.no_grad():
            for norm in (self.norm, self.norm_2):
                norm.weight.mul_(torch.rand(16) * 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (each(h).unflatten(-1, (4, 4)).transpose(1, 2) for each in (self.q, self.k, self.v))
        x = x + self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: torch.Tensor = x + self.down(functional.relu(self.up(self.norm_2(x))))
        return out


@lru_cache
def adapted() -> gw.Program:
    insert = gw.InsertAdapters(gw.LoRA(rank=2), where=("q", "v", "o", "up", "down"))
    return stirred(gw.optimize(Layer(), [insert], example_inputs=X))


PASSES: dict[str, Callable[[], gw.Pass]] = {
    "smooth-activations": lambda: gw.SmoothActivations(calibration=DATA),
    "scale-salient-channels": lambda: gw.ScaleSalientChannels(calibration=DATA, bits=4, group_size=16),
    "split-outlier-weights": gw.SplitOutlierWeights,
    "cleanup": gw.Cleanup,
    "fuse-all": gw.FuseAll,
}


@pytest.mark.parametrize("name", PASSES)
def test_equivalent_transformations(name: str) -> None:
    program = adapted()
    changed = gw.optimize(program, [PASSES[name]()], example_inputs=X)
    assert changed.report.rows[0].contract == "exact"
    if name not in ("cleanup",):
        assert any(row.changed for row in changed.report.rows)
    assert float((changed(X) - program(X)).detach().norm() / program(X).detach().norm()) < 1e-6
    tensors = gw.adapter_tensors(program, "default")
    assert gw.adapter_tensors(changed, "default").keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert changed.tensor(key) is tensor
    bare = gw.optimize(changed, [gw.RemoveAdapters()], example_inputs=X)
    assert float((bare(X) - Layer()(X)).detach().norm() / Layer()(X).detach().norm()) < 1e-6


def test_loftqs_factors_are_an_adapter() -> None:
    """What LoftQ puts beside a quantised base can be saved, trained, merged and taken out like any other."""
    quantise = gw.QuantizeLinears(bits=4, group_size=16, compensation=gw.LoftQ(4, steps=2), where=("q", "up"))
    program = gw.optimize(Layer(), [quantise], example_inputs=X)
    (found,) = gw.adapters_of(program).values()
    assert (found.name, sorted(found.sites)) == ("loftq", ["q", "up"])
    assert found.kind == gw.LoRA(rank=4)
    assert len(gw.adapter_parameters(program, "loftq")) == 4
    bare = gw.optimize(program, [gw.RemoveAdapters()], example_inputs=X)
    assert not any("adapter" in gw.tags_of(node) for node in bare.nodes)
    merged = gw.optimize(program, [gw.MergeAdapters(requantize=True)], example_inputs=X)
    assert not any("adapter" in gw.tags_of(node) for node in merged.nodes)
