"""What pruning costs a small Llama in perplexity, without training afterwards, beside SparseGPT written as published.

WikiText-2 valid in windows of 512 tokens; methods that look at inputs are calibrated with 32 windows of other text.
Every linear but the head is pruned. Target: at 50 and 70 % SparseGPT is at least as good as the oracle, which is the
published algorithm in float64 on the transformers model and shares no code with ours (`_oracle_sparsegpt.py`).
"""

from __future__ import annotations

from typing import Any

import _oracle_sparsegpt
import _rows
import torch
from _text import calibration_windows, evaluation_windows, inputs, llama_folder, perplexity

import graphwright as gw

# What the perplexities of two runs of one algorithm may differ by: float32 beside float64, and in which order the
# linears of a layer see each other pruned.
_NOISE = 1.01


def main() -> int:
    """Run the comparison; the exit code is 1 when a target is missed."""
    parser = _rows.parser(__doc__)
    parser.add_argument("--windows", type=int, default=1, metavar="N", help="judge on every N-th window of the text")
    options = parser.parse_args()
    step, count = (59, 8) if options.quick else (options.windows, 32)
    rows = _rows.Rows()
    folder = llama_folder()
    windows, texts = evaluation_windows(folder)[::step], calibration_windows(folder, count)
    calibration = [inputs(window) for window in texts]
    program = gw.load_huggingface(folder, dtype="float32")
    base = perplexity(program, windows)
    rows.add("Llama 5.8M fp32", "graphwright", perplexity=base, windows=len(windows))

    def judge(case: str, *passes: gw.Pass) -> float:
        small = gw.optimize(program, list(passes), example_inputs=inputs(windows[0, :32]), verify=False)
        entries = gw.pruned_weights(small)
        sizes = {row.weight: row.parameters for row in gw.describe_sparsity(small).linears}
        zeros = sum(entry.sparsity * sizes[name] for name, entry in entries.items()) / sum(sizes[n] for n in entries)
        found: float = perplexity(small, windows)
        rows.add(
            f"Llama 5.8M {case}", "graphwright", perplexity=found, ratio_to_fp32=found / base, percent_zeros=100 * zeros
        )
        rows.write(options.json)
        return found

    def oracle(case: str, sparsity: float, among: int = 0) -> float:
        import transformers

        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.train(False)
        _oracle_sparsegpt.prune(model, list(texts), sparsity, among=among)
        found: float = perplexity(model, windows)
        rows.add(f"Llama 5.8M {case}", "published, float64", perplexity=found, ratio_to_fp32=found / base)
        rows.write(options.json)
        return found

    levels = (50,) if options.quick else (50, 70)
    for percent in levels:
        sparsity = percent / 100
        data: dict[str, Any] = {"sparsity": sparsity, "calibration": calibration}
        ours = judge(f"{percent} % SparseGPT", gw.PruneLinears(method="sparsegpt", **data))
        theirs = oracle(f"{percent} % SparseGPT", sparsity)
        rows.require(ours <= _NOISE * theirs, f"{percent} %: SparseGPT {ours:.1f}, the oracle {theirs:.1f}")
        judge(f"{percent} % SparseGPT, sequential", gw.PruneLinears(method="sparsegpt", sequential=True, **data))
        judge(f"{percent} % magnitude", gw.PruneLinears(sparsity=sparsity))
        judge(f"{percent} % Wanda", gw.PruneLinears(method="wanda", **data))
    for percent in () if options.quick else levels:
        sparsity = percent / 100
        data = {"sparsity": sparsity, "calibration": calibration}
        judge(f"{percent} % magnitude, global", gw.PruneLinears(sparsity=sparsity, allocation="global"))
        judge(f"{percent} % SparseGPT, ERK", gw.PruneLinears(method="sparsegpt", allocation="erk", **data))
        judge(f"{percent} % SparseGPT, loss-driven", gw.PruneLinears(method="sparsegpt", allocation="loss", **data))
        int4: dict[str, Any] = {"bits": 4, "group_size": 32, "calibration": calibration}
        judge(
            f"{percent} % SparseGPT, then INT4 g32 GPTQ",
            gw.PruneLinears(method="sparsegpt", **data),
            gw.QuantizeLinears(**int4),
        )
        judge(f"{percent} % and INT4 g32 at once", gw.QuantizeLinears(rounding=gw.Gptq(sparsity=sparsity), **int4))
    if not options.quick:
        judge("2:4 magnitude", gw.PruneLinears(pattern="2:4"))
        judge("2:4 Wanda", gw.PruneLinears(pattern="2:4", method="wanda", calibration=calibration))
        ours = judge("2:4 SparseGPT", gw.PruneLinears(pattern="2:4", method="sparsegpt", calibration=calibration))
        theirs = oracle("2:4 SparseGPT", 0.5, among=4)
        rows.require(ours <= _NOISE * theirs, f"2:4: SparseGPT {ours:.1f}, the oracle {theirs:.1f}")
        judge("50 % SparseGPT, blocks 1x4", gw.PruneLinears(pattern="1x4", calibration=calibration))
        judge("50 % SparseGPT, blocks 16x1", gw.PruneLinears(pattern="16x1", calibration=calibration))
    return int(rows.finish(options.json))


if __name__ == "__main__":
    raise SystemExit(main())
