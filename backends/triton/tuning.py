"""Choosing configurations by measuring them, when it is asked for; what was found is kept on disk.

``python -m graphwright.backends.triton.tuning`` measures, on the GPU that is there, every configuration of the table
for every class of shapes. The choice is kept by the device's name and the versions of triton and graphwright, and taken
whenever a program is lowered for such a device. Nothing else measures: a request never waits for it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from graphwright.backends.triton.configurations import TABLE, Config, candidates, take_tuned
from graphwright.backends.triton.status import architecture, need_gpu, need_triton
from graphwright.ir.errors import BackendError

Measure = Callable[[Callable[[], object]], float]


def choices_file(device: torch.device, folder: Path | None = None) -> Path:
    """Where choices for a device are kept.

    Args:
        device: a GPU; for the CPU the name is of its architecture in the tables.
        folder: ``$XDG_CACHE_HOME/graphwright/triton`` by default, or ``~/.cache/graphwright/triton``.
    """
    if folder is None:
        root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        folder = Path(root) / "graphwright" / "triton"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"interpreter {architecture(device)}"
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", f"{name} triton {version('triton')} graphwright {version('graphwright')}")
    return folder / f"{plain}.json"


def load_choices(device: torch.device, folder: Path | None = None) -> dict[str, Config]:
    """Take what tuning found for a device from now on; nothing where it has not run.

    Returns:
        the configurations, by kernel and class of shapes.

    Raises:
        BackendError: the file is damaged.
    """
    path = choices_file(device, folder)
    if not path.is_file():
        return {}
    arch = architecture(device)
    try:
        stored: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        found = {name: Config(each["blocks"], each["warps"], each["stages"]) for name, each in stored.items()}
        unknown = [name for name, each in found.items() if name not in TABLE or each not in candidates(name, arch)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackendError(f"is damaged: {error}", where=str(path), hint="delete it, and tune again") from error
    if unknown:
        raise BackendError(
            f"has configurations that the table has not: {', '.join(unknown)}",
            where=str(path),
            hint="delete it, and tune again",
        )
    for name, config in found.items():
        take_tuned(name, arch, config)
    return found


def tune(
    device: torch.device,
    *,
    only: Sequence[str] = ("",),
    folder: Path | None = None,
    measure: Measure | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Config]:
    """Measure configurations on a device, take the fastest ones, and keep them on disk.

    Args:
        device: where kernels run.
        only: texts, one of which the name of a case has.
        folder: see :func:`choices_file`.
        measure: milliseconds of a call; medians of CUDA events by default.
        say: called with a line for each configuration.

    Raises:
        BackendError: kernels cannot run there, or what was found cannot be written.
    """
    from graphwright.backends.triton.cases import CASES, on

    need_triton()
    if device.type == "cuda":
        need_gpu(device)
    arch, timer = architecture(device), measure or median_ms
    best: dict[str, tuple[float, Config]] = {}
    total: dict[tuple[str, int], float] = {}
    for case in CASES:
        table = case.table
        if table is None or arch < case.oldest or not any(text in case.name for text in only):
            continue
        for place, config in enumerate(candidates(table, arch)):
            take_tuned(table, arch, config)
            try:
                with on(device):
                    spent = timer(case.run)
            finally:
                take_tuned(table, arch, None)
            say(f"{case.name:50} {config!s:40} {spent:9.4f} ms")
            # Several cases of one class are judged by what they take together.
            total[table, place] = total.get((table, place), 0.0) + spent
    for (table, place), spent in total.items():
        if table not in best or spent < best[table][0]:
            best[table] = spent, candidates(table, arch)[place]
    chosen = load_choices(device, folder) | {table: config for table, (_, config) in best.items()}
    _write(choices_file(device, folder), chosen)
    for table, config in chosen.items():
        take_tuned(table, arch, config)
    return chosen


def median_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """The median of so many calls in milliseconds, by CUDA events, after three that are not counted."""
    for _ in range(3):
        call()
    spent: list[float] = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        spent.append(start.elapsed_time(stop))
    return float(statistics.median(spent))


def _write(path: Path, chosen: dict[str, Config]) -> None:
    """Whole or not at all."""
    content = {
        name: {"blocks": dict(config.blocks), "warps": config.warps, "stages": config.stages}
        for name, config in sorted(chosen.items())
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise BackendError(f"cannot be written: {error}", where=str(path), hint="set XDG_CACHE_HOME") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases whose name has it")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        tune(device, only=options.only or ("",), say=print)
    except BackendError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"kept in {choices_file(device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
