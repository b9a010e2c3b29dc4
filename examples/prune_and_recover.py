"""Prune a model and let it learn from what it was before, with its zeros held; then make a smaller dense one of it.

The model is a small stack of feed-forward blocks that learns to count: given a word and a number of steps it says which
word lies that many steps on.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import graphwright as gw

WORDS, WIDTH = 24, 48


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the block computes."""
        changed: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return changed


class Model(nn.Module):
    """Token and step in, logits of the next token out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.steps = nn.Embedding(WORDS, WIDTH), nn.Embedding(8, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, word: torch.Tensor, step: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[rows]`` each; logits ``[rows, words]``."""
        x = self.words(word) + self.steps(step)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(self.norm(x))}


def main() -> None:
    """Train, prune, recover; remove channels, recover."""
    torch.manual_seed(0)
    batches = [batch() for _ in range(40)]
    dense = gw.trace(Model(), {key: batches[0][key] for key in ("word", "step")})
    gw.distill(dense, None, batches, loss=gw.CrossEntropy(), steps=200, learning_rate=3e-3)
    print(f"dense: {accuracy(dense):.0%} right")

    example = {key: batches[0][key] for key in ("word", "step")}
    prune = [gw.PruneLinears(sparsity=0.8), gw.HoldMasks()]
    sparse = gw.optimize(dense, prune, example_inputs=example)
    before = accuracy(sparse)
    losses = [gw.CrossEntropy(), gw.KLDivergence(temperature=2.0), gw.SquareHead()]
    gw.distill(sparse, dense, batches, loss=losses, steps=150, learning_rate=3e-3, checkpoint="run")
    print(f"80 % of the weights pruned: {before:.0%} right, after recovery {accuracy(sparse):.0%}")
    sparse = gw.optimize(sparse, [gw.ReleaseMasks()], example_inputs=example)
    weight = sparse.tensor("layers.0.up.weight")
    print(f"zeros of one weight: {(weight == 0).float().mean().item():.0%}")

    small = gw.optimize(dense, [gw.RemoveChannels(fraction=0.75)], example_inputs=example)
    before = accuracy(small)
    gw.distill(small, dense, batches, loss=losses, steps=150, learning_rate=3e-3)
    counts = [sum(each.numel() for each in program.parameters()) for program in (dense, small)]
    print(f"three quarters of the channels removed: {before:.0%} right, after recovery {accuracy(small):.0%}")
    print(f"parameters: {counts[0]} before, {counts[1]} after")
    small.save("small")


def batch() -> dict[str, torch.Tensor]:
    """Rows of a word, a step, and the word that many steps on."""
    word, step = torch.randint(0, WORDS, (128,)), torch.randint(0, 8, (128,))
    return {"word": word, "step": step, "labels": (word + step) % WORDS}


def accuracy(program: gw.Program) -> float:
    """On every word and step there are."""
    word, step = (each.flatten() for each in torch.meshgrid(torch.arange(WORDS), torch.arange(8), indexing="ij"))
    with torch.no_grad():
        said = program(word=word, step=step)["logits"].argmax(-1)
    return float((said == (word + step) % WORDS).float().mean())


if __name__ == "__main__":
    main()
