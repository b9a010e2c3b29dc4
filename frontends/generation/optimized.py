"""``OptimizedDecoder``: what ``optimize`` gives for a decoding step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from graphwright.backends.executable import Backend, Executable
from graphwright.frontends.api import OptimizedModel
from graphwright.frontends.generation.decoder import Decoder
from graphwright.frontends.generation.facts import PACKED, DecoderFacts
from graphwright.frontends.generation.tokenizer import save_tokenizer
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.passes.report import Report


class OptimizedDecoder(OptimizedModel, Decoder):
    """An optimised decoding step that generates text."""

    def __init__(self, program: Program, report: Report, backend: Backend, examples: list[torch.Tensor]) -> None:
        super().__init__(program, report, backend, examples)
        self.layout = DecoderLayout.of(program)
        self.facts = program.origin if isinstance(program.origin, DecoderFacts) else DecoderFacts()

    def _lowered(self) -> Executable:
        return self._executable

    @property
    def step(self) -> Program:
        """The program that the steps are: this one."""
        return self

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

    def export_genai(self, folder: str | os.PathLike[str], **options: Any) -> Any:
        """Write a folder that onnxruntime-genai loads; see :func:`graphwright.export_genai`.

        Its ``source`` is the folder that the model came from, unless another one is given.

        Raises:
            InputError: no source is known, or an option does not fit.
            ExportError: the decoder cannot be exported, or the folder cannot be written.
        """
        from graphwright.backends.onnx import export_genai

        options.setdefault("example_inputs", self.examples)
        if options.setdefault("source", self.facts.folder) is None:
            raise InputError(
                "is not known: the model was not loaded from a folder",
                where="argument 'source'",
                hint="give the Hugging Face folder that has config.json and the tokenizer",
            )
        return export_genai(self, folder, **options)

    def _save_beside(self, path: str | os.PathLike[str]) -> None:
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, path)
        self.facts.save(path)
