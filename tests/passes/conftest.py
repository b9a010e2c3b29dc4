"""Small models and passes that the pass tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

import graphwright as gw


class Block(nn.Module):
    """A residual feed-forward block with dropout, small enough to trace in a moment."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(self.norm(x)))
        result: torch.Tensor = x + self.dropout(self.down(hidden))
        return result


class Stack(nn.Module):
    """Two blocks and a head over token ids with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 7)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        pooled = (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return {"hidden": x, "logits": self.head(pooled)}


@pytest.fixture
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    return {"ids": ids, "mask": mask}


@dataclass(frozen=True, kw_only=True)
class DropDropout(gw.Pass):
    """``dropout(x, p, train=False)`` -> ``x``."""

    name: ClassVar[str] = "drop-dropout"
    contract: ClassVar[gw.Exact] = gw.Exact(bitwise=True)

    def run(self, program: gw.Program) -> bool:
        chosen = self.selected(program)
        with program.edit() as rewriter:
            for node in program.nodes:
                if gw.op_name(node) == "aten.dropout" and chosen(node):
                    rewriter.replace(node, node.args[0])
        return rewriter.changed


@dataclass(frozen=True, kw_only=True)
class ScaleLinears(gw.Pass):
    """Multiply the weights of linears by ``factor``: wrong on purpose unless the factor is 1."""

    name: ClassVar[str] = "scale-linears"
    contract: ClassVar[gw.Approximate] = gw.Approximate(max_local_error=0.2)
    factor: float = 1.05

    def run(self, program: gw.Program) -> bool:
        chosen = self.selected(program)
        with program.edit() as rewriter:
            for node in program.nodes:
                if gw.op_name(node) != "aten.linear" or not chosen(node):
                    continue
                weight = node.args[1]
                scaled = nn.Parameter(program.tensor(weight).detach() * self.factor)
                made = rewriter.weight(f"{weight.target}_scaled", scaled, like=node)
                rewriter.replace(node, rewriter.call("aten.linear", node.args[0], made, *node.args[2:], like=node))
        return rewriter.changed


@pytest.fixture(scope="session")
def listing() -> Callable[[gw.Program], list[str]]:
    """The calls of a program, one line each: ``%y = aten.relu(%x)``."""

    def write(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{value.name}"
        return f"[{', '.join(map(write, value))}]" if isinstance(value, list | tuple) else repr(value)

    def lines(program: gw.Program) -> list[str]:
        found = []
        for node in program.nodes:
            if node.op == "call_function":
                named = [f"{key}={write(value)}" for key, value in node.kwargs.items()]
                found.append(f"%{node.name} = {gw.op_name(node)}({', '.join([*map(write, node.args), *named])})")
        return found

    return lines
