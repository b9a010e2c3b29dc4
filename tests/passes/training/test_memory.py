"""Layers computed again in the backward pass, and the memory that training takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.adapters.cases import Net, X
from tests.passes.adapters.models import MODELS, batch_for, language_model, traced
from torch import nn

import graphwright as gw
from graphwright.passes.training.memory import SavedBytes

pytest.importorskip("transformers")


def adapted(
    name: str, kind: gw.AdapterKind | None = None, *before: gw.Pass
) -> tuple[gw.OptimizedModel, dict[str, Any]]:
    batch = batch_for(MODELS[name]())
    adapt = gw.InsertAdapters(kind or gw.LoRA(rank=4), ignore="classifier")
    program = gw.optimize(traced(name), [*before, adapt], example_inputs=batch)
    with torch.no_grad():
        for parameter in program.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return program, batch


def step(program: gw.Program, batch: dict[str, Any]) -> tuple[int, torch.Tensor, dict[str, torch.Tensor]]:
    """Bytes kept for the backward pass, loss and gradients."""
    program.zero_grad(set_to_none=True)
    inputs = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    with SavedBytes(besides=[*program.tensors().values(), *inputs]) as saved:
        loss = program(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in program.named_parameters() if p.grad is not None}
    return saved.total, loss.detach(), found


@pytest.mark.parametrize("name", MODELS)
def test_the_same_gradients_from_less_memory(name: str) -> None:
    program, batch = adapted(name)
    kept, loss, gradients = step(program, batch)
    gw.checkpoint_blocks(program)
    less, again, found = step(program, batch)
    assert less < 0.25 * kept
    assert torch.equal(again, loss)
    assert found.keys() == gradients.keys()
    assert found.keys() == gw.adapter_tensors(program, "default").keys()
    assert all(torch.equal(each, gradients[key]) for key, each in found.items())
    gw.checkpoint_blocks(program, enabled=False)
    assert not program.records.get("training")
    assert step(program, batch)[0] == kept


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [None, 4], ids=["float", "int4"])
def test_what_is_foretold_is_what_is_kept(name: str, bits: int | None) -> None:
    before = [] if bits is None else [gw.QuantizeLinears(bits=bits, group_size=16)]
    program, batch = adapted(name, gw.KronA(), *before)
    foretold = gw.training_memory(program, batch)
    assert foretold.kept == step(program, batch)[0]
    assert not foretold.checkpointed
    assert foretold.total == foretold.state + foretold.kept
    gw.checkpoint_blocks(program)
    foretold = gw.training_memory(program, batch)
    assert foretold.kept_at_layers == step(program, batch)[0]
    assert foretold.total == foretold.state + foretold.kept_at_layers + foretold.largest_layer
    # Every layer is alike, and but for them nothing is computed again.
    assert 2.5 < (foretold.kept - foretold.kept_at_layers) / foretold.largest_layer < 3


def test_state_is_counted_to_the_byte() -> None:
    program, batch = adapted("llama", gw.LoRA(rank=4), gw.QuantizeLinears(bits=8))
    own = gw.adapter_tensors(program, "default")
    found = gw.training_memory(program, batch, optimizer="adam")
    assert found.adapters == sum(each.numel() for each in own.values()) * 4
    assert found.base == sum(t.numel() * t.element_size() for key, t in program.tensors().items() if key not in own)
    optimizer = torch.optim.Adam([p for p in program.parameters() if p.requires_grad])
    program(**batch).loss.backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    assert found.optimizer == sum(value.numel() * value.element_size() for value in moments)
    assert found.gradients == sum(p.grad.numel() * p.grad.element_size() for p in own.values() if p.grad is not None)
    assert gw.training_memory(program, batch, optimizer="sgd").optimizer == 0
    assert gw.training_memory(program, batch, optimizer="momentum").optimizer == found.optimizer // 2


def test_large_sizes_take_no_memory_and_no_time() -> None:
    program, _ = adapted("llama")
    sizes = (64, 512)
    batch = {
        key: torch.empty(sizes, dtype=torch.long, device="meta") for key in ("input_ids", "attention_mask", "labels")
    }
    found = gw.training_memory(program, batch)
    assert found.shapes == (sizes,) * 3
    assert found.kept > 200 * gw.training_memory(program, batch_for(language_model())).kept
    text = str(found)
    assert "training takes" in text
    assert "all is kept *" in text
    assert "[64, 512]" in text


def test_without_gradients_nothing_changes() -> None:
    program, batch = adapted("llama")
    wanted = program(**batch).logits
    gw.checkpoint_blocks(program)
    with torch.no_grad():
        assert torch.equal(program(**batch).logits, wanted)
    onto_cpu = gw.optimize(program, [], example_inputs=batch)
    assert torch.equal(onto_cpu(**batch).logits, wanted)


def test_the_setting_is_saved_and_cloned_and_survives_edits(tmp_path: Path) -> None:
    program, batch = adapted("llama")
    gw.checkpoint_blocks(program)
    less = step(program, batch)[0]
    program.save(tmp_path)
    for other in (gw.Program.load(tmp_path), program.clone(copy_weights=True)):
        assert step(other, batch)[0] == less
    # The stretches are those of the graph as it is after an edit.
    assert gw.InsertAdapters(gw.LoRA(rank=2), adapter_name="second", ignore="classifier")(program)
    _, loss, found = step(program, batch)
    gw.checkpoint_blocks(program, enabled=False)
    _, wanted, gradients = step(program, batch)
    assert torch.equal(loss, wanted)
    assert all(torch.equal(each, gradients[key]) for key, each in found.items())
    assert found.keys() > gw.adapter_tensors(program, "second").keys()


def test_several_outputs_and_inputs_that_take_gradients() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            first = self.net.blocks[0](x)
            left, right = first.chunk(2, -1)  # a list crosses the border of a layer
            second = self.net.blocks[1](torch.cat((right, left), -1))
            return {"x": x, "first": first, "left": left, "out": self.net.out(second)}

    program = gw.optimize(Two(), [gw.InsertAdapters("lora", where="net.blocks.*")], example_inputs=X)
    results = []
    for enabled in (False, True):
        gw.checkpoint_blocks(program, enabled)
        x = X.clone().requires_grad_()
        program.zero_grad(set_to_none=True)
        outputs = program(x)
        sum(each.square().sum() for each in outputs.values()).backward()
        results.append([*outputs.values(), x.grad, *(p.grad for p in program.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_cannot_be_is_refused() -> None:
    program = gw.trace(nn.Sequential(nn.Linear(3, 3)).append(nn.Tanh()), torch.ones(2, 3))
    flat = gw.trace(nn.Linear(3, 3), torch.ones(2, 3))
    gw.checkpoint_blocks(program)
    with pytest.raises(gw.ProgramError, match="has no layers") as caught:
        gw.checkpoint_blocks(flat)
    assert "model.layers.3" in str(caught.value)
    with pytest.raises(gw.InputError, match="no optimizer 'lion'"):
        gw.training_memory(program, torch.ones(2, 3), optimizer="lion")
    for parameter in flat.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(gw.InputError, match="nothing trains"):
        gw.training_memory(flat, torch.ones(2, 3))
    with pytest.raises(gw.InputError, match="the program takes"):
        gw.training_memory(program, torch.ones(2, 4))
