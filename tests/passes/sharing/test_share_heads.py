"""Attention heads share query and key weights: those most alike, stored once, with the function that this gives."""

from __future__ import annotations

import pytest
import torch
from tests.frontends.decoders import make
from tests.passes.sharing.models import llama, step_of, texts, traced

import graphwright as gw
from graphwright.ir.program import Program


def planted(program: Program) -> None:
    """Key head 1 of layer 2, with its two query heads, becomes nearly that of head 0 in layer 0."""
    with torch.no_grad():
        for name, rows in (("q_proj", 16), ("k_proj", 8)):
            source = program.tensor(f"model.layers.0.self_attn.{name}.weight")[:rows]
            program.tensor(f"model.layers.2.self_attn.{name}.weight")[rows : 2 * rows] = 1.01 * source


def test_the_most_alike_share_first() -> None:
    program = traced()
    planted(program)
    model = llama()
    model.load_state_dict(program.state_dict(), strict=False)
    with torch.no_grad():
        for name, rows in (("q_proj", 16), ("k_proj", 8)):
            source = getattr(model.model.layers[0].self_attn, name).weight[:rows]
            getattr(model.model.layers[2].self_attn, name).weight[rows : 2 * rows] = source
    assert gw.ShareHeads(share=0.13)(program)  # one of eight
    assert program.notes["distinct"] == 7
    gw.verify(program)
    with torch.no_grad():
        torch.testing.assert_close(program(**texts()).logits, model(**texts()).logits, rtol=0, atol=1e-5)


def test_stored_and_trained_once() -> None:
    program, whole = traced(), traced()
    gw.ShareHeads(share=0.5)(program)
    numbers = [sum(each.numel() for name, each in one.tensors().items() if "_proj" in name) for one in (program, whole)]
    table = program.tensor("shared_query_heads.weight")
    assert list(table.shape) == [4, 16, 32]
    assert list(program.tensor("shared_key_heads.weight").shape) == [4, 8, 32]
    assert numbers[1] - numbers[0] == 4 * (32 * 32 + 16 * 32)
    program(**texts()).logits.sum().backward()
    assert table.grad is not None
    assert bool((table.grad.abs().sum((1, 2)) > 0).all())


def test_a_decoding_step() -> None:
    step, plain = step_of(), traced()
    for each in (step, plain):
        gw.ShareHeads(share=0.5)(each)
    ids = texts()["input_ids"]
    cache = [torch.zeros(2, 2, 16, 8) for _ in range(4)]
    with torch.no_grad():
        found = step(
            input_ids=ids, slots=torch.arange(2), starts=torch.zeros(2).long(), rows=torch.arange(7).expand(2, 7),
            keys=cache, values=cache,
        )  # fmt: skip
        torch.testing.assert_close(found["logits"], plain(**texts()).logits, rtol=0, atol=1e-5)


def test_nothing_to_share_and_what_cannot_be() -> None:
    assert not gw.ShareHeads(share=0.0)(traced())
    with pytest.raises(gw.InputError, match="from 0 to below 1"):
        gw.ShareHeads(share=1.0)
    joint = gw.load_decoder(make("gpt-neox", num_hidden_layers=2), check=False)
    with pytest.raises(gw.InputError, match="share whole layers"):
        gw.ShareHeads()(joint)
