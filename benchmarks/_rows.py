"""Rows of a benchmark: shown as they come, written as JSON at the end with the machine they were measured on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


class Rows:
    """Collects rows ``{"case": ..., "system": ..., quantity with its unit: number}``."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.missed: list[str] = []
        self._earlier: set[tuple[str, str]] = set()  # names of rows that were taken in

    def take(self, files: Sequence[Path]) -> None:
        """Take in the rows of earlier runs; one that is added later stands in place of the one of its name."""
        for file in files:
            for row in json.loads(need(file).read_text(encoding="utf-8")):
                self._replace(row)
                self._earlier.add((row["case"], row["system"]))

    def add(self, case: str, system: str, **quantities: float | int | str | None) -> dict[str, Any]:
        """Add a row and print it."""
        row = {"case": case, "system": system, **quantities}
        self._replace(row)
        shown = ", ".join(f"{key} {_number(value)}" for key, value in quantities.items())
        print(f"{case:44} {system:28} {shown}", flush=True)
        return row

    def require(self, good: bool, text: str) -> None:
        """Note a target that was missed."""
        if not good:
            self.missed.append(text)
            print(f"MISSED: {text}", flush=True)

    def finish(self, target: Path | None) -> int:
        """Write the rows if asked to; the exit code is 1 when a target was missed."""
        self.write(target)
        return 1 if self.missed else 0

    def write(self, target: Path | None) -> None:
        """Write the rows that there are, if asked to: a long run that is killed leaves what it has found."""
        if target is not None:
            data = [{**row, "machine": row.get("machine", machine())} for row in self.rows]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def _replace(self, row: dict[str, Any]) -> None:
        name = row["case"], row["system"]
        if name in self._earlier:
            self._earlier.remove(name)
            self.rows = [each for each in self.rows if (each["case"], each["system"]) != name]
        self.rows.append(row)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="the few decisive cases, within a minute")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    return made


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a kernel that does not say
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def need(path: Path) -> Path:
    """A file or folder the benchmark cannot do without."""
    if not path.exists():
        sys.exit(f"this benchmark needs {path}, which is not there")
    return path


def _number(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
