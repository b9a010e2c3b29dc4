"""``save_quantized``: a quantised program as a Hugging Face folder that other tools load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphwright.frontends.generation.facts import DecoderFacts
from graphwright.frontends.huggingface.folder import CONFIG, ModelFolder, open_folder
from graphwright.frontends.huggingface.quantized.architecture import Architecture
from graphwright.frontends.huggingface.quantized.layouts import LAYOUTS, Layout
from graphwright.frontends.huggingface.quantized.modules import QUANTIZED_OPS
from graphwright.frontends.huggingface.quantized.placing import PlacedLinear, float_parts, quantized_linears
from graphwright.frontends.huggingface.quantized.proof import check_saved
from graphwright.frontends.huggingface.quantized.tensors import FolderTensors
from graphwright.frontends.huggingface.quantized.writing import check_folder, published, write_shards
from graphwright.ir.errors import ExportError, InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of

_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class SavedModel:
    """What :func:`save_quantized` wrote.

    Attributes:
        path: the folder.
        layout: its name.
        linears: quantised linears in it.
        bytes: of all weight files.
        files: in the folder.
        error: of its outputs against the program's, relative (root mean square), or ``None`` if not checked.
    """

    path: Path
    layout: str
    linears: int
    bytes: int
    files: tuple[Path, ...]
    error: float | None

    def __str__(self) -> str:
        checked = "not checked" if self.error is None else f"error {self.error:.1e} against the program"
        size = f"{self.bytes / 2**20:.1f} MiB"
        return f"{self.path}: {self.linears} linears in the layout {self.layout}, {size}, {checked}"

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        names = [file.name for file in self.files]
        return {**vars(self), "path": str(self.path), "files": names}


@dataclass(frozen=True)
class _Entry:
    """One tensor to write: what it is known to be, and how it is made when its turn comes."""

    module: str
    make: Callable[[], Mapping[str, torch.Tensor]]


def save_quantized(
    program: Program,
    folder: str | os.PathLike[str],
    *,
    layout: str = "compressed-tensors",
    source: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 4 << 30,
    check: bool = True,
    example_inputs: list[torch.Tensor] | None = None,
) -> SavedModel:
    """Write a quantised program as a Hugging Face folder in another tool's layout, code for code and scale for scale.

    ``config.json`` is the source's with a ``quantization_config``; tokenizer and generation settings are copied.
    Merged linears are cut into those that they were. What the traced program does not read, such as a head that was not
    loaded, is copied from the source. The folder is written beside its target and takes its place when it is whole and,
    unless told otherwise, has been loaded again and computed the same as the program, which also shows whether a pass
    left something in the graph that weights alone do not say.

    Args:
        program: from :func:`graphwright.load_huggingface` or :func:`graphwright.load_decoder`, with quantised linears.
        folder: to write; an earlier export there is replaced, any other folder must be empty.
        layout: ``"compressed-tensors"`` (every integer format, groups that must divide the inputs, activations of 8
            bits per token), ``"gptq"`` (weights alone, scales in half precision) or ``"awq"`` (4 bits, one group size
            for the whole model).
        source: the model's original folder; where the program was loaded from when left out.
        max_shard_bytes: larger models become several files.
        check: load the folder and compare it with the program.
        example_inputs: flat inputs of the program for the check; random ones when left out.

    Raises:
        InputError: an unknown layout, or no source, or one that cannot be read.
        ExportError: something of the program cannot be said in the layout, the folder cannot be written, or computes
            something else. Nothing is written then.
    """
    if layout not in LAYOUTS:
        raise InputError(
            f"there is no layout {layout!r}", where="argument 'layout'", hint=f"layouts: {', '.join(LAYOUTS)}"
        )
    program.require_values()
    target, origin = Path(folder).absolute(), _source(program, source)
    check_folder(target, mark=CONFIG)
    if target == origin.path.absolute():
        raise InputError("is the source itself", where=str(target), hint="choose another folder")
    kind, config = _class_of(program, origin)
    architecture = Architecture.of(kind, config)
    linears = quantized_linears(program, architecture)
    floats = [name for name in architecture.linears if name not in linears]
    chosen = LAYOUTS[layout](linears, floats)
    entries = _entries(program, architecture, chosen, origin)
    with published(target) as staging:
        sizes, dtypes = write_shards(staging, [each.make for each in entries], max_shard_bytes)
        document = _config(origin.config, architecture, chosen, dtypes, kind)
        (staging / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        for name in _COPIED:
            if (origin.path / name).is_file():
                (staging / name).write_bytes((origin.path / name).read_bytes())
        error = check_saved(program, staging, example_inputs) if check else None
    files = tuple(sorted(target.iterdir()))
    return SavedModel(target, layout, len(linears), sum(sizes), files, error)


def _source(program: Program, given: str | os.PathLike[str] | None) -> ModelFolder:
    facts = program.origin
    known = facts.folder if isinstance(facts, DecoderFacts) else None
    if given is None and (known is None or not (known / CONFIG).is_file()):
        raise InputError(
            "is not known: the program does not say which folder it came from",
            where="argument 'source'",
            hint="give the original Hugging Face folder, which has config.json and the tokenizer",
        )
    folder = given if given is not None else known
    assert folder is not None
    return open_folder(folder)


def _class_of(program: Program, origin: ModelFolder) -> tuple[Any, Any]:
    """The class that the program was traced from, and its configuration without what it says of quantisation."""
    from graphwright.frontends.huggingface.loading import model_class

    kind, config = model_class(origin, program.title)
    for name in _KEYS:
        vars(config).pop(name, None)
    return kind, config


# -- tensors ---------------------------------------------------------------------------------------------------------


def _entries(program: Program, architecture: Architecture, layout: Layout, origin: ModelFolder) -> list[_Entry]:
    """Every tensor of the folder, in the order of the architecture."""
    parts = float_parts(program, architecture)
    stored = FolderTensors(origin)
    used: set[str] = set()
    entries: list[_Entry] = []
    both = [name for name in layout.linears if name in parts]
    if both:
        raise ExportError(
            "is computed by a quantised linear and one in floating point (outliers split off, or an adapter)",
            where=f"module {both[0]!r}",
            hint="no layout has a place for the second; quantise without it",
        )
    for name, linear in layout.linears.items():
        _check_bias(name, linear)
        entries.append(_Entry(name, _linear_maker(layout, name, linear)))
    for name, shape in architecture.tensors.items():
        module = name.rpartition(".")[0]
        if module in layout.linears or (name in architecture.tied and not _unties(architecture, layout)):
            continue
        value = _value(program, architecture, name, shape, parts, used)
        if value is None and name in stored and tuple(stored[name].shape) == shape:
            value = stored[name]
        if value is None:
            raise ExportError(
                f"the program has no {name!r} {list(shape)}, and neither has the source",
                where=f"program {program.title!r}",
                hint="a pass has replaced it: save before passes that change other weights than those of linears",
            )
        entries.append(_Entry(module, _plain_maker(name, value)))
    _refuse_leftovers(program, used, parts)
    return entries


def _linear_maker(layout: Layout, name: str, linear: PlacedLinear) -> Callable[[], dict[str, torch.Tensor]]:
    def make() -> dict[str, torch.Tensor]:
        found = {f"{name}.{leaf}": tensor for leaf, tensor in layout.tensors(linear).items()}
        if linear.place.has_bias:
            plain = torch.zeros(linear.place.outputs) if linear.bias is None else linear.bias.detach()
            found[f"{name}.bias"] = plain.contiguous()
        return found

    return make


def _plain_maker(name: str, value: torch.Tensor) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {name: value.detach()}


def _check_bias(name: str, linear: PlacedLinear) -> None:
    if linear.bias is not None and not linear.place.has_bias and bool(linear.bias.any()):
        raise ExportError(
            "adds a bias, which the original linear has not",
            where=f"module {name!r}",
            hint="save before the pass that adds it",
        )


def _unties(architecture: Architecture, layout: Layout) -> bool:
    """Whether a linear whose weight is tied to another tensor has been quantised, and is tied no more."""
    return any(name.rpartition(".")[0] in layout.linears for name in architecture.tied)


def _value(
    program: Program,
    architecture: Architecture,
    name: str,
    shape: tuple[int, ...],
    parts: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]],
    used: set[str],
) -> torch.Tensor | None:
    """A tensor of the architecture in the program: by its linear, by its name, or by the module that reads it."""
    module, _, leaf = name.rpartition(".")
    if module in parts and leaf in ("weight", "bias"):
        weight, bias = parts[module]
        if leaf == "bias":
            return torch.zeros(shape, dtype=weight.dtype) if bias is None else bias
        return weight.T if architecture.linears[module].transposed else weight
    owner = program.aliases.get(name, name)
    present = program.tensors()
    if owner in present and tuple(present[owner].shape) == shape:
        used.add(owner)
        return present[owner]
    found = {
        str(operand.target)
        for node in program.nodes
        if path_of(node) == module and op_name(node) not in ("get_attr", "placeholder")
        for operand in node.all_input_nodes
        if operand.op == "get_attr" and tuple(program.tensor(operand).shape) == shape
    }
    if len(found) != 1:
        return None
    used |= found
    return program.tensor(found.pop())


def _refuse_leftovers(
    program: Program, used: set[str], parts: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]
) -> None:
    """Refuse weights that have no place in the folder; constants that passes have calculated may have none."""
    written = {value.data_ptr() for pair in parts.values() for value in pair if value is not None}
    for node in program.nodes:
        name = str(node.target)
        if node.op != "get_attr" or name in used or all(op_name(user) in QUANTIZED_OPS for user in node.users):
            continue
        tensor = program.tensor(node)
        if isinstance(tensor, torch.nn.Parameter) and tensor.data_ptr() not in written:
            raise ExportError(
                f"the weight {name!r} {list(tensor.shape)} has no place in the original architecture",
                where=f"program {program.title!r}",
                hint="save before the pass that made it",
            )


# -- configuration ---------------------------------------------------------------------------------------------------


def _config(
    original: Mapping[str, Any],
    architecture: Architecture,
    layout: Layout,
    dtypes: Mapping[torch.dtype, int],
    kind: Any,
) -> dict[str, Any]:
    document = {key: value for key, value in original.items() if key not in _KEYS}
    document["architectures"] = [kind.__name__]
    floating = {dtype: count for dtype, count in dtypes.items() if dtype.is_floating_point}
    if floating:
        name = str(max(floating, key=lambda each: floating[each])).removeprefix("torch.")
        for key in [key for key in ("dtype", "torch_dtype") if key in original] or ["dtype"]:
            document[key] = name
    if _unties(architecture, layout):
        document["tie_word_embeddings"] = False
    return document | {"quantization_config": layout.settings()}
