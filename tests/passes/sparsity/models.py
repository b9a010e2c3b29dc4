"""A small decoder, its calibration data, and a plain SparseGPT to hold ours against."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import graphwright as gw

WORDS, WIDTH, HEADS = 50, 32, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linears = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in linears)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        found: torch.Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return found


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm(x))
        found: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return found


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.lm_head(x)}


def ids(seed: int = 0, rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, WORDS, (rows, 24), generator=generator)}


def batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    return [ids(seed, rows=4) for seed in range(count)]


@functools.cache
def _traced() -> gw.Program:
    torch.manual_seed(3)
    return gw.trace(Decoder().eval(), ids())


def decoder() -> gw.Program:
    """A program of its own; its weights are shared, and not to be written into."""
    return _traced().clone()


def pruned(**options: Any) -> gw.Program:
    program = decoder()
    assert gw.PruneLinears(**options)(program)
    return program


def names(program: gw.Program) -> list[str]:
    """Of the weights that were pruned."""
    return list(gw.pruned_weights(program))


def sparse_gpt(
    weight: torch.Tensor,
    moment: torch.Tensor,
    sparsity: float,
    *,
    damping: float = 0.01,
    block: int = 128,
    among: int = 0,
) -> torch.Tensor:
    """The published algorithm as it is written: float64, the inverse's upper Cholesky factor, columns from the left.

    The mask of each block of columns is what costs least over all rows; with ``among``, of every so many columns of a
    row the fraction ``sparsity`` goes, chosen when the first of them is reached.
    """
    w, h = weight.double().clone(), moment.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    result, columns = torch.zeros_like(w), w.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, d = w[:, start:stop].clone(), inverse[start:stop, start:stop]
        errors = torch.zeros_like(part)
        scores = (part / d.diagonal()) ** 2
        gone = torch.zeros_like(part, dtype=torch.bool)
        if not among:
            count = math.ceil(scores.numel() * sparsity - 0.5)
            gone.view(-1)[scores.flatten().argsort()[:count]] = True
        for column in range(stop - start):
            if among and column % among == 0:
                some = (part[:, column : column + among] / d.diagonal()[column : column + among]) ** 2
                first = some.argsort(dim=1)[:, : round(among * sparsity)]
                gone[:, column : column + among] = torch.zeros_like(some, dtype=torch.bool).scatter_(1, first, True)
            value = torch.where(gone[:, column], 0.0, part[:, column])
            result[:, start + column] = value
            error = (part[:, column] - value) / d[column, column]
            part[:, column:] -= error[:, None] * d[column, column:][None]
            errors[:, column] = error
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return result
