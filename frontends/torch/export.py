"""torch.export, quiet, and with an explanation when it fails."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.export import Dim as ExportDim
from torch.utils import _pytree as pytree

from graphwright.frontends.torch.dynamic import Roles
from graphwright.frontends.torch.examples import Call, register_output_types
from graphwright.ir.errors import GraphwrightError, InputError, TraceError


class ExportFailed(Exception):
    """torch.export could not trace the model; ``error`` is what it or the model raised."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def export(model: nn.Module, call: Call, roles: Roles) -> torch.export.ExportedProgram:
    """Trace a model in eval mode with torch.export.

    Args:
        model: the module.
        call: example call whose varying sizes are at least 2 and differ from each other.
        roles: the dimensions to leave open, as far as the model allows it.

    Raises:
        ExportFailed: it cannot be traced like this.
    """
    axes = [dict.fromkeys(roles.get(index, {}), ExportDim.AUTO) or None for index in range(call.spec.num_leaves)]
    args, kwargs = pytree.tree_unflatten(axes, call.spec)
    try:
        # With gradients on, so that regions of the model without them show in the trace.
        with torch.enable_grad(), _quiet(), _plain_signature(model, call):
            shapes = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
            return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export fails with whatever the model's own code raises
        raise ExportFailed(error) from error


@contextlib.contextmanager
def _plain_signature(model: nn.Module, call: Call) -> Iterator[None]:
    """A parameter of its own for each thing this call passes in ``*args`` or ``**kwargs``, as torch.export needs."""
    kinds = inspect.Parameter
    present = inspect.signature(model.forward).parameters.values()
    named = {item.name for item in present if item.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)}
    extra = [name for name in call.kwargs if name not in named]
    surplus = len(call.args) - len(call.parameters)
    if not extra and surplus <= 0:
        yield
        return
    positional = [item for item in present if item.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    parameters = [item.replace(kind=kinds.POSITIONAL_ONLY) if surplus > 0 else item for item in positional]
    parameters += [kinds(f"{call.rest}_{index}", kinds.POSITIONAL_ONLY) for index in range(surplus)]
    parameters += [item for item in present if item.kind == kinds.KEYWORD_ONLY]
    parameters += [kinds(name, kinds.KEYWORD_ONLY) for name in extra]
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    own = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def decompose(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The exported model with in-place operators and casts of autocast written out by torch; composites stay whole."""
    with _quiet():
        decomposed: torch.export.ExportedProgram = exported.run_decompositions({})
    return decomposed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch logs and prints graphs before it raises; our message says what is needed."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def run_model(model: nn.Module, call: Call) -> list[type]:
    """Run the model itself on an example call, and let torch know the dataclasses in its output.

    Returns:
        the dataclasses torch did not know before.

    Raises:
        InputError: the model fails; names the module and the line.
    """
    stack: list[str] = []
    hooks: list[Any] = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _module, _args, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(lambda _module, _args, _output: _pop(stack)))
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    copy = call.with_leaves([leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
    try:
        with torch.no_grad():
            output = model(*copy.args, **copy.kwargs)
    except Exception as error:  # the model's own code may raise anything
        path = stack[-1] if stack else ""
        raise InputError(
            f"the model fails on the example inputs: {_first_line(error)}",
            where=f"module {path or type(model).__name__!r}, {_user_line(error, model)}",
            hint="check the shapes, dtypes and values of the example inputs",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return register_output_types(output)


def _pop(stack: list[str]) -> None:
    stack.pop()


def is_data_dependent(error: Exception) -> bool:
    """Whether the trace met control flow or a size that depends on the values of tensors."""
    return bool(
        re.search(r"data-dependent|DataDependent|PendingUnbacked", f"{type(error).__name__} {_first_line(error)}")
    )


def explain(model: nn.Module, error: Exception) -> GraphwrightError:
    """What stopped the trace of a model that runs: the reason, the module and the line."""
    path = _module_at(model, error)
    where = f"module {path or type(model).__name__!r}, {_user_line(error, model)}"
    line = _first_line(error)
    kind = re.search(r"Found (<class '[^']+'>) in output, which is not a known type", line)
    if kind is not None:
        return TraceError(
            f"the model returns {kind.group(1)}, a type that holds tensors where torch cannot see them",
            where=f"module {type(model).__name__!r}",
            hint="return a tensor, tuple, dict or dataclass, or register the type with torch.utils._pytree",
        )
    if is_data_dependent(error):
        return TraceError(
            "the model's control flow or a size depends on the values of tensors, which a trace cannot follow",
            where=where,
            hint="write the branch with torch.where, or compute the size without .item(), int() or nonzero()",
            context=[line],
        )
    return TraceError(
        f"torch.export cannot trace the model: {line}",
        where=where,
        hint="run torch.export.export on this module alone to see what it needs, or rewrite the line",
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _user_line(error: BaseException, model: nn.Module) -> str:
    """The innermost line outside torch and graphwright; inside torch if the model is made of torch's modules alone."""
    frames: list[traceback.FrameSummary] = []
    current: BaseException | None = error
    while current is not None and not frames:
        frames = list(traceback.extract_tb(current.__traceback__))
        current = current.__cause__ or current.__context__
    ours = str(__file__).rsplit("/frontends/", 1)[0] + "/frontends/"
    outside = [
        frame for frame in frames if "/torch/" not in frame.filename and not frame.filename.startswith(("<", ours))
    ]
    inside = [frame for frame in frames if "/torch/nn/modules/" in frame.filename and frame.name == "forward"]
    found = outside or inside
    return f"{found[-1].filename}:{found[-1].lineno} in {found[-1].name}" if found else "line unknown"


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
