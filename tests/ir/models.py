"""Small models and texts that the tests of the IR share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphwright.frontends.torch import trace
from graphwright.ir.program import Program

# Every part of the text form in one program.
EVERYTHING = """\
program Everything(batch: 1..@3, sequence: 2..64@5) {
  require "batch != sequence"
  alias "head.weight" = "embed.weight"
  forward ids, scale, flag
  takes ((input "ids",), {"scale": input "scale", "flag": True})
  gives {"logits": *, "parts": (*, [*])}

  %w = weight "embed.weight" : f32[11, 4]  #tied
  %b = buffer "mask" : bool[4]
  %f = weight "frozen" : f32[4, 4] strides (1, 4)  frozen @inner "net.py:3"
  %t = buffer "state" : f32[4]  trained
  %ids = input "ids" : i64[batch, sequence]
  %scale = input "scale" : f32[batch, 1, 1]
  %n = aten.sym_size.int(%ids, 1) : int(sequence)
  %x = aten.embedding(%w, %ids) : f32[batch, sequence, 4]  @embed "net.py:10"
  %scaled = aten.mul.Tensor(%x, %scale) : f32[batch, sequence, 4]  @"odd path #1" #a/b #"two words"
  %shifted = aten.add.Tensor(%scaled, %t, alpha=-0.5) : f32[batch, sequence, 4]
  %clamped = aten.clamp(%shifted, -inf, 1e+30) : f32[batch, sequence, 4]
  %line = aten.linear(%clamped, %f) : f32[batch, sequence, 4]  @inner.linear #quantized "net.py:12"
  %kept = aten.where.ScalarOther(%b, %line, nan) : f32[batch, sequence, 4]
  %double = aten.to.dtype(%kept, f64) : f64[batch, sequence, 4]
  %twice = aten.cat([%double, %double]) : f64[2*batch, sequence, 4]
  %split = aten.split_with_sizes(%twice, [1, 3], 2) : (f64[2*batch, sequence, 1], f64[2*batch, sequence, 3])
  %left = py.getitem(%split, 0) : f64[2*batch, sequence, 1]
  %right = py.getitem(%split, 1) : f64[2*batch, sequence, 3]
  %positions = aten.arange(2, device=device("cpu"), layout=torch.strided) : i64[2]
  %picked = aten.index.Tensor(%kept, [None, %positions]) : f32[batch, 2, 4]
  %logits = aten.linear(%picked, %w) : f32[batch, 2, 11]  @head
  return %logits, %left, %right
}
"""


def everything_tensors() -> dict[str, torch.Tensor]:
    """Weights that fit :data:`EVERYTHING`."""
    generator = torch.Generator().manual_seed(7)
    return {
        "embed.weight": torch.randn(11, 4, generator=generator),
        "mask": torch.tensor([True, False, True, True]),
        "frozen": torch.randn(4, 4, generator=generator).t(),
        "state": torch.randn(4, generator=generator),
    }


class Encoder(nn.Module):
    """Embedding, two feed-forward layers with residuals, a head tied to the embedding, and a buffer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, width)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width)) for _ in "ab"]
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("gain", torch.linspace(0.5, 1.5, width))
        self.head = nn.Linear(width, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0
    ) -> dict[str, torch.Tensor]:
        x = self.embed(ids) * self.gain
        for layer in self.layers:
            x = x + layer(x)
        x = self.norm(x) * scale
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        return {"hidden": x, "logits": self.head(x)}


def encoder_inputs() -> dict[str, torch.Tensor]:
    """A call of :class:`Encoder`."""
    ids = torch.randint(0, 13, (3, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    return {"ids": ids, "mask": mask}


def encoder_program() -> tuple[Encoder, Program]:
    """An :class:`Encoder` and its trace."""
    torch.manual_seed(11)
    model = Encoder().eval()
    return model, trace(model, encoder_inputs())


def flat(output: Any) -> list[torch.Tensor]:
    """The tensors of an output in order."""
    return list(torch.utils._pytree.tree_leaves(output))


def assert_same_bits(found: Any, expected: Any) -> None:
    """Two outputs agree bit for bit."""
    ours, theirs = flat(found), flat(expected)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        assert torch.equal(one.isnan(), other.isnan())
