"""The MODEL argument: a saved Program or a Hugging Face folder."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import InputError

if TYPE_CHECKING:
    from graphwright.ir.program import Program

_PROGRAM_FILE, _CONFIG_FILE = "program.json", "config.json"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how a Hugging Face folder is read."""
    group = parser.add_argument_group("reading a Hugging Face folder")
    group.add_argument("--task", help="head to load, such as feature-extraction (default: what config.json names)")
    group.add_argument("--dtype", help="dtype of the weights: float32, float16, bfloat16 (default: as stored)")
    group.add_argument("--attention", choices=("sdpa", "eager"), help="how transformers spells attention")


def open_model(
    path: str, options: argparse.Namespace, *, quiet: bool = False
) -> tuple[Program, Mapping[str, Any] | None]:
    """The Program of a MODEL argument, and example inputs when it was traced for the occasion.

    Raises:
        InputError: it is neither a saved Program nor a model folder.
    """
    from graphwright.frontends.cli.output import working

    folder = Path(path)
    if (folder / _PROGRAM_FILE).is_file():
        from graphwright.ir.program import Program

        return Program.load(folder), None
    if folder.is_dir() and not (folder / _CONFIG_FILE).is_file():
        found = sorted(item.name for item in folder.iterdir())[:8]
        raise InputError(
            "is neither a saved Program nor a Hugging Face model",
            where=str(folder),
            hint=f"expected {_PROGRAM_FILE} or {_CONFIG_FILE}; found {', '.join(found) or 'an empty folder'}",
        )
    from graphwright.frontends.huggingface import load_with_examples

    with working(f"tracing {folder.name}", quiet=quiet):
        return load_with_examples(folder, task=options.task, dtype=options.dtype, attn_implementation=options.attention)
