"""What happens between passes: checks, dumps, progress. One mechanism for all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from graphwright.ir.program import Program, Snapshot
from graphwright.passes.base import Pass
from graphwright.passes.report import PassRecord, Report


class Hook:
    """Called around every pass of a pipeline. A method that raises stops the pipeline; the pass is rolled back."""

    def started(self, program: Program, passes: Sequence[Pass]) -> None:
        """Before the first pass."""

    def before_pass(self, program: Program, item: Pass) -> None:
        """Before each pass."""

    def after_pass(self, program: Program, item: Pass, before: Snapshot, record: PassRecord) -> None:
        """After each pass, with the state before it; may add to the record."""

    def finished(self, program: Program, report: Report) -> None:
        """After the last pass."""


class DumpIR(Hook):
    """Write the program's text after every pass that changed it: ``00-start.txt``, ``01-fuse-gelu.txt``, …"""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._count = 0

    def started(self, program: Program, passes: Sequence[Pass]) -> None:
        """Write the program as it comes in."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._count = 0
        self._write("start", program)

    def after_pass(self, program: Program, item: Pass, before: Snapshot, record: PassRecord) -> None:
        """Write the program if the pass changed it."""
        self._count += 1
        if record.changed:
            self._write(item.name, program)

    def _write(self, label: str, program: Program) -> None:
        (self.folder / f"{self._count:02d}-{label}.txt").write_text(str(program), encoding="utf-8")
