"""Adapters at about equal numbers of trained parameters, beside fine-tuning and what their papers claim.

MiniLM on RTE (accuracy on RTE-3's test set) and STS-B (Spearman on the development set), a Llama of 5.8 M parameters
on E2E (token loss and BLEU on the test set). Every run takes the same number of AdamW steps of 16 examples, the rate
rising for a tenth of them and falling to 0 afterwards. Each system's rate is chosen from three with the first seed, by
the validation loss after a third of the steps. RTE's classifier trains beside every system at a rate of its own.

A run is written to a file when it is done and is not repeated when it stands there, so that the whole, some hours on
one core, may be interrupted and shared between processes. Training times are those of the processor, not of the clock.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _rows
import torch
from _adapter_systems import SYSTEMS, System
from _adapter_tasks import BATCH, TASKS, Task
from torch import nn

import graphwright as gw

STEPS, TRIAL_STEPS = 150, 50
HEAD_RATE = 1e-3
DONE = _rows.REPOSITORY / "build" / "adapters.jsonl"


def main() -> int:
    """Run what has not been run, then show all."""
    parser = _rows.parser(__doc__)
    parser.add_argument("--tasks", metavar="NAMES", help="some of them: " + ",".join(task.name for task in TASKS))
    parser.add_argument("--systems", metavar="NAMES", help="some of them: " + ",".join(each.name for each in SYSTEMS))
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--done", type=Path, default=DONE, metavar="FILE", help="where runs are written as they end")
    parser.add_argument("--report", action="store_true", help="run nothing, show what has been run")
    options = parser.parse_args()
    tasks = [task for task in TASKS if options.tasks is None or task.name in options.tasks.split(",")]
    systems = [each for each in SYSTEMS if options.systems is None or each.name in options.systems.split(",")]
    if options.quick:
        found = [quick(task, system) for task in tasks for system in systems if system.name in ("LoRA", "KronA")]
        return report(found, tasks, systems, options.json)
    if not options.report:
        runs = Runs(options.done)
        for task in tasks:
            ready = task(quick=False)
            for system in systems:
                seeds(ready, system, options.seeds, runs)
    return report(Runs(options.done).all(), tasks, systems, options.json)


# -- runs --------------------------------------------------------------------------------------------------------------


class Runs:
    """A file with a line for every run that has ended."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def all(self) -> list[dict[str, Any]]:
        """Every run so far, also those of other processes."""
        if not self._file.exists():
            return []
        return [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]

    def one(self, task: Task, system: System, seed: int, rate: float, *, trial: bool = False) -> dict[str, Any]:
        """A run, from the file or done now; a trial is a short one that is only validated."""
        steps = TRIAL_STEPS if trial else STEPS
        wanted = {"case": task.name, "system": system.name, "seed": seed, "rate": rate, "steps": steps, "trial": trial}
        for row in self.all():
            if wanted.items() <= row.items():
                return row
        row = {**wanted, **run(task, system, seed, rate, steps, trial=trial)}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        return row


def seeds(task: Task, system: System, count: int, runs: Runs) -> None:
    """All runs of a system: trials of every rate with the first seed, then the best rate with all seeds."""
    if system.passes(task.model, 0) is None:
        return
    rate = system.rates[0]
    if len(system.rates) > 1:
        tried = [runs.one(task, system, 0, each, trial=True) for each in system.rates]
        rate = min(tried, key=lambda row: row["validation_loss"])["rate"]
    chance = bool(system.passes(task.model, 0)) or system.base or any(True for _ in task.head().parameters())
    for seed in range(count if chance else 1):
        runs.one(task, system, seed, rate)


def run(task: Task, system: System, seed: int, rate: float, steps: int, *, trial: bool) -> dict[str, Any]:
    """Train and judge once."""
    passes = system.passes(task.model, seed)
    assert passes is not None
    program = gw.optimize(task.program(), passes, verify=False)
    for parameter in program.parameters():
        parameter.requires_grad_(system.base or (bool(passes) and parameter.requires_grad))
    torch.manual_seed(seed)
    head = task.head()
    trained = [each for each in program.parameters() if each.requires_grad]
    seconds = train(task, program, head, trained, rate, seed, steps)
    return {
        "trained_parameters": sum(each.numel() for each in trained),
        "validation_loss": task.validation_loss(program, head),
        **({} if trial else task.test(program, head)),
        "step_cpu_s": seconds,
    }


def train(
    task: Task, program: gw.Program, head: nn.Module, trained: list[nn.Parameter], rate: float, seed: int, steps: int
) -> float | None:
    """Take the steps; returns the median processor time of one."""
    groups = [{"params": trained, "lr": rate}, {"params": list(head.parameters()), "lr": HEAD_RATE}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        return None
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rising = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (steps - step) / (steps - rising + 1))
    )
    taken = []
    for _, chosen in zip(range(steps), task.batches(seed), strict=False):
        start = time.process_time()
        loss = task.loss(program, head, chosen)
        optimizer.zero_grad()
        loss.backward()
        for group in groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)  # type: ignore[arg-type]
        optimizer.step()
        schedule.step()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def quick(task: type[Task], system: System) -> dict[str, Any]:
    """A few steps and a few texts, to see that everything works."""
    row = run(task(quick=True), system, 0, system.rates[0], 4, trial=False)
    return {"case": task.name, "system": system.name, "seed": 0, "rate": system.rates[0], "steps": 4, **row}


# -- the table ---------------------------------------------------------------------------------------------------------


def report(
    found: list[dict[str, Any]], tasks: Sequence[type[Task]], systems: Sequence[System], target: Path | None
) -> int:
    """Mean and standard deviation over the seeds of every system."""
    rows = _rows.Rows()
    for task in tasks:
        own = [row for row in found if row["case"] == task.name and not row.get("trial")]
        full = [row["step_cpu_s"] for row in found if (row["case"], row["system"]) == (task.name, "fine-tuning")]
        for system in systems:
            runs = [row for row in own if row["system"] == system.name]
            if not runs:
                continue
            times = [row["step_cpu_s"] for row in runs if row["step_cpu_s"] is not None]
            ratio = statistics.median(times) / statistics.median(full) if times and full else None
            rows.add(
                f"{task.name} {task.model}, {runs[0]['steps']} steps of {BATCH}",
                system.name,
                trained_parameters=runs[0]["trained_parameters"],
                seeds=len(runs),
                rate=runs[0]["rate"],
                **spread(runs),
                time_of_fine_tuning=ratio,
                claim=system.claims.get(task.name),
                claimed_time_of_fine_tuning=system.claimed_time,
            )
    return int(rows.finish(target))


def spread(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Mean and standard deviation of every figure."""
    given = ("case", "system", "seed", "rate", "steps", "trial", "trained_parameters", "step_cpu_s")
    found: dict[str, float] = {}
    for key in (key for key in runs[0] if key not in given):
        values = [row[key] for row in runs]
        found[key] = statistics.fmean(values)
        if len(values) > 1:
            found[f"{key}_std"] = statistics.stdev(values)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
