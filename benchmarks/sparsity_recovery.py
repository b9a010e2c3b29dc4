"""Recovery of pruned models by distillation: what each loss gives back, in perplexity and in Spearman's correlation.

A Llama of 5.8 M parameters is trained on the text that is used below, pruned to 70 and 80 % by SparseGPT and trained
again with its masks held: by cross entropy, by cross entropy and the divergence from the dense model's predictions
(KL), and by cross entropy and SquareHead (Kurtic et al. 2023, whose dense models are fine-tuned first too: a teacher
that does not know the text would hold its student back). The text is three quarters of WikiText-2's validation text
with sentences of STS-B and RTE between; perplexity is that of the last quarter. The real MiniLM is pruned to 70 % and
trained on the hidden states of the dense one alone (sentences of STS-B train, no labels); what counts is Spearman's
correlation on STS-B dev, of which 98 % of the dense model's is the target. Each loss's rate is chosen from three with
the first seed, by the loss it ends with on text that is neither trained on nor judged by, after a third of the steps;
the Llama's at 70 %.

A run is written to a file when it is done and is not repeated when it stands there, so that the whole may be
interrupted, and shared among processes by ``--cases`` and ``--losses`` (which is best: each with one thread).
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _rows
import torch
from _stsb import correlation, minilm_folder, sts
from _text import calibration_windows, evaluation_windows, inputs, llama_folder, perplexity
from tokenizers import Tokenizer

import graphwright as gw

DONE = _rows.REPOSITORY / "build" / "sparsity_recovery.jsonl"
FINE_TUNED = _rows.REPOSITORY / "build" / "sparsity_recovery_dense"
FINE_TUNING = 300  # steps
RATES = (3e-4, 1e-3, 3e-3)
GOAL = 0.98


@dataclass(frozen=True)
class Case:
    """What is pruned and recovered.

    Attributes:
        name: of the model.
        sparsity: of every linear.
        losses: by name.
        load: the dense program, its batches to train on, those to choose rates by, those to calibrate with, and the
            function that judges a program, with the quantity's name.
        steps: of training.
        rates: whose runs chose the rates, if not its own.
    """

    name: str
    sparsity: float
    losses: dict[str, list[gw.Term]] = field(hash=False)
    load: Callable[[bool], Loaded]
    steps: int
    rates: Case | None = None


@dataclass(frozen=True)
class Loaded:
    """A model with its texts."""

    dense: gw.Program
    train: list[dict[str, torch.Tensor]]
    held: list[dict[str, torch.Tensor]]
    calibration: list[dict[str, torch.Tensor]]
    judge: Callable[[gw.Program], float]
    quantity: str


def main() -> int:
    """Run what has not been run, then show all."""
    parser = _rows.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--done", type=Path, default=DONE, metavar="FILE", help="where runs are written as they end")
    parser.add_argument("--cases", metavar="NAMES", help="models to run, by the beginning of their titles")
    parser.add_argument("--losses", metavar="NAMES", help="losses to train with, whole names, separated by commas")
    parser.add_argument("--report", action="store_true", help="run nothing, show what has been run")
    options = parser.parse_args()
    if options.quick:
        found = [run(case, loss, 0, 1e-3, 4, quick=True) for case in CASES[:1] for loss in case.losses]
        return report(found, options.json, judged=False)
    runs = Runs(options.done)
    chosen = tuple(options.cases.split(",")) if options.cases else ("",)
    for case in () if options.report else [each for each in CASES if title(each).startswith(chosen)]:
        runs.one(case, "dense", 0, 0.0, 0)
        runs.one(case, "pruned", 0, 0.0, 0)
        best: dict[str, float] = {}
        for loss in case.losses if options.losses is None else options.losses.split(","):
            tried = [runs.one(case.rates or case, loss, 0, rate, case.steps // 3) for rate in RATES]
            best[loss] = min(tried, key=lambda row: float(row["held_loss"]))["rate"]
        for loss, rate in best.items():
            for seed in range(options.seeds):
                runs.one(case, loss, seed, rate, case.steps)
    return report(runs.all(), options.json)


# -- runs --------------------------------------------------------------------------------------------------------------


class Runs:
    """A file with a line for every run that has ended."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def all(self) -> list[dict[str, Any]]:
        """Every run so far."""
        if not self._file.exists():
            return []
        return [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]

    def one(self, case: Case, loss: str, seed: int, rate: float, steps: int) -> dict[str, Any]:
        """A run, from the file or done now."""
        wanted = {"case": title(case), "system": loss, "seed": seed, "rate": rate, "steps": steps}
        for row in self.all():
            if wanted.items() <= row.items():
                return row
        row = run(case, loss, seed, rate, steps)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        return row


def run(case: Case, loss: str, seed: int, rate: float, steps: int, *, quick: bool = False) -> dict[str, Any]:
    """Prune, recover and judge once."""
    start = time.process_time()
    loaded = case.load(quick)
    student = loaded.dense if loss == "dense" else pruned(case, quick)
    row: dict[str, Any] = {"case": title(case), "system": loss, "seed": seed, "rate": rate, "steps": steps}
    if steps:
        terms = case.losses[loss]
        student = gw.optimize(student, [gw.HoldMasks()], verify=False).clone(copy_weights=True)
        gw.distill(student, loaded.dense, loaded.train, loss=terms, steps=steps, learning_rate=rate, seed=seed)
        row["held_loss"] = held_loss(student, loaded, terms)
        student = gw.optimize(student, [gw.ReleaseMasks()], verify=False)
    if loss != "dense":
        row["sparsity"] = sparsity_of(student, pruned(case, quick))
    return {**row, loaded.quantity: loaded.judge(student), "cpu_s": time.process_time() - start}


@functools.cache
def pruned(case: Case, quick: bool) -> gw.Program:
    """The model after pruning, before it is trained."""
    loaded = case.load(quick)
    prune = gw.PruneLinears(sparsity=case.sparsity, method="sparsegpt", calibration=loaded.calibration)
    return gw.optimize(loaded.dense, [prune], verify=False)


def sparsity_of(student: gw.Program, start: gw.Program) -> float:
    """The fraction of zeros where pruning has set some; every one of those must still be there."""
    zeros = total = 0
    for name, tensor in start.tensors().items():
        gone = tensor == 0
        if tensor.dim() == 2 and 10 * int(gone.sum()) > tensor.numel():
            if bool((student.tensor(name)[gone] != 0).any()):
                raise AssertionError(f"pruned weights of {name} came back")
            zeros, total = zeros + int(gone.sum()), total + tensor.numel()
    return zeros / total


def held_loss(student: gw.Program, loaded: Loaded, terms: Sequence[gw.Term]) -> float:
    """What rates are chosen by: the task's loss of a language model, else the loss that was trained."""
    causal = any(isinstance(term, gw.CrossEntropy) for term in terms)
    chosen: Sequence[gw.Term] = [gw.CrossEntropy(causal=True)] if causal else terms
    frozen = student.clone(copy_weights=True)
    found = gw.distill(frozen, loaded.dense, loaded.held, loss=chosen, steps=len(loaded.held), learning_rate=0.0)
    return statistics.fmean(step["loss"] for step in found.losses)


# -- models ------------------------------------------------------------------------------------------------------------


@functools.cache
def llama(quick: bool) -> Loaded:
    """The small Llama, and text."""
    folder = llama_folder()
    dense = gw.load_huggingface(folder, dtype="float32").clone(copy_weights=True)
    known = evaluation_windows(folder)
    judged = known[3 * len(known) // 4 :][: 2 if quick else None]
    other = calibration_windows(folder, 10**6)
    text = torch.cat((known[: 3 * len(known) // 4], other))
    text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]
    held, text = text[:16], text[16:]
    train = [inputs(batch) for batch in text.split(1 if quick else 2)][: 4 if quick else None]
    return Loaded(
        dense if quick else fine_tuned(dense, train),
        train,
        [inputs(batch) for batch in held.split(4)][: 1 if quick else None],
        [inputs(window) for window in other[: 8 if quick else 64]],
        lambda program: perplexity(program, judged),
        "perplexity",
    )


def fine_tuned(dense: gw.Program, train: Sequence[dict[str, torch.Tensor]]) -> gw.Program:
    """The Llama trained on the text by cross entropy; kept, so that processes share it."""
    if not FINE_TUNED.exists():
        loss = gw.CrossEntropy(causal=True)
        gw.distill(dense, None, train, loss=[loss], steps=FINE_TUNING, learning_rate=1e-3)
        dense.save(FINE_TUNED)
    return gw.Program.load(FINE_TUNED)


@functools.cache
def minilm(quick: bool) -> Loaded:
    """The real MiniLM, and sentences."""
    dense = gw.load_huggingface(minilm_folder(), dtype="float32").clone(copy_weights=True)
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.no_padding()
    left, right, _ = sts("sts-train.csv", None)
    ids = [each.ids for each in tokenizer.encode_batch([*left, *right])]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [padded([ids[at] for at in order[start : start + 32]]) for start in range(0, len(ids) - 31, 32)]
    one, two, scores = sts("sts-dev.csv", 64 if quick else None)
    judged = [each.ids for each in tokenizer.encode_batch([*one, *two])]

    def judge(program: gw.Program) -> float:
        return float(correlation(embedded(program, judged), scores))

    return Loaded(dense, batches[40:], batches[32:40], batches[: 4 if quick else 32], judge, "spearman")


def embedded(program: gw.Program, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Means of the last hidden states, ``[texts, 384]``."""
    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    found = torch.empty(len(ids), 384)
    with torch.no_grad():
        for start in range(0, len(order), 64):
            places = order[start : start + 64]
            batch = padded([ids[at] for at in places])
            mask = batch["attention_mask"][:, :, None].float()
            found[places] = (program(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return found


def padded(ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Token ids with zeros behind, and the mask that says so."""
    longest = max(map(len, ids))
    tokens = torch.tensor([[*each, *[0] * (longest - len(each))] for each in ids])
    mask = torch.arange(longest) < torch.tensor([len(each) for each in ids])[:, None]
    return {"input_ids": tokens, "attention_mask": mask.long()}


_TEXT: dict[str, list[gw.Term]] = {
    "cross entropy": [gw.CrossEntropy(causal=True)],
    "cross entropy + KL": [gw.CrossEntropy(causal=True), gw.KLDivergence()],
    "cross entropy + SquareHead": [gw.CrossEntropy(causal=True), gw.SquareHead()],
}
_SEVENTY = Case("tinylm", 0.7, _TEXT, llama, 200)
CASES = (
    _SEVENTY,
    Case("tinylm", 0.8, _TEXT, llama, 200, _SEVENTY),
    Case("MiniLM", 0.7, {"SquareHead": [gw.SquareHead()], "cosine": [gw.HiddenCosine()]}, minilm, 150),
)


# -- the table ---------------------------------------------------------------------------------------------------------


def title(case: Case) -> str:
    """What a case is called."""
    return f"{case.name} {case.sparsity:.0%} sparse"


def report(found: list[dict[str, Any]], target: Path | None, *, judged: bool = True) -> int:
    """Mean and standard deviation over the seeds, and whether the order and the targets hold."""
    rows = _rows.Rows()
    for case in CASES:
        mine = [row for row in found if row["case"] == title(case)]
        means: dict[str, float] = {}
        for system in ("dense", "pruned", *case.losses):
            most = max((row["steps"] for row in mine if row["system"] == system), default=0)
            runs = [row for row in mine if row["system"] == system and row["steps"] == most]
            if not runs or (judged and case.losses.get(system) and most < case.steps):
                continue
            quantity = "perplexity" if "perplexity" in runs[0] else "spearman"
            values = [row[quantity] for row in runs]
            means[system] = statistics.fmean(values)
            figures: dict[str, float | int] = {quantity: means[system], "seeds": len(runs), "steps": most}
            if len(values) > 1:
                figures[f"{quantity}_std"] = statistics.stdev(values)
            if most:
                figures |= {"rate": runs[0]["rate"], "sparsity": runs[0]["sparsity"]}
            rows.add(title(case), system, **figures)
        if judged:
            _hold(rows, case, means)
    return int(rows.finish(target))


def _hold(rows: _rows.Rows, case: Case, means: dict[str, float]) -> None:
    order = [means.get(loss, math.nan) for loss in reversed(case.losses)]
    if case.name == "tinylm" and not any(map(math.isnan, order)):
        rows.require(order == sorted(order), f"{title(case)}: SquareHead <= KL <= cross entropy in perplexity")
    elif "SquareHead" in means and "dense" in means:
        kept = means["SquareHead"] / means["dense"]
        rows.require(kept >= GOAL, f"{title(case)}: {GOAL:.0%} of the dense Spearman, found {kept:.2%}")


if __name__ == "__main__":
    raise SystemExit(main())
