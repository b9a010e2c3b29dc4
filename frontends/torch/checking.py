"""A fresh Program against the model it came from, on several sizes of the example inputs.

Tracing can go wrong without a word: a size burnt in, a branch taken for good, an autocast lost. So the two are run side
by side. That also settles what torch.export leaves open: whether the traced path holds for sizes of 1, which it never
traces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphwright.frontends.torch.dynamic import Roles, keep, names_of, resized, sizes_of
from graphwright.frontends.torch.examples import Call, Leaf
from graphwright.ir.conditions import holds
from graphwright.ir.errors import TraceError
from graphwright.ir.mapped import streaming
from graphwright.ir.program import Program
from graphwright.passes.verification.comparison import compare

# Largest difference at any output element, relative to the root mean square of that output. A trace runs the model's
# own operators; what may differ is which kernel an attention with and without a mask takes.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_SMALL = (3, 5, 7, 2, 4, 6, 8, 16, 32)


def check_trace(program: Program, model: nn.Module, call: Call, roles: Roles) -> None:
    """Run model and program on the example inputs, on other sizes, and on sizes of 1.

    Where the model takes another path at size 1, that size is taken out of the program's limits.

    Args:
        program: fresh from a trace; limits and conditions of its dimensions may be changed.
        model: in eval mode.
        call: the user's example call.
        roles: its named dimensions.

    Raises:
        TraceError: they differ on the example inputs, or on other sizes the program says it takes.
    """
    leaves = call.leaves()
    roles = keep(roles, list(program.dims))
    present = sizes_of(leaves, roles)
    run = _Comparison(program, model, call, leaves, roles)
    difference = run(present)
    if difference is None:
        raise TraceError("the model fails on the example inputs that it was traced with", where=type(model).__name__)
    if difference:
        raise TraceError(
            f"the trace does not compute what the model computes: {difference}",
            where=f"{type(model).__name__}, on the example inputs",
            hint="the model decides by something that is not a tensor operation; sizes can be fixed with dynamic=None",
        )
    others = present
    for sizes in _other_sizes(program, present):
        difference = run(sizes)
        if difference is None:
            continue  # too small for a convolution, say: the model's own limit
        if difference:
            raise TraceError(
                f"the trace holds for the traced sizes only: {difference} with {_text(sizes)}",
                where=type(model).__name__,
                hint=f"leave {', '.join(names_of(roles))} open one by one with dynamic= to find the cause",
            )
        others = sizes
        break
    _settle_ones(program, run, others)


class _Comparison:
    """What differs between model and program at given sizes."""

    def __init__(self, program: Program, model: nn.Module, call: Call, leaves: Sequence[Leaf], roles: Roles) -> None:
        self.program, self.model, self.call = program, model, call
        self.leaves, self.roles = list(leaves), roles

    def __call__(self, sizes: Mapping[str, int]) -> str | None:
        """An empty string for none, ``None`` when the model itself does not run at these sizes."""
        values = resized(self.leaves, self.roles, sizes)
        call = self.call.with_leaves(values)
        tensors = [value.clone() for value in values if isinstance(value, torch.Tensor)]
        weights = [*self.model.parameters(), *self.model.buffers()]
        with torch.no_grad(), torch.random.fork_rng(devices=[]), streaming(weights):
            torch.manual_seed(0)
            try:
                expected = self.model(*call.args, **call.kwargs)
            except Exception:  # the model's own code may raise anything
                return None
            torch.manual_seed(0)
            try:
                found = self.program.signature.unflatten(self.program.body(*tensors))
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                return f"the trace fails with {str(error).strip().splitlines()[0]}"
        return self._differences(expected, found)

    def _differences(self, expected: Any, found: Any) -> str:
        wanted, spec = pytree.tree_flatten(expected)
        values, other = pytree.tree_flatten(found)
        if spec != other:
            return f"the model returns {spec}, the trace {other}"
        for name, a, b in zip(self.program.signature.output_names(), wanted, values, strict=True):
            difference = compare(b, a)
            limit = _TOLERANCE.get(a.dtype, 0.0) if isinstance(a, torch.Tensor) else 0.0
            if not difference.worst <= limit:
                return f"output {name!r} is off by {difference.worst:.2g} {difference.reason}".rstrip()
        return ""


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def _other_sizes(program: Program, present: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes unlike those traced that the program admits: small ones first, then some near the traced ones."""
    for preferred in (_SMALL, (), (1, 2, -1, -2, 8)):
        sizes: dict[str, int] = {}
        for name, dim in program.dims.items():
            now = present[name]
            near = (*(now + shift for shift in preferred), 2 * now) if preferred is not _SMALL else preferred
            choices = [size for size in near if size > 1 and dim.admits(size) and size != now]
            fresh = [size for size in choices if size not in sizes.values()] or choices
            fits = (size for size in fresh if _possible(program, {**present, **sizes, name: size}))
            sizes[name] = next(fits, now)
        if sizes != dict(present) and _possible(program, sizes):
            yield sizes


def _possible(program: Program, sizes: Mapping[str, int]) -> bool:
    return all(holds(condition, sizes) for condition in program.symbols.conditions)


def _settle_ones(program: Program, run: _Comparison, others: Mapping[str, int]) -> None:
    """Where sizes of 1 take another path, take them out of the limits; ``others`` are the sizes beside the 1."""
    symbols = program.symbols
    shown: list[dict[str, int]] = []
    for name, dim in list(symbols.dims.items()):
        if dim.min > 1:
            continue
        sizes = {**others, name: 1}
        if run(sizes) == "":
            shown.append(sizes)
        else:
            symbols.dims[name] = dataclasses.replace(dim, min=2)
    ones = [name for name, dim in symbols.dims.items() if dim.min == 1]
    if len(ones) > 1:
        sizes = {**others, **dict.fromkeys(ones, 1)}
        if run(sizes) == "":
            shown.append(sizes)
        else:
            symbols.conditions = (*symbols.conditions, " or ".join(f"{name} != 1" for name in ones))
    # A condition that is broken where the trace was seen to be right is torch's caution about sizes of 1.
    symbols.conditions = tuple(
        condition for condition in symbols.conditions if all(holds(condition, sizes) for sizes in shown)
    )
