"""Decoding steps made smaller: their caches have fewer heads, and they compute what zeros would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frontends.decoders import traced
from tests.passes.removal.oracle import reduced

import graphwright as gw
from graphwright.backends.reference import ReferenceBackend
from graphwright.ir.decoder import DecoderLayout

pytest.importorskip("transformers")

KINDS = {
    "heads": gw.RemoveHeads(fraction=0.5),
    "channels": gw.RemoveChannels(fraction=0.3),
    "hidden": gw.RemoveHiddenDims(fraction=0.25),
}


def prepared(family: str) -> gw.Program:
    step = traced(family)[1].clone()
    gw.PrepareDecoder()(step)
    return step


def logits(step: gw.Program) -> torch.Tensor:
    """Of a prompt and of one token after it, in slots that are not in order."""
    session = ReferenceBackend().lower(step).session(slots=2, capacity=12)
    slots, starts = torch.tensor([1, 0]), torch.zeros(2, dtype=torch.int64)
    prompt = torch.tensor([[5, 17, 30, 44], [22, 71, 3, 9]])
    first = session.step(prompt, slots, starts, torch.full((2, 1), 3)).clone()
    second = session.step(torch.tensor([[7], [8]]), slots, starts + 4, torch.zeros(2, 1, dtype=torch.int64))
    return torch.cat((first, second), 1).double()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-alibi", "gemma2"])
def test_steps_equal_zeros(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = prepared(family)
    whole = logits(step)
    for kind, item in KINDS.items():
        small, zeroed = reduced(step, item, monkeypatch)
        found, wanted = logits(small), logits(zeroed)
        assert (found - wanted).norm() <= 1e-6 * wanted.norm(), kind
        assert (whole - wanted).norm() > 1e-3 * wanted.norm(), kind
        before, after = (DecoderLayout.of(each).keys for each in (step, small))
        if kind == "heads":
            assert [heads for heads, _ in after] == [heads // 2 for heads, _ in before]
        else:
            assert after == before


def test_one_layer_with_fewer_heads_decodes_on_the_cpu_from_a_packed_file(tmp_path: Path) -> None:
    given: Any = {"max_new_tokens": 6, "stop_tokens": []}
    passes = [gw.RemoveHeads(fraction=0.5, where="model.layers.0"), gw.RemoveChannels(fraction=0.3)]
    small: Any = gw.optimize(prepared("llama"), passes, verify=False)
    assert small.layout.keys == ((1, 8), (2, 8))
    wanted = small.generate([[1, 2, 3], [7]], **given).tokens
    small.save(tmp_path / "small")
    again = gw.Program.load(tmp_path / "small")
    on_cpu: Any = gw.optimize(again, [gw.QuantizeLinears(bits=8)], target="cpu", verify=False)
    on_cpu.save_packed(tmp_path / "packed")
    packed: Any = gw.load_packed(tmp_path / "packed")
    assert packed.generate([[1, 2, 3], [7]], **given).tokens == on_cpu.generate([[1, 2, 3], [7]], **given).tokens
    plain: Any = gw.optimize(again, [], target="cpu", verify=False)
    assert plain.generate([[1, 2, 3], [7]], **given).tokens == wanted
