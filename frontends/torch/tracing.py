"""``trace``: any ``nn.Module`` and example inputs to a Program."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from graphwright.frontends.torch.checking import check_trace
from graphwright.frontends.torch.conversion import to_program
from graphwright.frontends.torch.dimensions import fixed_names
from graphwright.frontends.torch.dynamic import (
    DynamicSpec,
    Roles,
    assign_roles,
    keep,
    names_of,
    resized,
    sizes_of,
    widened_sizes,
)
from graphwright.frontends.torch.examples import Call, bind, unwrap
from graphwright.frontends.torch.examples import ExampleInputs as ExampleInputs
from graphwright.frontends.torch.export import ExportFailed, explain, export, is_data_dependent, run_model
from graphwright.frontends.torch.untouched import untouched
from graphwright.ir.errors import InputError, TraceError
from graphwright.ir.program import Program


def trace(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic: DynamicSpec | str = "auto",
    check: bool = True,
) -> Program:
    """Trace a model into a Program.

    The model is traced in eval mode and left as it was; the Program shares its weights. Wrappers of ``nn.DataParallel``
    and ``torch.compile`` are taken off. In-place operators become functional ones; a model that writes into its inputs
    or buffers is refused.

    Args:
        model: any module torch.export can trace: no control flow that depends on values.
        example_inputs: a mapping (keyword arguments), a sequence (positional arguments) or one tensor.
        example_kwargs: keyword arguments beside positional ``example_inputs``.
        dynamic: which sizes may vary: ``"auto"`` (batch, and sequence where there is one, as far as the model allows),
            ``{input: {axis: name}}`` (exactly these), or ``None`` (none).
        check: run model and Program on the example inputs, on other sizes and on sizes of 1, and compare. Costs about
            twice four small calls of the model.

    Returns:
        the Program; it is called like the model.

    Raises:
        InputError: the example inputs do not fit the model.
        TraceError: the model cannot be traced (names the module and the line), or the trace does not do what the model
            does.
    """
    module = unwrap(model)
    call = bind(module, example_inputs, example_kwargs)
    leaves = call.leaves()
    roles = assign_roles(leaves, dynamic)
    with untouched(module):
        program = _trace(module, call, roles, asked=isinstance(dynamic, Mapping))
        if check:
            check_trace(program, module, call, roles)
    return program


def bind_examples(
    model: nn.Module, example_inputs: ExampleInputs
) -> tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]:
    """Positional and keyword arguments of the example call, and the forward's parameter names.

    Raises:
        InputError: the forward does not take these arguments.
    """
    call = bind(unwrap(model), example_inputs)
    return call.args, call.kwargs, call.parameters


def _trace(model: nn.Module, call: Call, roles: Roles, *, asked: bool) -> Program:
    """Trace with every dimension open that can be; with all of them if the user asked for them by name."""
    choices = [names_of(roles)] if asked else _choices(call, roles)
    failure: ExportFailed | None = None
    while choices:
        kept = keep(roles, choices.pop(0))
        try:
            program = _attempt(model, call, kept, asked=asked)
        except ExportFailed as error:
            if failure is None and run_model(model, call):
                choices.insert(0, names_of(kept))  # torch has just learnt to take the model's output apart
            failure = error
            if is_data_dependent(error.error):
                break
            continue
        _warn_of_fixed(program, call, roles)
        return program
    assert failure is not None
    if asked:
        _blame_sizes(model, call, roles)
    raise explain(model, failure.error) from failure.error


def _choices(call: Call, roles: Roles) -> list[list[str]]:
    """Sets of dimensions to leave open: all; without each one whose size must change for that; without all of these."""
    leaves = call.leaves()
    names, present, wide = names_of(roles), sizes_of(leaves, roles), widened_sizes(leaves, roles)
    changed = [name for name in names if present[name] != wide[name]]
    # The batch is the last to be given up.
    choices = [names, *([name for name in names if name != left_out] for left_out in reversed(changed))]
    choices += [[name for name in names if name not in changed], []]
    return [choice for index, choice in enumerate(choices) if choice not in choices[:index]]


def _attempt(model: nn.Module, call: Call, roles: Roles, *, asked: bool) -> Program:
    while True:
        leaves = call.leaves()
        traced = call.with_leaves(resized(leaves, roles, widened_sizes(leaves, roles)))
        exported = export(model, traced, roles)
        fixed = fixed_names(exported, traced.leaves(), roles)
        if not fixed:
            return to_program(exported, model, traced.leaves(), roles, call.parameters)
        if asked:
            raise TraceError(
                f"the model fixes the size of {', '.join(sorted(fixed))}: it cannot vary",
                where=type(model).__name__,
                hint="leave it out of dynamic=, or keep the model from computing with the example's size",
            )
        # Once more with these at the example's size, which may have been changed for the trace.
        roles = keep(roles, [name for name in names_of(roles) if name not in fixed])


def _blame_sizes(model: nn.Module, call: Call, roles: Roles) -> None:
    leaves = call.leaves()
    sizes = widened_sizes(leaves, roles)
    try:
        run_model(model, call.with_leaves(resized(leaves, roles, sizes)))
    except InputError as error:
        given = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        raise TraceError(
            f"the model does not run with {given}, which is needed to trace these sizes as varying",
            where=error.where,
            context=[error.what],
            hint="give example inputs of sizes 2 and more that differ, or leave a size out of dynamic=",
        ) from error


def _warn_of_fixed(program: Program, call: Call, roles: Roles) -> None:
    present = sizes_of(call.leaves(), roles)
    fixed = [name for name in ("batch", "sequence") if name in present and name not in program.dims]
    if fixed:
        given = ", ".join(f"{name} = {present[name]}" for name in fixed)
        message = (
            f"the model computes with its example's size: traced for {given} only (dynamic=None is the way to ask)"
        )
        warnings.warn(message, stacklevel=4)
