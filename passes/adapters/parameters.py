"""What there is to train of a program's adapters."""

from __future__ import annotations

from torch import nn

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.passes.adapters.inserted import FOLDED, MERGED, adapter_of, adapter_tensors, adapters_of


def adapter_parameters(program: Program, name: str | None = None) -> list[tuple[str, nn.Parameter]]:
    """The parameters of adapters that train, with their names: what an optimizer is given.

    Args:
        program: it has adapters beside its weights.
        name: of one adapter; ``None`` for all.

    Returns:
        sorted by name, those that several sites share once.

    Raises:
        InputError: there is no such adapter, there is none at all, it has been merged into the weights or folded, or
            nothing of it trains.
    """
    names = list(adapters_of(program)) if name is None else [adapter_of(program, name).name]
    if not names:
        for gone in (*program.records.get(MERGED, {}), *program.records.get(FOLDED, {})):
            adapter_of(program, gone)  # says so
        raise InputError(
            "there is no adapter to train", where=f"program {program.title!r}", hint="insert one with InsertAdapters"
        )
    tensors = {key: tensor for each in names for key, tensor in adapter_tensors(program, each).items()}
    found = [(key, p) for key, p in sorted(tensors.items()) if isinstance(p, nn.Parameter) and p.requires_grad]
    if not found:
        raise InputError(
            f"nothing of {', '.join(map(repr, names))} trains: its parameters require no gradient",
            where=f"program {program.title!r}",
            hint="call requires_grad_() on those that should",
        )
    return found
