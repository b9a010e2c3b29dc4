"""A quantised checkpoint as a transformers model whose linears compute with the dialect's operators."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright.frontends.huggingface.folder import CONFIG, ModelFolder
from graphwright.frontends.huggingface.quantized.architecture import Architecture, LinearPlace
from graphwright.frontends.huggingface.quantized.awq import AwqReader
from graphwright.frontends.huggingface.quantized.compressed_tensors import CompressedTensorsReader
from graphwright.frontends.huggingface.quantized.gptq import GptqReader
from graphwright.frontends.huggingface.quantized.modules import GroupedLinear, GroupedWeight, IntegerLinear
from graphwright.frontends.huggingface.quantized.reader import Reader
from graphwright.frontends.huggingface.quantized.tensors import FolderTensors
from graphwright.ir.errors import InputError

READERS: tuple[type[Reader], ...] = (GptqReader, AwqReader, CompressedTensorsReader)
# Where settings stand: keys of config.json, and files of tools that write them beside it, with the method they mean.
_KEYS = ("quantization_config", "compression_config")
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def quantization_of(folder: ModelFolder) -> tuple[Mapping[str, Any], str] | None:
    """How a folder is quantised, and the file that says so; ``None`` for a model in floating point.

    Raises:
        InputError: the settings cannot be read, or their method is not.
    """
    for key in _KEYS:
        value = folder.config.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise InputError(f"{key!r} must be an object", where=str(folder.path / CONFIG))
        where = str(folder.path / CONFIG)
        _kind_of_reader(value, where)
        return value, where
    for name, method in _FILES.items():
        path = folder.path / name
        if path.is_file():
            return {"quant_method": method, **_read(path)}, str(path)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise InputError(f"should hold a JSON object, not a {type(value).__name__}", where=str(path))
    return value


def load_quantized(
    kind: Any,
    config: Any,
    folder: ModelFolder,
    settings: tuple[Mapping[str, Any], str],
    dtype: torch.dtype | None,
    make: Callable[[Mapping[str, torch.Tensor]], nn.Module],
) -> nn.Module:
    """The model of a quantised folder. No weight that is stored quantised is ever in memory in floating point.

    Args:
        kind: class of the model.
        config: its configuration, without what it says of quantisation.
        folder: the folder.
        settings: see :func:`quantization_of`.
        dtype: of the weights that are not quantised; as the configuration says by default.
        make: the model from all its tensors by name; those of quantised linears have values that do not matter and
            take no memory.

    Returns:
        the model, with a :class:`~graphwright.frontends.huggingface.quantized.modules.StoredLinear` for each quantised
        linear.

    Raises:
        InputError: an unknown method or format, or tensors that do not fit the settings or the configuration.
    """
    tensors = FolderTensors(folder)
    values, where = settings
    reader = _kind_of_reader(values, where)(values, tensors, where)
    modules = reader.modules()
    if not modules:
        raise InputError(
            f"says that the model is quantised ({reader.method}), but no weight is stored so",
            where=reader.where,
            hint="the checkpoint is incomplete; remove the quantization_config if its weights are plain floats",
        )
    architecture = Architecture.of(kind, config)
    consumed = {name for module in modules for name in reader.consumed(module)}
    state = {name: tensors[name] for name in tensors if name not in consumed}
    places = {module: place for module in modules if (place := architecture.linear(module)) is not None}
    blank = torch.zeros((), dtype=dtype or _stored_dtype(config, state))
    for place in places.values():
        shape = (place.inputs, place.outputs) if place.transposed else (place.outputs, place.inputs)
        # One number that stands everywhere. Each has its own, since weights on the same memory count as tied.
        state[f"{place.name}.weight"] = blank.clone().expand(shape)
    extra = {module: _extra_bias(place, module, state) for module, place in places.items()}
    model = make(state)
    for module, place in places.items():
        _put(model, place, reader.read(module, place.inputs, place.outputs), extra[module])
    return model


def _kind_of_reader(values: Mapping[str, Any], where: str) -> type[Reader]:
    method = values.get("quant_method")
    for each in READERS:
        if each.method == method:
            return each
    known = ", ".join(each.method for each in READERS)
    raise InputError(
        f"is already quantised by {method or 'another tool'}, whose format is not read",
        where=where,
        hint=f"formats that are read: {known}; or start from the original weights",
    )


def _stored_dtype(config: Any, state: Mapping[str, torch.Tensor]) -> torch.dtype:
    named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(named, torch.dtype):
        return named
    return next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)


def _extra_bias(place: LinearPlace, module: str, state: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """A bias that is stored for a linear that has none by the configuration; old AutoGPTQ stores zeros for each."""
    if place.has_bias or f"{module}.bias" not in state:
        return None
    found = state.pop(f"{module}.bias")
    return found if bool(found.any()) else None


def _put(model: nn.Module, place: LinearPlace, weight: Any, extra: torch.Tensor | None) -> None:
    parent, _, leaf = place.name.rpartition(".")
    owner = model.get_submodule(parent)
    old: Any = owner.get_submodule(leaf)
    bias = old.bias
    if extra is not None:
        bias = nn.Parameter(extra.to(old.weight.dtype), requires_grad=False)
    new: nn.Module = (
        GroupedLinear(weight, place.inputs, bias) if isinstance(weight, GroupedWeight) else IntegerLinear(weight, bias)
    )
    setattr(owner, leaf, new.eval())
