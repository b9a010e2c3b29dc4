"""``trace``: any ``nn.Module`` and example inputs to a Program."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim as ExportDim
from torch.utils import _pytree as pytree

from graphwright.frontends.torch.conversion import to_program
from graphwright.frontends.torch.dynamic import DynamicSpec, Leaf, Roles, assign_roles, leaves_of, widen
from graphwright.ir.errors import InputError, TraceError
from graphwright.ir.program import Program

ExampleInputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]


def trace(model: nn.Module, example_inputs: ExampleInputs, *, dynamic: DynamicSpec | str = "auto") -> Program:
    """Trace a model into a Program.

    The model is traced in eval mode and left as it was; the Program shares its weights.

    Args:
        model: any module torch.export can trace without data-dependent control flow.
        example_inputs: a mapping (keyword arguments), a sequence (positional arguments) or one tensor.
        dynamic: which sizes may vary: ``"auto"`` (batch and sequence), ``{input: {axis: name}}``, or ``None``.

    Returns:
        the Program; it is called like the model.

    Raises:
        InputError: the example inputs do not fit the model.
        TraceError: torch.export cannot trace the model; names the module and the line.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, got {type(model).__name__}", where="argument 'model'")
    args, kwargs, parameters = bind_examples(model, example_inputs)
    leaves = leaves_of(args, kwargs)
    if not any(isinstance(leaf.value, torch.Tensor) for leaf in leaves):
        raise InputError("the example inputs hold no tensor", hint="pass the tensors the model is called with")
    roles = assign_roles(leaves, dynamic)
    spec = pytree.tree_structure((args, kwargs))
    values = widen(leaves, roles)
    args, kwargs = pytree.tree_unflatten(values, spec)
    leaves = [Leaf(leaf.index, leaf.name, value) for leaf, value in zip(leaves, values, strict=True)]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        exported = _export(model, args, kwargs, spec, roles, requested=not isinstance(dynamic, str))
        program = to_program(exported, model, leaves, roles, parameters)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if isinstance(dynamic, Mapping):
        _check_dynamic(program, roles)
    return program


def bind_examples(
    model: nn.Module, example_inputs: ExampleInputs
) -> tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]:
    """Positional and keyword arguments of the example call, and the forward's parameter names.

    Raises:
        InputError: the forward does not take these arguments.
    """
    signature = inspect.signature(model.forward)
    names = tuple(
        item.name
        for item in signature.parameters.values()
        if item.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    )
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(example_inputs, torch.Tensor):
        args, kwargs = (example_inputs,), {}
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        args, kwargs = tuple(example_inputs), {}
    else:
        raise InputError(
            f"must be a mapping, a sequence or a tensor, not {type(example_inputs).__name__}",
            where="argument 'example_inputs'",
        )
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"{type(model).__name__}.forward does not take these example inputs: {error}",
            where="argument 'example_inputs'",
            hint=f"its parameters are {', '.join(signature.parameters)}",
        ) from error
    del bound
    return args, kwargs, names


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    spec: pytree.TreeSpec,
    roles: Roles,
    *,
    requested: bool,
) -> torch.export.ExportedProgram:
    counter = iter(range(spec.num_leaves))
    axes = [dict.fromkeys(roles.get(index, {}), ExportDim.AUTO) or None for index in counter]
    shapes_args, shapes_kwargs = pytree.tree_unflatten(axes, spec)
    shapes: Any = shapes_kwargs if not args else shapes_args
    if args and kwargs:
        names = list(inspect.signature(model.forward).parameters)
        shapes = {**dict(zip(names, shapes_args, strict=False)), **shapes_kwargs}
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export fails with whatever the model's own code raises
        raise _explain(model, args, kwargs, error) from error


def _explain(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> TraceError | InputError:
    """Say which module and which line of it stopped the trace."""
    where = _user_line(error)
    stack: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _m, _a, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(lambda _m, _a, _o: stack.pop() and None))
    ran = True
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as own:  # the model itself fails on these inputs: then the trace is not to blame
        ran, where, error = False, _user_line(own), own
    finally:
        for hook in hooks:
            hook.remove()
    message = str(error).strip().splitlines()
    first = message[0] if message else type(error).__name__
    if not ran:
        path = stack[-1] if stack else ""
        return InputError(
            f"the model fails on the example inputs: {first}",
            where=f"module {path or type(model).__name__!r}, {where}",
            hint="check the shapes and dtypes of the example inputs",
        )
    path = _module_at(model, error)
    return TraceError(
        f"torch.export cannot trace the model: {first}",
        where=f"module {path or type(model).__name__!r}, {where}",
        hint="write data-dependent control flow (if, .item(), shapes from values) with torch.where",
    )


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    frames: list[traceback.FrameSummary] = []
    current: BaseException | None = error
    while current is not None:
        frames = frames or list(traceback.extract_tb(current.__traceback__))
        current = current.__cause__
    return [frame for frame in frames if "/torch/" not in frame.filename and "graphwright" not in frame.filename]


def _user_line(error: BaseException) -> str:
    own = [
        frame
        for frame in _frames(error)
        if not frame.filename.startswith("<") and "/frontends/torch/" not in frame.filename
    ]
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else "unknown line"


def _module_at(model: nn.Module, error: BaseException) -> str:
    """The path of the innermost module whose forward was running when the trace failed."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    trace_back = error.__traceback__
    while trace_back is not None:
        local = trace_back.tb_frame.f_locals.get("self")
        if id(local) in names:
            found = names[id(local)]
        trace_back = trace_back.tb_next
    return found


def _check_dynamic(program: Program, roles: Roles) -> None:
    missing = {name for axes in roles.values() for name in axes.values()} - set(program.dims)
    if missing:
        raise TraceError(
            f"the model fixes the size of {', '.join(sorted(missing))}: it cannot vary",
            hint="leave it out of dynamic=, or change the model so that it does not compute with the example's size",
        )
