"""Adapters on disk: ``adapter_model.safetensors`` beside ``adapter_config.json``, nothing of the base.

The header of the safetensors file says all that the JSON file says, so that the one file is enough to load it; the
other is for people and tools.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from graphwright.ir.errors import GraphwrightError, InputError, SerializationError
from graphwright.ir.program import Program
from graphwright.ir.weights_file import WeightsFile, write_tensors
from graphwright.passes.adapters.base import AdapterKind
from graphwright.passes.adapters.inserted import Inserted, adapter_of, described
from graphwright.passes.adapters.kinds import kind_of
from graphwright.passes.adapters.peft import CONFIG_FILE, TENSORS_FILE, is_peft, peft_files, read_peft
from graphwright.passes.adapters.sites import Site

FORMAT = "graphwright adapter"
VERSION = 1
_HEADER = "graphwright.adapter"


@dataclass(frozen=True)
class SavedSite:
    """An adapter at one place, as it is saved.

    Attributes:
        kind: with the options that hold there.
        shapes: see :meth:`Site.shapes`.
        tensors: by the names that the kind gives them.
        shared: which of them several sites have together: name -> what they call it.
    """

    kind: AdapterKind
    shapes: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    shared: Mapping[str, str]


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read from disk.

    Attributes:
        source: where it was read, for messages.
        title: of the program it was trained in.
        kind: with the options that hold where no site has others.
        sites: by module path; none yet where ``place`` gives them.
        base: weights of the base that were saved along, by name; the program must have the same.
        place: for files that name no modules: what is at the sites that a program has for the kind, in their order.
        finish: for files that depend on the base: what is at a site once the layer there is known.
    """

    source: str
    title: str
    kind: AdapterKind
    sites: Mapping[str, SavedSite]
    base: Mapping[str, torch.Tensor] = field(default_factory=dict)
    place: Callable[[Sequence[Site]], Mapping[str, SavedSite]] | None = None
    finish: Callable[[SavedSite, Site], SavedSite] | None = None

    def finished(self, sites: Mapping[str, Site]) -> SavedAdapter:
        """The adapter with its tensors as they are beside these layers, by path.

        Raises:
            InputError: a layer does not fit.
        """
        if self.finish is None:
            return self
        made = {path: self.finish(each, sites[path]) if path in sites else each for path, each in self.sites.items()}
        return replace(self, kind=next(iter(made.values())).kind, sites=made, finish=None)

    def placed(self, sites: Sequence[Site]) -> SavedAdapter:
        """The adapter with the sites that it has in a program.

        Args:
            sites: all that the program has for the kind, in order, each path once.

        Raises:
            InputError: they are more or fewer than the adapter is for.
        """
        return self if self.place is None else replace(self, sites=self.place(sites), place=None)


def save_adapter(
    program: Program, folder: str | os.PathLike[str], name: str = "default", *, layout: str = "graphwright"
) -> None:
    """Write one adapter of a program, and nothing else of it, into a folder.

    Args:
        program: it has the adapter, not merged.
        folder: made if need be; ``adapter_model.safetensors`` and ``adapter_config.json`` in it are replaced.
        name: of the adapter.
        layout: ``graphwright``, which has every kind, or ``peft``, which Hugging Face PEFT reads too.

    Raises:
        InputError: there is no adapter of that name, or PEFT has no layout for its kind.
        SerializationError: a file cannot be written; none is left half-written.
    """
    if layout not in ("graphwright", "peft"):
        raise InputError(f"must be 'graphwright' or 'peft', not {layout!r}", where="save_adapter: layout")
    saved = captured(program, adapter_of(program, name))
    if layout == "peft":
        files = peft_files(saved, program)
        write_adapter(Path(folder), files.tensors, files.config, header={})
        return
    sites: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for path, site in saved.sites.items():
        own = f"{path}." if path else ""
        stored = {key: f"adapters.{site.shared[key]}" if key in site.shared else f"{own}{key}" for key in site.tensors}
        tensors.update({stored[key]: tensor for key, tensor in site.tensors.items()})
        sites[path] = {**site.shapes, "tensors": stored}
        if site.kind != saved.kind:
            sites[path]["kind"] = described(site.kind)
    config = {"format": FORMAT, "version": VERSION, "title": saved.title, "kind": described(saved.kind)}
    write_adapter(
        Path(folder), tensors, {**config, "sites": sites}, header={_HEADER: json.dumps({**config, "sites": sites})}
    )


def captured(program: Program, adapter: Inserted) -> SavedAdapter:
    """An adapter of a program as it is saved: without the tensors that its kind draws again."""
    sites: dict[str, SavedSite] = {}
    for path, site in adapter.sites.items():
        kept = {key: weight for key, weight in site.tensors.items() if key not in site.kind.drawn()}
        own = f"{path}." if path else ""
        shared = {
            key: weight.removeprefix("adapters.").removesuffix(f".{adapter.name}")
            for key, weight in kept.items()
            if weight.startswith("adapters.") and weight != f"{own}{key}.{adapter.name}"
        }
        tensors = {key: program.tensor(weight).detach() for key, weight in kept.items()}
        sites[path] = SavedSite(site.kind, site.shapes, tensors, shared)
    return SavedAdapter(f"adapter {adapter.name!r}", program.title, adapter.kind, sites)


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], header: Mapping[str, str]
) -> None:
    """Write the two files of an adapter, each under another name first.

    Raises:
        SerializationError: one cannot be written.
    """
    parts = [folder / f".{secrets.token_hex(8)}.part" for _ in range(2)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with parts[0].open("xb") as file:
            write_tensors(file, tensors, header)
            file.flush()
            os.fsync(file.fileno())
        parts[1].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(parts[0], folder / TENSORS_FILE)
        os.replace(parts[1], folder / CONFIG_FILE)
    except OSError as error:
        raise SerializationError(
            f"the adapter could not be saved: {error.strerror or error}",
            where=str(error.filename or folder),
            hint="free space or choose another folder",
        ) from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def load_adapter(source: str | os.PathLike[str]) -> SavedAdapter:
    """Read an adapter that :func:`save_adapter` or Hugging Face PEFT wrote.

    Args:
        source: the folder; of our own also the safetensors file alone.

    Raises:
        InputError: there is no adapter there, or it is one of PEFT's of a type or with an option that is not supported.
        SerializationError: a file is missing, truncated, damaged or of another version.
    """
    path = Path(source)
    if is_peft(path):
        return read_peft(path)
    file = path / TENSORS_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"there is no {TENSORS_FILE}" if path.is_dir() else "there is no such file or folder",
            where=str(path),
            hint="give the folder of a saved adapter, or its safetensors file",
        )
    tensors = WeightsFile(file)
    try:
        config = json.loads(tensors.metadata[_HEADER])
        if config["format"] != FORMAT or config["version"] != VERSION:
            raise SerializationError(
                f"the adapter has version {config['version']!r}, this graphwright reads {VERSION}", where=str(file)
            )
        kind = kind_of(config["kind"], where=str(file))
        sites = {
            path: _site(kind_of(site["kind"], where=str(file)) if "kind" in site else kind, path, site, tensors)
            for path, site in config["sites"].items()
        }
        return SavedAdapter(str(source), str(config["title"]), kind, sites)
    except GraphwrightError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SerializationError(
            "the file is no saved adapter" if _HEADER not in tensors.metadata else f"its header does not fit: {error}",
            where=str(file),
            hint="adapters are written by save_adapter",
        ) from error


def _site(kind: AdapterKind, path: str, said: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> SavedSite:
    names: Mapping[str, str] = said["tensors"]
    own = f"{path}." if path else ""
    shared = {
        key: name.removeprefix("adapters.")
        for key, name in names.items()
        if name.startswith("adapters.") and name != f"{own}{key}"
    }
    shapes = {key: value for key, value in said.items() if key not in ("kind", "tensors")}
    return SavedSite(kind, shapes, {key: tensors[name] for key, name in names.items()}, shared)
