"""A lowered model in one file, its packed weights mapped when it is loaded.

The file is a safetensors file. Its tensors are the operands of the kernels, as they are packed, and the weights that
PyTorch still uses; each starts at a multiple of 64 bytes. Its header holds, as JSON, the text form of the program and
one entry for each kernel: class, arguments, the node whose value it gives and its inputs. A decoder that repeats a
group of layers has the same once more of the group, on the same tensors (see :class:`graphwright.ir.stages.Stage`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphwright.backends.cpu.executable import CpuExecutable, weights_in_use
from graphwright.backends.cpu.features import features
from graphwright.backends.cpu.kernels import KERNELS, PACKED, Kernel
from graphwright.backends.cpu.lowering import Call, Lowered, assemble
from graphwright.backends.executable import KernelUse
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import BackendError, ProgramError, SerializationError
from graphwright.ir.parser import parse
from graphwright.ir.program import Program
from graphwright.ir.stages import Stage
from graphwright.ir.text import print_program
from graphwright.ir.weights_file import WeightsFile, write_tensors

FORMAT = "graphwright packed model"
VERSION = 1
# Changes whenever a packed operand is laid out in another way. The kernels of all instruction sets share it so far.
LAYOUT = f"panels of 64, steps of 256 bytes, {sys.byteorder} endian"
KEY = "graphwright.packed"
AGAIN = "pack it again: lower the saved Program with target='cpu' and call save_packed"


class PackedModel:
    """A lowered model read from a file: it is called like the original; inference only.

    Attributes:
        title: class name of the original.
    """

    def __init__(self, executable: CpuExecutable) -> None:
        self._executable = executable
        self.title = executable.program.title

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run with the original's arguments and output type.

        Raises:
            InputError: an argument is missing, of the wrong dtype, or of a size the program does not take.
        """
        program = self._executable.program
        flat = program.signature.flatten(args, kwargs)
        program.check_inputs(flat)
        return program.signature.unflatten(self._executable(*flat))

    def explain(self) -> list[KernelUse]:
        """Which kernel runs for every node."""
        return self._executable.explain()

    def __repr__(self) -> str:
        return f"PackedModel({self.title}, {len(self._executable.lowered.calls)} kernels)"


# -- saving ------------------------------------------------------------------------------------------------------------


def save_packed(executable: CpuExecutable, path: str | os.PathLike[str]) -> None:
    """Write a lowered program with its packed weights.

    Raises:
        SerializationError: the file cannot be written; one that stood there before is still whole.
    """
    store = _Store()
    document = {
        "format": FORMAT,
        "version": VERSION,
        "layout": LAYOUT,
        **_lowered_document(executable.program, executable.lowered, executable.weights(), store),
        "stage": _stage_document(executable, store),
    }
    _write(Path(path), document, store.tensors)


def _lowered_document(
    program: Program, lowered: Lowered, weights: Mapping[str, torch.Tensor], store: _Store
) -> dict[str, Any]:
    return {
        "text": print_program(program).splitlines(),
        "records": program.records,
        "calls": [
            {
                "node": node.name,
                "kernel": type(call.kernel).__name__,
                "label": call.kernel.label,
                # The instruction set is chosen anew where the file is loaded.
                "given": {
                    name: store.put(None if name == "isa" else value) for name, value in call.kernel.given.items()
                },
                "set": {name: getattr(call.kernel, name) for name in call.kernel.settings},
                "gives": [each.name for each in call.gives],
                "inputs": [{"node": each.name} if isinstance(each, fx.Node) else each for each in call.inputs],
            }
            for node, call in lowered.calls.items()
        ],
        "absorbed": sorted(node.name for node in lowered.absorbed),
        "uses": [dataclasses.astuple(use) for use in lowered.uses],
        "weights": {name: store.put(value) for name, value in weights.items()},
    }


def _stage_document(executable: CpuExecutable, store: _Store) -> dict[str, Any] | None:
    """The repeated group of a decoder, or why there is none; ``None`` for what is no decoder."""
    if DecoderLayout.find(executable.program) is None:
        return None
    try:
        stage, lowered = executable.stage()
    except (ProgramError, BackendError) as error:
        return {"none_because": error.what, "hint": error.hint}
    weights = weights_in_use(stage.program, assemble(stage.program, lowered))
    return {
        **_lowered_document(stage.program, lowered, weights, store),
        **{name: getattr(stage, name) for name in ("layers", "repeats", "width")},
    }


class _Store:
    """Tensors by number; one that is used twice is kept once."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def put(self, value: Any) -> Any:
        """A value as JSON, with its tensors by name."""
        if isinstance(value, torch.Tensor):
            return {"tensor": self._name(value)}
        if dataclasses.is_dataclass(value):
            fields = {field.name: self.put(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return {"packed": type(value).__name__, "fields": fields}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, tuple | list):
            return [self.put(item) for item in value]
        return value

    def _name(self, tensor: torch.Tensor) -> str:
        key = (tensor.data_ptr() if tensor.numel() else -1, tensor.shape, tensor.stride(), tensor.dtype)
        name = self._names.setdefault(key, f"{len(self._names):05d}")
        self.tensors[name] = tensor
        return name


def _write(path: Path, document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            write_tensors(file, tensors, {KEY: json.dumps(document)})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SerializationError(
            f"the packed model could not be saved: {error.strerror or error}",
            where=str(path),
            hint="free space or choose another place; what was saved there before is untouched",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# -- loading -----------------------------------------------------------------------------------------------------------


def load_packed(path: str | os.PathLike[str]) -> PackedModel:
    """Read a file that :meth:`OptimizedModel.save_packed` wrote. Weights are mapped: their bytes load as they are used.

    Raises:
        SerializationError: the file is missing, truncated, damaged, of another version, or packed for kernels that lay
            weights out in another way.
        InputError: ``GRAPHWRIGHT_CPU_ISA`` names no instruction set.
        BackendError: there are no C++ kernels in this installation, or not those that are forced.
    """
    file = WeightsFile(Path(path))
    document = _document(file)
    isa = features().selected
    if isa is None:
        raise BackendError("needs the C++ kernels, which are not in this installation", where=str(path))
    with _damage_as_ours(file.path):
        reader = _Reader(file, isa)
        program, lowered = reader.lowered(document)
        return PackedModel(CpuExecutable(program, lowered, stage=_stage(reader, program, document, file.path)))


def _stage(
    reader: _Reader, step: Program, document: Mapping[str, Any], path: Path
) -> tuple[Stage, Lowered] | ProgramError | None:
    layout, found = DecoderLayout.find(step), document.get("stage")
    if layout is None:
        return None
    if found is None:
        return ProgramError("was packed when files had whole steps only, no stages", where=str(path), hint=AGAIN)
    if "none_because" in found:
        return ProgramError(found["none_because"], where=str(path), hint=found["hint"])
    program, lowered = reader.lowered(found)
    return Stage(program, layout, found["layers"], found["repeats"], found["width"]), lowered


def _renamed(use: KernelUse, labels: Mapping[str, str]) -> KernelUse:
    label = next((label for label in labels if use.kernel.endswith(label)), "")
    return dataclasses.replace(use, kernel=use.kernel.removesuffix(label) + labels.get(label, ""))


def _document(file: WeightsFile) -> dict[str, Any]:
    try:
        document = json.loads(file.metadata.get(KEY, "null"))
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SerializationError(
            "the file is not a packed model", where=str(file.path), hint="OptimizedModel.save_packed writes them"
        )
    if document.get("version") != VERSION:
        raise SerializationError(
            f"the file has format version {document.get('version')!r}, this graphwright reads version {VERSION}",
            where=str(file.path),
            hint=AGAIN,
        )
    if document.get("layout") != LAYOUT:
        raise SerializationError(
            f"its weights are packed in {document.get('layout')}; the kernels on this CPU take {LAYOUT}",
            where=str(file.path),
            hint=AGAIN,
        )
    return document


@contextlib.contextmanager
def _damage_as_ours(path: Path) -> Iterator[None]:
    """What cannot be read, parsed or does not fit together is a damaged file."""
    try:
        yield
    except (ProgramError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SerializationError(
            f"the packed model does not load: {error}", where=str(path), hint="it is damaged: pack the model again"
        ) from error


class _Reader:
    def __init__(self, file: WeightsFile, isa: str) -> None:
        self._file, self._isa = file, isa

    def get(self, value: Any) -> Any:
        """The value behind JSON that :meth:`_Store.put` made."""
        if isinstance(value, list):
            return tuple(self.get(item) for item in value)
        if not isinstance(value, dict):
            return value
        if "dtype" in value:
            return getattr(torch, value["dtype"])
        if "tensor" in value:
            return self._file[value["tensor"]]
        return PACKED[value["packed"]](**{name: self.get(item) for name, item in value["fields"].items()})

    def lowered(self, document: Mapping[str, Any]) -> tuple[Program, Lowered]:
        """A program and its kernels."""
        weights = {name: self.get(value) for name, value in document["weights"].items()}
        program = parse("\n".join(document["text"]), weights, types=False)
        program.records = dict(document.get("records", {}))  # files from before there were any have none
        nodes = {node.name: node for node in program.nodes}
        calls = {nodes[entry["node"]]: self.call(entry, nodes) for entry in document["calls"]}
        absorbed = frozenset(nodes[name] for name in document["absorbed"])
        # The instruction set, which labels name, may be another than when the file was written.
        labels = {entry["label"]: calls[nodes[entry["node"]]].kernel.label for entry in document["calls"]}
        uses = tuple(_renamed(KernelUse(*use), labels) for use in document["uses"])
        return program, Lowered(calls, absorbed, uses)

    def call(self, entry: Mapping[str, Any], nodes: Mapping[str, fx.Node]) -> Call:
        """A kernel and its inputs."""
        given = {name: self.get(value) for name, value in entry["given"].items()}
        if "isa" in given:
            given["isa"] = self._isa
        kernel: Kernel = KERNELS[entry["kernel"]](**given)
        for name, value in entry["set"].items():
            setattr(kernel, name, value)
        inputs = tuple(nodes[each["node"]] if isinstance(each, dict) else each for each in entry["inputs"])
        return Call(kernel, inputs, tuple(nodes[name] for name in entry["gives"]))
