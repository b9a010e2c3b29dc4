"""Adapters in the layout of Hugging Face PEFT: one module here for each ``peft_type``.

A module has ``read(folder: PeftFolder) -> SavedAdapter`` and ``write(adapter: SavedAdapter) -> PeftFiles``; where the
files name no modules (:data:`UNNAMED`), ``write`` is given the program too, and what ``read`` gives finds its places
only when it is put in. PEFT itself is not needed: its folders are JSON and safetensors.
"""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from graphwright.ir.errors import InputError, SerializationError
from graphwright.ir.weights_file import WeightsFile
from graphwright.passes.adapters.peft.folder import PeftFiles, PeftFolder

if TYPE_CHECKING:
    from graphwright.ir.program import Program
    from graphwright.passes.adapters.files import SavedAdapter

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

# peft_type -> module of this package
LAYOUTS: dict[str, str] = {
    "IA3": "ia3",
    "LOHA": "lycoris",
    "LOKR": "lycoris",
    "LORA": "lora",
    "OFT": "oft",
    "PREFIX_TUNING": "virtual",
    "PROMPT_TUNING": "virtual",
    "VERA": "vera",
}

# the modules of those whose files name no modules of the model
UNNAMED = frozenset({"virtual"})

# kind of adapter -> the peft_type as which it is written
WRITTEN: dict[str, str] = {
    "dora": "LORA",
    "ia3": "IA3",
    "loha": "LOHA",
    "lokr": "LOKR",
    "lora": "LORA",
    "lora-fa": "LORA",
    "oft": "OFT",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
    "vera": "VERA",
}


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter that PEFT saved: its configuration names a ``peft_type``."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "peft_type" in config


def read_peft(folder: Path) -> SavedAdapter:
    """Read an adapter that PEFT saved.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        InputError: its type or one of its options is not supported; names it.
        SerializationError: a file is missing or damaged, or its tensors are not those of its type.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    name = config["peft_type"]
    if name not in LAYOUTS:
        raise InputError(
            f"peft_type {name!r} is not supported",
            where=str(folder / CONFIG_FILE),
            hint=f"supported: {', '.join(sorted(LAYOUTS))}",
        )
    file = folder / TENSORS_FILE
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        found = ", only a pickled adapter_model.bin, which is not read" if pickled else ""
        raise SerializationError(
            f"there is no {TENSORS_FILE}{found}",
            where=str(folder),
            hint="save it again with PEFT's save_pretrained(folder, safe_serialization=True)" if pickled else None,
        )
    module = importlib.import_module(f"{__name__}.{LAYOUTS[name]}")
    adapter: SavedAdapter = module.read(PeftFolder(str(folder), config, WeightsFile(file)))
    return adapter


def peft_files(adapter: SavedAdapter, program: Program) -> PeftFiles:
    """Configuration and tensors of an adapter of a program as PEFT's ``from_pretrained`` reads them.

    Raises:
        InputError: PEFT has nothing of its kind, or not with these options.
    """
    if adapter.kind.kind not in WRITTEN:
        near = difflib.get_close_matches(adapter.kind.kind, WRITTEN, n=1)
        raise InputError(
            f"PEFT has no layout for the kind {adapter.kind.kind!r}" + (f"; it has {near[0]!r}" if near else ""),
            where=adapter.source,
            hint=f"leave layout= out; in PEFT's layout: {', '.join(sorted(WRITTEN))}",
        )
    name = WRITTEN[adapter.kind.kind]
    module = importlib.import_module(f"{__name__}.{LAYOUTS[name]}")
    files: PeftFiles = module.write(adapter, program) if LAYOUTS[name] in UNNAMED else module.write(adapter)
    config = {"peft_type": name, "task_type": None, "base_model_name_or_path": None, "inference_mode": True}
    return PeftFiles({**config, **files.config}, files.tensors)
