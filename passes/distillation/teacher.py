"""The teacher: a program that no longer changes, kept in as little memory as wanted."""

from __future__ import annotations

import torch
from torch import nn

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program, require_program

_HALVES = (torch.bfloat16, torch.float16)


def teacher_of(program: Program, *, dtype: torch.dtype | None = None) -> Program:
    """A frozen program that computes what this one does now.

    Its weights are those of ``program``, in the same memory, unless ``dtype`` is given: then it has its own, rounded to
    that dtype, and widens each where it is read. So it takes half the memory and computes as before; what differs is
    what rounding makes of the weights.

    Args:
        program: stays as it is.
        dtype: ``torch.bfloat16`` or ``torch.float16`` to store wider weights so.

    Raises:
        InputError: another dtype, or a weight that float16 cannot hold.
    """
    require_program(program)
    if dtype is not None and dtype not in _HALVES:
        raise InputError(f"must be torch.bfloat16, torch.float16 or None, not {dtype!r}", where="teacher dtype")
    made = program.clone()
    for name, tensor in made.tensors().items():
        if isinstance(tensor, nn.Parameter):
            _bind(made, name, nn.Parameter(tensor.detach(), requires_grad=False))
    if dtype is not None:
        _store(made, dtype)
    return made


def _store(program: Program, dtype: torch.dtype) -> None:
    rounded_ones: dict[str, torch.Tensor] = {}
    with program.edit() as rewriter:
        for node in program.nodes:
            if node.op != "get_attr":
                continue
            old = program.tensor(node)
            if not isinstance(old, nn.Parameter) or not old.is_floating_point() or old.itemsize <= dtype.itemsize:
                continue
            rounded = rounded_ones.setdefault(str(node.target), old.detach().to(dtype))
            if not bool(torch.isfinite(rounded).all()):
                raise InputError(
                    f"has values that {dtype} cannot hold", where=f"weight {node.target!r}", hint="use torch.bfloat16"
                )
            first = min(node.users)
            held = rewriter.weight(f"{node.target}_{str(dtype).removeprefix('torch.')}", rounded, like=node)
            wide = rewriter.call("aten.to.dtype", held, old.dtype, like=first)
            # Widened where it is read first, not at the start, so that it lives no longer than its readers.
            if first.op != "output":
                first.prepend(wide)
            rewriter.replace(node, wide)


def _bind(program: Program, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    program.body.get_submodule(owner)._parameters[leaf] = tensor  # type: ignore[assignment]
