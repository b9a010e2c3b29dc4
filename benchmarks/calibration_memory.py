"""Memory that calibration takes beyond the model: GPTQ of layers of Llama-2-7B's shape.

Hidden 4096, feed-forward 11008, 32 heads, random bfloat16 weights in a folder, from which they are mapped; 16 windows
of 512 tokens. Measured is what the process holds of its own (no file's pages) less what it held when the program was
traced, at its peak: with the quantised weights that are done, and without them. These are the model that comes out: in
a 7B model they grow to four of its layers in float32, whatever calibration holds. Target: without them, at most 1.5
times one layer's weights in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import _rows
import torch
from _memory import Watch, resident

import graphwright as gw
from graphwright.passes.quantization.results import Result, Results

LIMIT = 1.5
VOCABULARY = 2000


def main() -> int:
    """Run the benchmark; the exit code is 1 when the target is missed."""
    parser = _rows.parser(__doc__)
    parser.add_argument("--layers", type=int, help="layers of the model (default: 2, or 1 with --quick)")
    parser.add_argument("--windows", type=int, help="of 512 tokens (default: 16, or 4 with --quick)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    layers = options.layers or (1 if options.quick else 2)
    windows = options.windows or (4 if options.quick else 16)
    if options.folder is not None:
        print(json.dumps(measured(options.folder, windows)))
        return 0
    rows = _rows.Rows()
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, "-c", _WRITE, name, str(layers), str(VOCABULARY)], check=True)
        command = [sys.executable, __file__, "--folder", name, "--windows", str(windows)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    layer = 4 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    ratio, with_result = (found[key] * 1e9 / layer for key in ("beyond_model_gb", "with_quantized_weights_gb"))
    rows.add(
        f"GPTQ INT4 g128, Llama 7B, {layers} layers",
        "graphwright",
        **found,
        layer_fp32_gb=layer / 1e9,
        of_a_layer=ratio,
        of_a_layer_with_quantized_weights=with_result,
        windows=windows,
        tokens=512,
    )
    rows.require(ratio <= LIMIT, f"{ratio:.2f} of a layer's fp32 weights, {LIMIT} allowed")
    return int(rows.finish(options.json))


def measured(folder: Path, windows: int) -> dict[str, float]:
    """Quantise the model of a folder; gigabytes and seconds."""
    torch.set_num_threads(2)
    program = gw.load_huggingface(folder)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, VOCABULARY, (1, 512), generator=generator) for _ in range(windows)]
    data = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches]
    before = resident()
    start = time.perf_counter()
    with quantized_bytes() as done, Watch(done) as watch:
        gw.optimize(program, [gw.QuantizeLinears(bits=4, group_size=128, calibration=data)], verify=False)
    return {
        "beyond_model_gb": (watch.own_beside - before["own"]) / 1e9,
        "with_quantized_weights_gb": (watch.own - before["own"]) / 1e9,
        "quantized_weights_gb": done() / 1e9,
        "before_gb": before["own"] / 1e9,
        "peak_files_gb": watch.files / 1e9,
        "seconds": time.perf_counter() - start,
    }


@contextlib.contextmanager
def quantized_bytes() -> Iterator[Callable[[], int]]:
    """Inside the block, how many bytes the quantised weights take that are done by now."""
    total, put = 0, Results.put

    def counted(self: Results, name: str, found: Result) -> None:
        nonlocal total
        put(self, name, found)
        total += found.packed.qweight.nbytes + found.packed.scales.nbytes

    Results.put = counted  # type: ignore[method-assign]
    try:
        yield lambda: total
    finally:
        Results.put = put  # type: ignore[method-assign]


# In a process of its own, whose memory is not measured.
_WRITE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(2)
config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=int(sys.argv[2]),
    num_attention_heads=32, num_key_value_heads=32, vocab_size=int(sys.argv[3]), max_position_embeddings=2048,
    tie_word_embeddings=False, dtype="bfloat16")
torch.set_default_dtype(torch.bfloat16)
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""


if __name__ == "__main__":
    raise SystemExit(main())
