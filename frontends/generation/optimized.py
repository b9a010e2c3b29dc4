"""``OptimizedDecoder``: what ``optimize`` gives for a decoding step."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from graphwright.backends.executable import Backend, Executable
from graphwright.frontends.api import OptimizedModel
from graphwright.frontends.generation.decoder import Decoder
from graphwright.frontends.generation.facts import DecoderFacts
from graphwright.frontends.generation.tokenizer import save_tokenizer
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.program import Program
from graphwright.passes.report import Report

PACKED = "packed.safetensors"  # in the folder of a packed decoder


class OptimizedDecoder(OptimizedModel, Decoder):
    """An optimised decoding step that generates text."""

    def __init__(self, program: Program, report: Report, backend: Backend, examples: list[torch.Tensor]) -> None:
        super().__init__(program, report, backend, examples)
        self.layout = DecoderLayout.of(program)
        self.origin = program.origin
        self.facts = program.origin if isinstance(program.origin, DecoderFacts) else DecoderFacts()

    def _lowered(self) -> Executable:
        return self._executable

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the Program into a folder, and its tokenizer and ``decoder.json`` beside it.

        Raises:
            SerializationError: the folder cannot be written.
        """
        super().save(path)
        self._save_beside(path)

    def save_packed(self, path: str | os.PathLike[str]) -> None:
        """Write what runs on the ``cpu`` target into one file; into a folder that exists, its tokenizer beside it too.

        Raises:
            BackendError: the target is not ``cpu``.
            SerializationError: the file cannot be written; one that stood there before is still whole.
        """
        folder = Path(path)
        if not folder.is_dir():
            super().save_packed(path)
            return
        super().save_packed(folder / PACKED)
        self._save_beside(folder)

    def _save_beside(self, path: str | os.PathLike[str]) -> None:
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, path)
        self.facts.save(path)
