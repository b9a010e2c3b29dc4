"""AutoQuantize on two real models, unattended: at most 1 % of perplexity, and of the correlation with human scores.

A small Llama, judged by its perplexity on WikiText-2 valid, and MiniLM, judged by Spearman's rank correlation on STS-B
dev. Both run on the CPU kernels while they are judged; every quantised linear must run in one of them, and MiniLM's
result is exported to ONNX, where the runtime's own graph must run it quantised too. Target: 30 minutes each, on two
cores.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path

import _rows
import torch
from _stsb import correlation, minilm_folder, sts
from _text import calibration_windows, evaluation_windows, inputs, llama_folder, perplexity
from quantization_quality import CALIBRATION_SENTENCES, embed, encode
from tokenizers import Tokenizer

import graphwright as gw

LOSS = 0.01
MINUTES = 30
# Windows of text and pairs of sentences that a trial is judged on when it must be quick.
QUICK = 47, 200


def main() -> int:
    """Run both searches; the exit code is 1 when a target is missed."""
    parser = _rows.parser(__doc__)
    parser.add_argument("--windows", type=int, default=1, metavar="N", help="judge on every N-th window of the text")
    options = parser.parse_args()
    rows = _rows.Rows()
    llama(rows, step=QUICK[0] if options.quick else options.windows)
    minilm(rows, pairs=QUICK[1] if options.quick else None)
    return int(rows.finish(options.json))


def llama(rows: _rows.Rows, *, step: int) -> None:
    """Perplexity of the small Llama; calibration on other text."""
    folder = llama_folder()
    windows = evaluation_windows(folder)[::step]
    calibration = [inputs(window) for window in calibration_windows(folder, 32)]
    start = time.perf_counter()
    result = gw.auto_quantize(
        gw.load_huggingface(folder, dtype="float32"),
        lambda model: perplexity(model, windows),
        higher_is_better=False,
        target=gw.Relative(LOSS),
        calibration=calibration,
        limits=gw.Limits(target="cpu"),
    )
    record(rows, "Llama 5.8M, perplexity", result, time.perf_counter() - start, windows=len(windows))


def minilm(rows: _rows.Rows, *, pairs: int | None) -> None:
    """Correlation of MiniLM's similarities with human scores; calibration on the sentences of another part."""
    folder = minilm_folder()
    left, right, scores = sts("sts-dev.csv", pairs)
    train = sts("sts-train.csv", CALIBRATION_SENTENCES)[0]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    batches = range(0, len(train), 32)
    calibration = [encode(tokenizer, train[first : first + 32]) for first in batches]

    def spearman(model: gw.Program) -> float:
        found = [embed(model, tokenizer, sentences) for sentences in (left, right)]
        value: float = correlation(torch.cat(found), scores)
        return value

    start = time.perf_counter()
    result = gw.auto_quantize(
        gw.load_huggingface(folder, dtype="float32"),
        spearman,
        higher_is_better=True,
        target=gw.Relative(LOSS),
        calibration=calibration,
        example_inputs=encode(tokenizer, left[:4]),
        limits=gw.Limits(target="cpu"),
    )
    record(rows, "MiniLM, STS-B Spearman", result, time.perf_counter() - start, pairs=len(scores))
    if result.model is not None:
        with tempfile.TemporaryDirectory() as out:
            report = result.model.export_onnx(Path(out) / "model.onnx")
        rows.add("MiniLM, in onnxruntime", "graphwright", **Counter(report.quantized.values()))
        missing = sum(result.trial.kernels.values() if result.trial else ()) - len(report.quantized)
        rows.require(missing == 0, f"MiniLM: {missing} linears are not quantised in onnxruntime")


def record(rows: _rows.Rows, case: str, result: gw.AutoQuantizeResult, seconds: float, **size: int) -> None:
    """One row on a search, and whether it kept to what it was to reach."""
    print(result, flush=True)
    trial = result.trial
    if trial is None:
        rows.require(False, f"{case}: {result.message}")
        return
    rows.add(
        case,
        "graphwright",
        recipe=trial.label,
        loss_percent=100 * (trial.loss or 0.0),
        score=trial.score,
        original=result.original["score"],
        weights_percent=100 * (trial.bytes or 0) / result.original["bytes"],
        trials=len(result.trials),
        minutes=seconds / 60,
        quantized_linears_in_kernels=sum(trial.kernels.values()) - len(trial.unproven),
        quantized_linears_elsewhere=len(trial.unproven),
        **size,
    )
    rows.require(result.met, f"{case}: {result.message}")
    rows.require(seconds <= 60 * MINUTES, f"{case}: {seconds / 60:.1f} minutes, {MINUTES} allowed")
    rows.require(bool(trial.kernels) and not trial.unproven, f"{case}: linears run outside of the kernels")


if __name__ == "__main__":
    raise SystemExit(main())
