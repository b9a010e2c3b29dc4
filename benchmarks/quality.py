"""Quality of quantised models, each method beside another library's with the same settings and calibration data.

A small Llama at INT4 and INT3 in groups of 128 and INT2 in groups of 64: perplexity on WikiText-2 valid (fp32 245.4),
and the divergence of its predictions from those of fp32 (mean Kullback-Leibler divergence in nats, on 60 windows).
The model is too sure of itself on this text, so that rounding can lower its perplexity; the divergence cannot be
flattered so. MiniLM: Spearman's rank correlation on STS-B dev. A rival quantises in an environment of its own and
writes the floats that its weights stand for; both are evaluated by the same code, in float32.

Targets: every method within 0.3 % of its rival's perplexity or better; the best at most 0.2 % above fp32 at INT4, 1.5 %
at INT3, 40 % at INT2; MiniLM INT4 in groups of 32 within 0.3 points of fp32, INT8 with INT8 activations within 0.2.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _rivals
import _rows
import torch
from _quality_methods import METHODS, RIVALS, Method
from _stsb import correlation, minilm_folder, sts
from _text import calibration_windows, evaluation_windows, inputs, llama_folder, perplexity
from quantization_quality import embed, encode
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional

import graphwright as gw

# bits, group size, and what the best method may lose against fp32
SETTINGS = ((4, 128, 0.002), (3, 128, 0.015), (2, 64, 0.40))
CALIBRATION_WINDOWS = 128
COMPARED = 60  # windows on which predictions are compared
WITHIN = 1.003
FOLDER = _rivals.FOLDER / "quality"


def main() -> int:
    """Run the comparison; the exit code is 1 when a target is missed."""
    parser = _rows.parser(__doc__)
    parser.add_argument("--only", metavar="NAMES", help="methods and rivals to run, by the beginning of their names")
    parser.add_argument("--bits", type=int, choices=[setting[0] for setting in SETTINGS], help="of one setting only")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="judge on every N-th window of the text")
    options = parser.parse_args()
    rows = _rows.Rows()
    settings = [each for each in SETTINGS if options.bits in (None, each[0])]
    every = 47 if options.quick else options.every
    only = options.only.split(",") if options.only else None
    llama(rows, settings[1:2] if options.quick else settings, every, quick=options.quick, only=only)
    if options.only is None:
        minilm(rows, quick=options.quick)
    return int(rows.finish(options.json))


# -- the Llama ---------------------------------------------------------------------------------------------------------


class Judge:
    """Perplexity of a program, and how far its predictions are from the original's."""

    def __init__(self, original: gw.Program, windows: torch.Tensor) -> None:
        self._windows, self._some = windows, windows[:: -(-len(windows) // COMPARED)]
        with torch.no_grad():
            self._wanted = [self._predictions(original, window) for window in self._some]
        self.fp32 = perplexity(original, windows)

    def __call__(self, program: gw.Program) -> dict[str, float]:
        """``perplexity``, its ratio to fp32, and ``divergence_nats``."""
        found = perplexity(program, self._windows)
        total = 0.0
        with torch.no_grad():
            for window, wanted in zip(self._some, self._wanted, strict=True):
                given = self._predictions(program, window)
                total += float(functional.kl_div(given, wanted, log_target=True, reduction="batchmean"))
        return {"perplexity": found, "ratio_to_fp32": found / self.fp32, "divergence_nats": total / len(self._some)}

    @staticmethod
    def _predictions(program: gw.Program, window: torch.Tensor) -> torch.Tensor:
        return functional.log_softmax(program(**inputs(window)).logits[0].float(), -1)


def llama(
    rows: _rows.Rows,
    settings: Sequence[tuple[int, int, float]],
    every: int,
    *,
    quick: bool,
    only: Sequence[str] | None,
) -> None:
    """Every method at every setting, and its rivals."""
    folder = llama_folder()
    windows = evaluation_windows(folder)[::every]
    tokens = calibration_windows(folder, 16 if quick else CALIBRATION_WINDOWS)
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_file({"input_ids": tokens.contiguous()}, FOLDER / "calibration.safetensors")
    original = gw.load_huggingface(folder, dtype="float32")
    judge = Judge(original, windows)
    rows.add("Llama 5.8M fp32", "graphwright", perplexity=judge.fp32, windows=len(windows))
    for bits, group, allowed in settings:
        case = f"Llama 5.8M INT{bits} g{group}"
        theirs: dict[str, float] = {}
        for rival in () if quick else RIVALS:
            if bits not in rival.bits or (only is not None and not rival.name.startswith(tuple(only))):
                continue
            target = FOLDER / f"{rival.name}-{bits}-{group}".replace(" ", "-")
            start = time.perf_counter()
            try:
                quantize_by_rival(rival.script, folder, bits, group, target, rival.options)
            except _rivals.RivalError as error:
                rows.add(case, rival.name, error=str(error))
                continue
            seconds = time.perf_counter() - start
            row = rows.add(case, rival.name, **judge(gw.load_huggingface(target, dtype="float32")), seconds=seconds)
            theirs[rival.name] = row["perplexity"]
        best: tuple[float, str] = (float("inf"), "")
        for method in METHODS:
            if (quick and not method.quick) or (only is not None and not method.name.startswith(tuple(only))):
                continue
            start = time.perf_counter()
            small = quantized(original, method, bits, group, tokens)
            seconds = time.perf_counter() - start
            row = rows.add(case, f"graphwright {method.name}", **judge(small), seconds=seconds)
            best = min(best, (row["perplexity"], method.name))
            if method.rival in theirs:
                other = theirs[method.rival]
                words = f"{case}: {method.name} {row['perplexity']:.2f}, {method.rival} {other:.2f}"
                rows.require(row["perplexity"] <= WITHIN * other, words)
        if only is None and not quick:
            rows.require(best[0] <= (1 + allowed) * judge.fp32, f"{case}: the best, {best[1]}, gives {best[0]:.2f}")


def quantized(program: gw.Program, method: Method, bits: int, group: int, tokens: torch.Tensor) -> gw.Program:
    """The program with its linears quantised, on quantised operators."""
    batches = [inputs(part) for part in tokens.split(4)]
    return gw.optimize(program, method.passes(bits, group, batches), example_inputs=inputs(tokens[:1, :32]))


def quantize_by_rival(script: str, model: Path, bits: int, group: int, out: Path, options: Sequence[str]) -> None:
    """Let a rival write the model with its weights.

    Raises:
        _rivals.RivalError: it cannot be installed, or fails.
    """
    shutil.rmtree(out, ignore_errors=True)
    given = ["--model", model, "--calibration", FOLDER / "calibration.safetensors"]
    command = [*_rivals.quantizer(script), *given, "--bits", bits, "--group", group, "--out", out, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise _rivals.RivalError(lines[-1] if lines else f"exit code {done.returncode}")


# -- MiniLM ------------------------------------------------------------------------------------------------------------


def minilm(rows: _rows.Rows, *, quick: bool) -> None:
    """Spearman's rank correlation of the sentence encoder."""
    folder = minilm_folder()
    left, right, scores = sts("sts-dev.csv", 150 if quick else None)
    train = sts("sts-train.csv", 512)[0]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    calibration = [encode(tokenizer, train[start : start + 32]) for start in range(0, len(train), 32)]
    program = gw.load_huggingface(folder, dtype="float32")

    def judged(item: gw.Program) -> float:
        both = torch.cat([embed(item, tokenizer, left), embed(item, tokenizer, right)])
        return 100 * float(correlation(both, scores))

    base = judged(program)
    rows.add("MiniLM fp32", "graphwright", spearman_points=base, pairs=len(scores))
    quantize = gw.QuantizeLinears
    four: dict[str, Any] = {"bits": 4, "group_size": 32, "calibration": calibration}
    cases: dict[str, tuple[gw.Pass, float]] = {
        "INT4 g32 asymmetric GPTQ": (quantize(symmetric=False, **four), 0.3),
        "INT4 g32 GPTQ": (quantize(**four), 0.3),
        "INT8, INT8 activations per token": (quantize(activations="int8"), 0.2),
        "INT8, INT8 activations calibrated": (quantize(activations="int8", calibration=calibration), 0.2),
    }
    lost: dict[str, float] = {}
    for name, (item, _) in cases.items():
        found = judged(gw.optimize(program, [item], example_inputs=encode(tokenizer, left[:4])))
        lost[name] = base - found
        rows.add(f"MiniLM {name}", "graphwright", spearman_points=found, spearman_points_lost=lost[name])
    if not quick:  # a few pairs have a correlation of their own noise
        for kind, allowed in (("INT4", 0.3), ("INT8", 0.2)):
            best = min(value for name, value in lost.items() if name.startswith(kind))
            rows.require(best <= allowed, f"MiniLM {kind}: {best:.2f} points lost, {allowed} allowed")


if __name__ == "__main__":
    raise SystemExit(main())
