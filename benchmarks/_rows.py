"""Rows of a benchmark: shown as they come, written as JSON at the end with the machine they were measured on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
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

    def add(self, case: str, system: str, **quantities: float | int | str | None) -> dict[str, Any]:
        """Add a row and print it."""
        row = {"case": case, "system": system, **quantities}
        self.rows.append(row)
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
        if target is not None:
            data = [{**row, "machine": machine()} for row in self.rows]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        return 1 if self.missed else 0


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
