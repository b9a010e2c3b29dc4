"""Weights whose values kernels have packed: what becomes of a program's own."""

from __future__ import annotations

import torch
from torch import fx, nn

from graphwright.ir.mapped import give_back_freed, mapped, release
from graphwright.ir.program import Program

# Memory is given back whenever so many bytes have been let go of.
_MUCH = 1 << 25


class SpentWeights:
    """Lets go of weights as kernels take them over, so that both forms are in memory for one layer only.

    Args:
        program: being lowered.
        keep: leave the program its weights; only the pages of mapped ones are let go of.
    """

    def __init__(self, program: Program, *, keep: bool) -> None:
        self._program, self._keep, self._freed = program, keep, 0
        self._mapped = {id(tensor) for tensor in mapped(program.tensors().values())}
        self._readers: dict[str, set[fx.Node]] = {}
        for node in program.nodes:
            if node.op == "get_attr":
                self._readers.setdefault(str(node.target), set()).update(node.users)

    def packed(self, node: fx.Node, inputs: tuple[object, ...]) -> None:
        """A kernel stands for a node; weights among its ``inputs`` it still reads as it runs.

        Without ``keep`` a weight that every reader has packed loses its values (meta device) unless it is mapped from a
        file, which costs no memory.
        """
        for operand in node.all_input_nodes:
            if operand.op != "get_attr" or operand in inputs:
                continue
            name, tensor = str(operand.target), self._program.tensor(operand)
            self._readers[name].discard(node)
            release(tensor)
            if not self._keep and not self._readers[name] and id(tensor) not in self._mapped:
                self._program.set_tensor(name, _without_values(tensor))
                self._freed += tensor.nbytes
        if self._freed >= _MUCH:
            self._freed = 0
            give_back_freed()


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    bare = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
