"""Layers are found by what the graph computes: those that module paths name, and those that nothing names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.frontends.decoders import FAMILIES, make
from torch import nn

import graphwright as gw
from graphwright.ir.blocks import blocks_of
from graphwright.ir.program import Program
from graphwright.ir.stacks import Stack

WORDS = ("ash", "birch", "cedar", "elm", "fir", "hazel")
DEPTH = {"gpt2": "n_layer", "bloom": "n_layer", "mpt": "n_layers"}


class PreNorm(nn.Module):
    """``x + f(norm(x))``."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """``[..., width]``."""
        result: torch.Tensor = x + self.down(torch.relu(self.up(self.norm(x)))) * torch.sigmoid(scale)
        return result


class Named(nn.Module):
    """Layers whose names have no number, each with a name of its own, and a context that all read."""

    def __init__(self, inner: dict[str, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)
        self.order = list(inner)
        for name, size in inner.items():
            self.add_module(name, PreNorm(8, size))

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """``[batch, length, 5]``."""
        x = self.embed(ids)
        for name in self.order:
            x = getattr(self, name)(x, scale)
        result: torch.Tensor = self.head(x)
        return result


def named(**inner: int) -> Program:
    batch = {"ids": torch.zeros(2, 3, dtype=torch.int64), "scale": torch.ones(1)}
    return gw.trace(Named(inner).eval(), batch)


def weights_of(stack: Stack) -> list[set[str]]:
    return [{str(node.target) for node in layer.weights} for layer in stack.layers]


@pytest.mark.parametrize(
    ("name", "prepared"),
    [*((name, False) for name in sorted(FAMILIES)), ("llama", True), ("gpt2", True), ("gemma3", True)],
)
def test_decoders_have_the_layers_that_their_paths_say(name: str, prepared: bool) -> None:
    program = gw.load_decoder(make(name, **{DEPTH.get(name, "num_hidden_layers"): 2}), check=False)
    if prepared:
        gw.run_passes(program, [gw.PrepareDecoder(length=64)])
    stacks = gw.find_stacks(program)
    by_path = [block for block in blocks_of(program) if block.path]
    read = [{each for node in block.nodes for each in node.all_input_nodes} for block in by_path]
    wanted = [{str(node.target) for node in nodes if node.op == "get_attr"} for nodes in read]
    assert len(stacks) == 1
    assert weights_of(stacks[0]) == wanted
    assert [layer.path for layer in stacks[0].layers] == [block.path for block in by_path]
    assert [len(layer.inputs) for layer in stacks[0].layers] == [len(stacks[0].layers[0].inputs)] * 2


def test_names_that_say_nothing() -> None:
    program = named(**dict.fromkeys(WORDS, 16))
    (stack,) = gw.find_stacks(program)
    parts = ("down.bias", "down.weight", "norm.bias", "norm.weight", "up.bias", "up.weight")
    assert weights_of(stack) == [{f"{word}.{part}" for part in parts} for word in WORDS]
    assert str(stack) == "6 layers of 6 calls, ash to hazel"
    for one, other in zip(stack.layers, stack.layers[1:], strict=False):
        assert one.exit is other.entry
        assert [node.target for node in one.nodes] == [node.target for node in other.nodes]


def test_blocks_fall_back_on_structure() -> None:
    program = named(**dict.fromkeys(WORDS, 16))
    assert [block.path for block in blocks_of(program) if block.path] == list(WORDS)
    batch = {"ids": torch.arange(6).reshape(2, 3), "scale": torch.ones(1)}
    program(**batch).sum().backward()
    plain = {name: each.grad.clone() for name, each in program.named_parameters() if each.grad is not None}
    program.zero_grad()
    gw.checkpoint_blocks(program)
    program(**batch).sum().backward()
    assert all(torch.equal(each.grad, plain[name]) for name, each in program.named_parameters())


def test_what_all_layers_read_belongs_to_none() -> None:
    program = named(**dict.fromkeys(WORDS[:3], 16))
    gw.Cleanup()(program)  # the context is computed in the first layer only now
    (stack,) = gw.find_stacks(program)
    assert [len(layer.nodes) for layer in stack.layers] == [6, 6, 6]
    inside = {node for layer in stack.layers for node in layer.nodes}
    assert [node.name for node in program.nodes if "sigmoid" in node.name and node in inside] == []


def test_widths_that_differ_are_found_too() -> None:
    (stack,) = gw.find_stacks(named(ash=16, birch=24))
    assert len(stack.layers) == 2


def test_post_norm_layers_begin_behind_the_norm() -> None:
    from transformers import BertConfig, BertModel

    config: Any = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    model: Any = BertModel(config)
    program = gw.trace(model.eval(), batch)
    (stack,) = gw.find_stacks(program)
    assert [layer.path for layer in stack.layers] == [f"encoder.layer.{number}" for number in range(3)]
    assert all(len(set(layer.weights)) == 16 for layer in stack.layers)


def test_encoder_and_decoder_are_two_stacks() -> None:
    from transformers import T5Config, T5Model

    config: Any = T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2, dropout_rate=0.0
    )
    ids = torch.ones(2, 5, dtype=torch.int64)
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :4], "use_cache": False}
    model: Any = T5Model(config)
    program = gw.trace(model.eval(), batch)
    found = {stack.layers[0].path.split(".")[0]: len(stack.layers) for stack in gw.find_stacks(program)}
    assert found == {"encoder": 3, "decoder": 2}


def test_nothing_repeated() -> None:
    assert gw.find_stacks(named(ash=16)) == ()
