"""Which stack of a program a pass works on, and whether its layers are fit for it."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.stacks import Stack, find_stacks

# tag -> what has been done
_TOO_LATE = {"quantized": "their weights are quantised", "adapter": "they have adapters"}


def choose_stack(program: Program, selected: Callable[[fx.Node], bool], where: str) -> Stack:
    """The one stack all of whose layers have selected calls.

    Raises:
        InputError: there is none, or there are several; says what was found.
    """
    stacks = find_stacks(program)
    fit = [stack for stack in stacks if all(any(map(selected, layer.nodes)) for layer in stack.layers)]
    if len(fit) == 1:
        return fit[0]
    if fit:
        raise InputError(
            f"the program has {len(fit)} stacks of layers",
            where=where,
            hint="say which with where=, by a module path such as where='decoder'",
            context=[str(stack) for stack in fit],
        )
    if stacks:
        raise InputError(
            "where= and ignore= leave none of the stacks", where=where, context=[str(stack) for stack in stacks]
        )
    calls = sum(node.op == "call_function" for node in program.nodes)
    raise InputError(
        f"no block is repeated: none of the {calls} calls of {program.title!r} stand in stretches that compute "
        "the same one after the other",
        where=where,
        hint="layers must be alike up to sizes and numbers, and each must read the one before it and nothing earlier",
    )


def check_untouched(program: Program, stack: Stack, where: str) -> None:
    """Check that no earlier pass has made the layers' weights anything but weights.

    Raises:
        InputError: they are quantised or adapted; says which order works.
    """
    for layer in stack.layers:
        for node in (*layer.nodes, *layer.weights):
            for tag, what in _TOO_LATE.items():
                if tag in tags_of(node):
                    raise InputError(
                        f"the layers cannot share weights any more: {what}",
                        where=f"{where}: %{node.name} in {path_of(node)}",
                        hint="share first, and quantise or insert adapters afterwards: each shared weight is then "
                        "quantised once, and each repetition has adapters of its own",
                    )


def check_alike(program: Program, stack: Stack, where: str, places: tuple[int, ...]) -> None:
    """Check that weights which are to be one have one dtype and shape.

    Raises:
        InputError: some differ; names the layers and weights.
    """
    first = stack.layers[0]
    for number, layer in enumerate(stack.layers):
        for place in places:
            a, b = program.tensor(first.weights[place]), program.tensor(layer.weights[place])
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                raise InputError(
                    f"layers differ in shape: {first.weights[place].target} is {a.dtype}{list(a.shape)}, "
                    f"{layer.weights[place].target} {b.dtype}{list(b.shape)}",
                    where=f"{where}: layers 0 and {number}",
                    hint="share layers of one shape, or choose others with where=",
                    context=[str(stack)],
                )
