"""A small model, and every kind of adapter with options that fit it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import graphwright as gw

WIDTH, HIDDEN = 24, 36
X = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(5))


class Block(nn.Module):
    """Linears of several shapes, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + torch.tanh(self.q(x))
        z: torch.Tensor = y + self.down(torch.relu(self.up(y)))
        return z


class Net(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.out(x)
        return y


@dataclass(frozen=True)
class Case:
    """A kind and where to put it.

    Attributes:
        kind: with options.
        where: in :class:`Net`.
        trained: numbers that train, in all of the net.
        dense: it needs the weight in floating point, so a packed base has no place for it.
    """

    kind: gw.AdapterKind
    trained: int
    where: Any = "blocks.*"
    dense: bool = False
    options: dict[str, Any] = field(default_factory=dict)


# outputs and inputs of the linears of one block
SHAPES = ((WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))


# 24 = 4 · 6 and 36 = 6 · 6, the nearest to their roots
SPLITS = tuple(tuple({24: (4, 6), 36: (6, 6)}[side] for side in shape) for shape in SHAPES)


def low_rank(rank: int) -> int:
    """Numbers of two thin matrices beside every linear."""
    return 2 * sum(rank * (out + into) for out, into in SHAPES)


CASES: dict[str, Case] = {
    "lora": Case(gw.LoRA(rank=4, alpha=8), low_rank(4)),
    "lora-rs": Case(gw.LoRA(rank=3, alpha=6, rank_stabilized=True), low_rank(3)),
    "lora-bias": Case(gw.LoRA(rank=2, alpha=3, bias=True), low_rank(2) + 2 * sum(out for out, _ in SHAPES)),
    "lora-fa": Case(gw.LoRAFA(rank=4), 2 * sum(4 * out for out, _ in SHAPES)),
    "dora": Case(gw.DoRA(rank=3, alpha=6), low_rank(3) + 2 * sum(out for out, _ in SHAPES), dense=True),
    "vera": Case(gw.VeRA(rank=16), 2 * sum(16 + out for out, _ in SHAPES)),
    "vera-drawn": Case(gw.VeRA(rank=16, seed=3, save_projection=False), 2 * sum(16 + out for out, _ in SHAPES)),
    "lokr": Case(gw.LoKr(rank=2, alpha=4), 2 * sum(a * c + 2 * (b + d) for (a, b), (c, d) in SPLITS)),
    "lokr-both": Case(gw.LoKr(rank=1, decompose_both=True), 2 * sum(a + c + b + d for (a, b), (c, d) in SPLITS)),
    "lokr-whole": Case(gw.LoKr(rank=9), 2 * sum(a * c + b * d for (a, b), (c, d) in SPLITS)),
    "loha": Case(gw.LoHa(rank=3, alpha=6), 2 * low_rank(3)),
    "ia3": Case(gw.IA3(), 2 * sum(out for out, _ in SHAPES)),
    "ia3-input": Case(gw.IA3(side="input"), 2 * sum(into for _, into in SHAPES)),
    "lora-xs": Case(gw.LoRAXS(rank=4, std=0.01), 6 * 16),
    "lora-xs-zero": Case(gw.LoRAXS(rank=4, alpha=8, std=0), 6 * 16),
    "nola": Case(gw.NOLA(bases=10, rank=3, alpha=6), 6 * 20),
    "nola-saved": Case(gw.NOLA(bases=5, rank=2, seed=2, save_bases=True), 6 * 10),
    "sora": Case(gw.SoRA(rank=4, scale=2.0), low_rank(4) + 6 * 4),
    "oft": Case(gw.OFT(block=6), 2 * sum(into // 6 * 15 for _, into in SHAPES)),
    "oft-series": Case(gw.OFT(block=6, terms=5), 2 * sum(into // 6 * 15 for _, into in SHAPES)),
    "ether": Case(gw.ETHER(), 2 * sum(into for _, into in SHAPES)),
    "ether-blocks": Case(gw.ETHER(blocks=4), 2 * sum(into for _, into in SHAPES)),
    "ether-plus": Case(gw.ETHERPlus(blocks=2), 2 * sum(2 * (out + into) for out, into in SHAPES)),
    "ether-plus-in": Case(gw.ETHERPlus(blocks=3, both_sides=False), 2 * sum(2 * into for _, into in SHAPES)),
    "compacter": Case(gw.Compacter(bottleneck=8), 4**3 + 2 * sum(3 * (out + 8) for out, _ in SHAPES)),
    "compacter-rank": Case(
        gw.Compacter(bottleneck=6, n=2, rank=2, activation="relu"), 2**3 + 2 * sum(5 * (out + 6) for out, _ in SHAPES)
    ),
    "krona": Case(gw.KronA(), 2 * (2 * 24 + 2 * (27 + 32))),
    "krona-a": Case(gw.KronA((12, 4), scale=2.0), 2 * sum(48 + (o // 12) * (i // 4) for o, i in SHAPES)),
    "bitfit": Case(gw.BitFit(), 2 * (WIDTH + HIDDEN)),
    "bitfit-missing": Case(gw.BitFit(missing=True), 2 * (WIDTH + HIDDEN + WIDTH)),
    "houlsby": Case(gw.HoulsbyAdapter(bottleneck=6), 2 * (2 * 6 * WIDTH + 6 + WIDTH)),
    "parallel": Case(gw.ParallelAdapter(bottleneck=5, activation="tanh"), 2 * (2 * 5 * WIDTH + 5 + WIDTH)),
    "loda": Case(gw.LoDA(rank=3), low_rank(3) + 6 * 2 * 3**2),
    "loda-plus": Case(gw.LoDA(rank=4, alpha=8, outer="activation"), low_rank(4) + 6 * 2 * 4**2),
    "loda-plus-norm": Case(gw.LoDA(rank=2, outer="norm+activation"), low_rank(2) + 6 * 2 * 2**2),
    "krona-block": Case(gw.KronABlock(), 2 * (2 * 12 + 2 * 12)),
    "krona-block-a": Case(gw.KronABlock((6, 4), scale=4.0, biases=1), 2 * (6 * 4 + 4 * 6 + WIDTH)),
    "krona-block-residual": Case(gw.KronABlock((3, 8), biases=2, residual=True), 2 * (24 + 24 + 2 * WIDTH + 1)),
}


def inserted(case: Case, model: nn.Module | None = None, **options: Any) -> gw.OptimizedModel:
    """The net with a case's adapter, verified as it went in."""
    item = gw.InsertAdapters(case.kind, where=case.where, **case.options, **options)
    return gw.optimize(Net() if model is None else model, [item], example_inputs=X)


def stirred(program: gw.Program, seed: int = 0) -> gw.Program:
    """The program, its adapters moved away from where they started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in program.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return program
