"""What quantisation costs in quality: sentence embeddings of MiniLM, perplexity of a small Llama.

MiniLM: cosine between the embeddings of the quantised model and of the original, and Spearman's rank correlation with
human scores, on STS-B dev. Targets: INT8 mean cosine 0.999 and Spearman within 0.2 points of fp32; INT4 in groups of 32
0.99 and 1.0 points; stored weights at most 26 % and 15 % of fp32.

The Llama: perplexity on WikiText-2 valid in windows of 512 tokens. Cross-checks, by others, rounding to nearest without
clip search on every linear but the head: fp32 245.4, INT8 g128 245.4, INT4 g32 246.4, INT4 g128 246.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import _rows
import torch
from _stsb import correlation, minilm_folder, stored_share, sts
from _text import calibration_windows, evaluation_windows, inputs, llama_folder, perplexity
from tokenizers import Tokenizer

import graphwright as gw

CALIBRATION_SENTENCES = 512


def main() -> int:
    """Run the comparison; the exit code is 1 when a target is missed."""
    options = _rows.parser(__doc__).parse_args()
    rows = _rows.Rows()
    minilm(rows, quick=options.quick)
    perplexities(rows, quick=options.quick)
    return int(rows.finish(options.json))


# -- sentence embeddings -----------------------------------------------------------------------------------------------


def minilm(rows: _rows.Rows, *, quick: bool) -> None:
    """Cosine and Spearman of the sentence encoder."""
    folder = minilm_folder()
    left, right, scores = sts("sts-dev.csv", 150 if quick else None)
    train = sts("sts-train.csv", CALIBRATION_SENTENCES)[0]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    calibration = [encode(tokenizer, train[start : start + 32]) for start in range(0, len(train), 32)]
    program = gw.load_huggingface(folder, dtype="float32")
    batch = encode(tokenizer, left[:4])

    def embeddings(item: gw.Program) -> torch.Tensor:
        return torch.cat([embed(item, tokenizer, left), embed(item, tokenizer, right)])

    exact = embeddings(program)
    base = correlation(exact, scores)
    rows.add("MiniLM fp32", "graphwright", spearman=base, pairs=len(scores))

    int8, int4 = gw.QuantizeLinears, gw.QuantizeLinears
    cases: dict[str, tuple[list[gw.Pass], tuple[float, float, float] | None]] = {
        "INT8": ([int8(bits=8)], (0.999, 0.2, 26.0)),
        "INT8 weights and activations": ([int8(activations="int8", calibration=calibration)], (0.999, 0.2, 26.0)),
        "INT4 g32 asymmetric GPTQ": (
            [int4(bits=4, group_size=32, symmetric=False, calibration=calibration)],
            (0.99, 1.0, 15.0),
        ),
    }
    if not quick:
        cases |= {
            "INT8 g128": ([int8(bits=8, group_size=128)], None),
            "INT8 weights and activations, nearest": ([int8(activations="int8")], None),
            "INT4 g32": ([int4(bits=4, group_size=32)], None),
            "INT4 g32, full range": ([int4(bits=4, group_size=32, clip_search=False)], None),
            "INT4 g32 asymmetric": ([int4(bits=4, group_size=32, symmetric=False)], None),
            "INT4 g32 GPTQ": ([int4(bits=4, group_size=32, calibration=calibration)], None),
            "INT4 g128": ([int4(bits=4, group_size=128)], None),
            "INT4 g128 GPTQ": ([int4(bits=4, group_size=128, calibration=calibration)], None),
            "INT4 g32 asymmetric GPTQ, INT8 embeddings": (
                [
                    int4(bits=4, group_size=32, symmetric=False, calibration=calibration),
                    gw.QuantizeEmbeddings(bits=8),
                ],
                (0.99, 1.0, 27.0),
            ),
        }
    for name, (passes, target) in cases.items():
        small = gw.optimize(program, passes, example_inputs=batch)
        found = embeddings(small)
        cosine = torch.cosine_similarity(found, exact)
        spearman = correlation(found, scores)
        row = rows.add(
            f"MiniLM {name}",
            "graphwright",
            cosine_mean=float(cosine.mean()),
            cosine_min=float(cosine.min()),
            spearman=spearman,
            spearman_points_lost=100 * (base - spearman),
            quantized_weights_percent=100 * stored_share(program, small),
        )
        if target is not None:
            rows.require(row["cosine_mean"] >= target[0], f"{name}: mean cosine {row['cosine_mean']:.5f} < {target[0]}")
            # A few pairs have a correlation of their own noise: the points are judged on all of them only.
            lost = row["spearman_points_lost"]
            rows.require(quick or lost <= target[1], f"{name}: {lost:.2f} Spearman points lost, {target[1]} allowed")
            share = row["quantized_weights_percent"]
            rows.require(share <= target[2], f"{name}: weights at {share:.1f} % of fp32, {target[2]} allowed")


def encode(tokenizer: Tokenizer, sentences: Sequence[str]) -> dict[str, torch.Tensor]:
    """Token ids and padding mask."""
    found = tokenizer.encode_batch(list(sentences))
    ids = torch.tensor([item.ids for item in found])
    mask = torch.tensor([item.attention_mask for item in found])
    return {"input_ids": ids, "attention_mask": mask}


def embed(program: gw.Program, tokenizer: Tokenizer, sentences: list[str], size: int = 50) -> torch.Tensor:
    """Sentence embeddings: mean of the token states without padding. Sentences of one length go together."""
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    parts: list[torch.Tensor] = [torch.empty(0)] * len(sentences)
    with torch.no_grad():
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = encode(tokenizer, [sentences[index] for index in chosen])
            states: torch.Tensor = program(**batch).last_hidden_state
            weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            for index, value in zip(chosen, (states * weights).sum(1) / weights.sum(1), strict=True):
                parts[index] = value
    return torch.stack(parts)


# -- perplexity --------------------------------------------------------------------------------------------------------


def perplexities(rows: _rows.Rows, *, quick: bool) -> None:
    """Perplexity of the small Llama."""
    folder = llama_folder()
    windows = evaluation_windows(folder)
    calibration = [inputs(window) for window in calibration_windows(folder, 32)]
    if quick:
        windows = windows[::59]
    program = gw.load_huggingface(folder, dtype="float32")
    base = perplexity(program, windows)
    rows.add("Llama 5.8M fp32", "graphwright", perplexity=base, windows=len(windows))
    cases: dict[str, tuple[dict[str, Any], float]] = {
        "INT8 g128, full range": ({"bits": 8, "group_size": 128, "clip_search": False}, 245.4 / 245.4),
        "INT4 g32, full range": ({"bits": 4, "group_size": 32, "clip_search": False}, 246.4 / 245.4),
        "INT4 g128, full range": ({"bits": 4, "group_size": 128, "clip_search": False}, 246.4 / 245.4),
        "INT4 g32": ({"bits": 4, "group_size": 32}, 246.4 / 245.4),
    }
    if not quick:
        cases |= {
            "INT8 weights and activations": ({"bits": 8, "activations": "int8"}, math.inf),
            "INT4 g32 asymmetric": ({"bits": 4, "group_size": 32, "symmetric": False}, math.inf),
            "INT4 g128": ({"bits": 4, "group_size": 128}, math.inf),
            "INT4 per channel": ({"bits": 4}, math.inf),
            "INT4 g128 GPTQ": ({"bits": 4, "group_size": 128, "calibration": calibration}, math.inf),
        }
    for name, (settings, expected) in cases.items():
        small = gw.optimize(program, [gw.QuantizeLinears(**settings)], example_inputs=inputs(windows[0, :32]))
        found = perplexity(small, windows)
        rows.add(f"Llama 5.8M {name}", "graphwright", perplexity=found, ratio_to_fp32=found / base)
        rows.require(found / base <= expected * 1.01, f"{name}: perplexity {found:.1f}, {found / base:.4f} of fp32")


if __name__ == "__main__":
    raise SystemExit(main())
