"""Example inputs: how they bind to a model's forward, and their leaves with readable names."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphwright.ir.errors import InputError

ExampleInputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One leaf of the example inputs.

    Attributes:
        index: its position in the flattened tree.
        name: its name for messages and for ``dynamic=``: ``input_ids``, ``pixel_values.0``.
        source: how torch writes it in guards: ``L['input_ids']``, ``L['batch']['a']``.
        value: the example value.
    """

    index: int
    name: str
    source: str
    value: Any


@dataclass(frozen=True)
class Call:
    """An example call of a model.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        parameters: names of the forward's positional parameters in order.
        rest: name of its ``*`` parameter, if it has one.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: tuple[str, ...]
    rest: str | None = None

    @property
    def spec(self) -> pytree.TreeSpec:
        """The tree of ``(args, kwargs)``."""
        return pytree.tree_structure((self.args, self.kwargs))

    def leaves(self) -> list[Leaf]:
        """The leaves of ``(args, kwargs)``."""
        found: list[Leaf] = []
        for index, (path, value) in enumerate(pytree.tree_flatten_with_path((self.args, self.kwargs))[0]):
            keyword = path[0] == pytree.SequenceKey(1)
            first: Any = path[1]
            place = 0 if keyword else int(first.idx)
            rest = path[2:]
            if keyword:
                source = f"L[{first.key!r}]"
            elif place < len(self.parameters):
                source = f"L[{self.parameters[place]!r}]"
            else:
                source = f"L['{self.rest}_{place - len(self.parameters)}']"
            inner = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in rest]
            named = keyword or place < len(self.parameters)
            head = str(first.key) if keyword else self.parameters[place] if named else f"{self.rest or 'args'}.{place}"
            found.append(Leaf(index, ".".join([head, *inner]), source + pytree.keystr(rest), value))
        return found

    def with_leaves(self, values: Sequence[Any]) -> Call:
        """The same call with other leaf values."""
        args, kwargs = pytree.tree_unflatten(list(values), self.spec)
        return dataclasses.replace(self, args=args, kwargs=kwargs)


def unwrap(model: Any) -> nn.Module:
    """The module inside data-parallel and ``torch.compile`` wrappers.

    Raises:
        InputError: not a module, or one that has been compiled to TorchScript.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, got {type(model).__name__}", where="argument 'model'")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            break
    assert isinstance(model, nn.Module)
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "is a TorchScript module, which cannot be traced again",
            where="argument 'model'",
            hint="pass the nn.Module it was scripted from",
        )
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            _check_tensor(f"the {kind} {name!r}", tensor)
    return model


def _check_tensor(what: str, tensor: torch.Tensor) -> None:
    where = "argument 'model'"
    if tensor.device.type != "cpu":
        raise InputError(
            f"{what} is on the device {tensor.device}; models are traced on the CPU",
            where=where,
            hint="load its weights first" if tensor.is_meta else "use model.cpu()",
        )
    if tensor.is_inference():
        raise InputError(
            f"{what} was made under torch.inference_mode(), which keeps it from ever being traced or trained",
            where=where,
            hint="make or load the model outside of it; torch.no_grad() does no harm",
        )


def bind(model: nn.Module, example_inputs: ExampleInputs, example_kwargs: Mapping[str, Any] | None = None) -> Call:
    """The example call of a model.

    Args:
        model: the module to be called.
        example_inputs: a mapping (keyword arguments), a sequence (positional arguments) or one tensor.
        example_kwargs: keyword arguments beside positional ones.

    Raises:
        InputError: the forward does not take these arguments, or they hold no tensor.
    """
    where = "argument 'example_inputs'"
    if isinstance(example_inputs, torch.Tensor):
        args: tuple[Any, ...] = (example_inputs,)
        kwargs: dict[str, Any] = {}
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str | bytes):
        args, kwargs = tuple(example_inputs), {}
    else:
        kind = type(example_inputs).__name__
        raise InputError(f"must be a mapping, a sequence or a tensor, not {kind}", where=where)
    for name in kwargs:
        if not isinstance(name, str):
            raise InputError(f"the keys must be argument names, not {name!r}", where=where)
    if example_kwargs:
        twice = sorted(set(kwargs) & set(example_kwargs))
        if twice:
            raise InputError(f"{twice[0]!r} is given in example_inputs as well", where="argument 'example_kwargs'")
        kwargs.update(example_kwargs)
    call = _checked(model, args, kwargs, where)
    _register_dataclasses((args, kwargs))
    tensors = [leaf for leaf in call.leaves() if isinstance(leaf.value, torch.Tensor)]
    if not tensors:
        raise InputError("hold no tensor", where=where, hint="pass the tensors the model is called with")
    for leaf in tensors:
        if leaf.value.device.type != "cpu":
            raise InputError(
                f"is on the device {leaf.value.device}", where=f"example input {leaf.name!r}", hint="use tensor.cpu()"
            )
    return call


def _checked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Call:
    signature = inspect.signature(model.forward)
    kinds = inspect.Parameter
    positional = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    names = tuple(item.name for item in signature.parameters.values() if item.kind in positional)
    rest = next((item.name for item in signature.parameters.values() if item.kind == kinds.VAR_POSITIONAL), None)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"{type(model).__name__}.forward does not take these example inputs: {error}",
            where=where,
            hint=f"its parameters are {', '.join(signature.parameters)}",
        ) from error
    return Call(args, kwargs, names, rest)


def _register_dataclasses(tree: Any) -> list[type]:
    """Let torch take apart the dataclasses in a tree, which it does only with those it has been told of."""
    registered: list[type] = []
    while True:
        unknown = {
            type(leaf)
            for leaf in pytree.tree_leaves(tree)
            if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)
        }
        if not unknown:
            return registered
        for kind in unknown:
            torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
            registered.append(kind)


def register_output_types(output: Any) -> list[type]:
    """Let torch take apart the dataclasses a model returned; gives those it did not know before."""
    return _register_dataclasses(output)
