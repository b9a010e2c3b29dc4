"""Wrong rewrites, and right ones that look like them: the catalogue that ``test_planted_bugs.py`` runs.

Every entry is a small pass as a person might write it on a bad day. It claims to keep its contract.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

import graphwright as gw
from graphwright.ir.arguments import argument
from graphwright.passes.contract import Contract

Edit = Callable[[gw.Program, gw.Rewriter], None]
EXACT = gw.Exact()
# What a weight-only quantiser declares: INT8 is good to a percent or so, INT4 in small groups to a tenth.
INT8 = gw.Approximate(max_local_error=0.03)
INT4 = gw.Approximate(max_local_error=0.2)


@dataclass(frozen=True)
class Entry:
    """One rewrite: which model it is run on and what it claims."""

    name: str
    model: str
    contract: Contract
    edit: Edit

    def make(self) -> gw.Pass:
        """The rewrite as a pass."""
        edit, promised, title = self.edit, self.contract, self.name

        @dataclass(frozen=True, kw_only=True)
        class Planted(gw.Pass):
            name: ClassVar[str] = title
            contract: ClassVar[Contract] = promised

            def run(self, program: gw.Program) -> bool:
                with program.edit() as rewriter:
                    edit(program, rewriter)
                return True

        return Planted()


WRONG: dict[str, Entry] = {}
RIGHT: dict[str, Entry] = {}


def _into(table: dict[str, Entry], model: str, contract: Contract) -> Callable[[Edit], Edit]:
    def register(edit: Edit) -> Edit:
        name = edit.__name__.replace("_", "-")
        assert name not in table
        table[name] = Entry(name, model, contract, edit)
        return edit

    return register


def wrong(model: str, contract: Contract = EXACT) -> Callable[[Edit], Edit]:
    """Add a wrong rewrite."""
    return _into(WRONG, model, contract)


def right(model: str, contract: Contract = EXACT) -> Callable[[Edit], Edit]:
    """Add a right rewrite."""
    return _into(RIGHT, model, contract)


def find(program: gw.Program, operator: str, number: int = 0, path: str = "") -> Any:
    """A call of an operator, in execution order, in a module whose path contains ``path``."""
    found = [node for node in program.nodes if gw.op_name(node) == operator and path in gw.path_of(node)]
    return found[number]


def results(program: gw.Program) -> Any:
    """What the program returns."""
    return program.output.args[0]


def put(rewriter: gw.Rewriter, old: fx.Node, target: Any, *args: Any, **kwargs: Any) -> None:
    """Replace a node by a call."""
    rewriter.replace(old, rewriter.call(target, *args, like=old, **kwargs))


def again(rewriter: gw.Rewriter, node: fx.Node) -> fx.Node:
    """The same call once more, to build on while the first is replaced."""
    return rewriter.call(node.target, *node.args, like=node, **node.kwargs)


def stored(rewriter: gw.Rewriter, like: fx.Node, tensor: torch.Tensor, name: str = "planted") -> fx.Node:
    """A new constant."""
    return rewriter.weight(f"{name}.tensor", tensor.detach().clone(), like=like)


def weight_of(program: gw.Program, linear: fx.Node) -> torch.Tensor:
    return program.tensor(argument(linear, "weight")).detach()


def with_weight(program: gw.Program, rewriter: gw.Rewriter, linear: fx.Node, tensor: torch.Tensor) -> None:
    """Give a linear another weight."""
    made = stored(rewriter, linear, tensor)
    put(rewriter, linear, "aten.linear", linear.args[0], made, *linear.args[2:])


class SentenceEmbedder(nn.Module):
    """Mean-pooled, normalised sentence embeddings, as sentence-transformers computes them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return hidden, pooled / torch.linalg.vector_norm(pooled, dim=-1, keepdim=True).clamp_min(1e-12)
