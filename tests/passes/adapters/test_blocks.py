"""Feed-forward and attention blocks are found by what they compute."""

from __future__ import annotations

import pytest
import torch
from tests.passes.adapters.families import BATCH, FAMILIES, traced
from torch import nn

import graphwright as gw
from graphwright.passes.adapters.blocks import ATTENTION, FEED_FORWARD, Block, attention_at, blocks, feed_forward_at

# last linears of a feed-forward block and an attention; the first linears of the former
WHERE = {
    "bert": ("encoder.layer.{}.output.dense", "encoder.layer.{}.attention.output.dense", ["intermediate.dense"]),
    "gpt2": ("transformer.h.{}.mlp.c_proj", "transformer.h.{}.attn.c_proj", ["c_fc"]),
    "llama": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj", ["up_proj", "gate_proj"]),
    "t5": ("encoder.block.{}.layer.1.DenseReluDense.wo", "encoder.block.{}.layer.0.SelfAttention.o", ["wi"]),
}


def found(program: gw.Program, kind: str) -> list[Block]:
    pairs = list(blocks(program, (kind,)))
    assert not [item for _, item in pairs if isinstance(item, str)]
    return [item for _, item in pairs if isinstance(item, Block)]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[str, gw.Program]:
    name: str = request.param
    return name, traced(name)


def test_of_every_family(family: tuple[str, gw.Program]) -> None:
    name, program = family
    forward, attention, first = WHERE[name]
    bodies = found(program, FEED_FORWARD)
    assert [block.last.path for block in bodies] == [forward.format(i) for i in range(2)]
    for block in bodies:
        assert sorted(gw.path_of(node) for node in block.first) == sorted(
            next(gw.path_of(n) for n in block.first if gw.path_of(n).endswith(end)) for end in first
        )
        assert all(node.args[0] is block.x or node.args[1] is block.x for node in block.first)
    around = found(program, ATTENTION)
    assert [block.last.path for block in around] == [attention.format(i) for i in range(2)]


@pytest.mark.parametrize("where", ["fused", "quantized", "adapted"])
def test_as_well_after_other_passes(family: tuple[str, gw.Program], where: str) -> None:
    name, program = family
    tables: dict[str, list[gw.Pass]] = {
        "fused": [gw.Cleanup(), gw.FuseAll()],
        "quantized": [gw.Cleanup(), gw.QuantizeLinears(bits=8, group_size=16)],
        "adapted": [gw.InsertAdapters("lora"), gw.InsertAdapters("krona", adapter_name="second")],
    }
    changed = gw.optimize(program, tables[where], example_inputs=BATCH)
    assert [block.last.path for block in found(changed, FEED_FORWARD)] == [WHERE[name][0].format(i) for i in range(2)]
    assert [block.last.path for block in found(changed, ATTENTION)] == [WHERE[name][1].format(i) for i in range(2)]


class Odd(nn.Module):
    """Two linears and something between them."""

    def __init__(self, between: str, out: int = 8) -> None:
        super().__init__()
        self.between = between
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.between:
            case "nothing":
                y: torch.Tensor = self.down(self.up(x))
            case "two values":
                y = self.down(torch.relu(self.gate(x + 1)) * self.up(x))
            case "cumsum":
                y = self.down(torch.relu(self.up(x).cumsum(-1)))
            case "pooled":
                y = self.down(torch.relu(self.up(x).mean(0, keepdim=True)))
            case _:
                y = self.down(torch.relu(self.up(x)))
        return y


@pytest.mark.parametrize(
    ("between", "out", "reason"),
    [
        ("two values", 8, "linears that read different values"),
        ("cumsum", 8, "depends on %cumsum, which is no linear"),
        ("pooled", 8, "depends on %mean, which is no linear"),
        ("relu", 5, "takes 8 features and gives 5"),
    ],
)
def test_what_is_none_says_why(between: str, out: int, reason: str) -> None:
    program = gw.trace(Odd(between, out), torch.randn(3, 8))
    with pytest.raises(gw.SelectionError, match="there is no place for krona-block") as caught:
        gw.InsertAdapters("krona-block")(program)
    assert reason in str(caught.value)


def test_two_linears_without_an_activation_are_none() -> None:
    program = gw.trace(Odd("nothing"), torch.randn(3, 8))
    assert [feed_forward_at(program, node) for node in program.nodes] == [None] * len(program.nodes)


def test_attentions_without_linears_say_why() -> None:
    class Bare(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    program = gw.trace(Bare(), torch.randn(1, 2, 5, 4))
    found = [attention_at(program, node) for node in program.nodes]
    assert [item for item in found if item] == [
        "the value of %scaled_dot_product_attention goes to no linears, not to one"
    ]


def test_an_attention_that_is_spelled_out() -> None:
    class Eager(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = torch.matmul(self.q(x), self.k(x).transpose(-1, -2)) / 8**0.5
            y: torch.Tensor = self.o(torch.matmul(torch.softmax(scores, -1), self.v(x)))
            return y

    program = gw.trace(Eager(), torch.randn(2, 5, 8))
    (block,) = found(program, ATTENTION)
    assert block.last.path == "o"
    assert block.x.op == "placeholder"
