"""Packed files of decoders."""

from __future__ import annotations

import os
from pathlib import Path

from graphwright.backends.cpu import CpuExecutable, PackedModel
from graphwright.backends.cpu import load_packed as load_file
from graphwright.frontends.generation.decoder import Decoder
from graphwright.frontends.generation.facts import FILE, PACKED, DecoderFacts
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.program import Program


class PackedDecoder(PackedModel, Decoder):
    """A decoder read from a packed file: it generates, and holds nothing but what runs."""

    def __init__(self, executable: CpuExecutable, facts: DecoderFacts) -> None:
        super().__init__(executable)
        self.layout = DecoderLayout.of(executable.program)
        self.facts = facts

    def _lowered(self) -> CpuExecutable:
        return self._executable

    @property
    def step(self) -> Program:
        """The program that the steps are."""
        return self._executable.program


def load_packed(path: str | os.PathLike[str]) -> PackedModel:
    """Read what ``save_packed`` wrote: a file, or a folder with a decoder and its tokenizer.

    Returns:
        a :class:`PackedDecoder` where the program is a decoding step; weights are mapped and load as they are used.

    Raises:
        SerializationError: the file is missing, truncated, damaged, of another version, or packed for kernels that lay
            weights out in another way.
        InputError: ``GRAPHWRIGHT_CPU_ISA`` names no instruction set, or ``decoder.json`` beside it is damaged.
        BackendError: there are no C++ kernels in this installation, or not those that are forced.
    """
    given = Path(path)
    file = given / PACKED if given.is_dir() else given
    model = load_file(file)
    if DecoderLayout.find(model._executable.program) is None:
        return model
    beside = file.parent
    facts = DecoderFacts.of_folder(beside) if (beside / FILE).is_file() else DecoderFacts()
    return PackedDecoder(model._executable, facts)
