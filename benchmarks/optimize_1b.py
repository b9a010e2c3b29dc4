"""Quantising a Llama of 1.1 billion parameters to INT4, with verification: wall time and peak memory.

The model has the shape of TinyLlama (hidden 2048, feed-forward 5632, 22 layers, 32 heads on 4 key/value heads,
vocabulary 32000) and random fp32 weights. Targets on two cores: 60 seconds, and a peak of the whole process (Python,
torch and the original model included) of at most 1.3 times the fp32 weights.
"""

from __future__ import annotations

import resource
import sys
import time

import _rows
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import graphwright as gw

SECONDS, MEMORY = 60.0, 1.3


def main() -> int:
    """Run the benchmark; the exit code is 1 when a target is missed."""
    parser = _rows.parser(__doc__)
    parser.add_argument("--layers", type=int, help="layers of the model (default: 22, or 4 with --quick)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers = options.layers or (4 if options.quick else 22)
    rows = _rows.Rows()

    model = llama(layers)
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    before = peak_bytes()
    start = time.perf_counter()
    small = gw.optimize(
        model,
        [gw.QuantizeLinears(bits=4, group_size=128)],
        example_inputs={"input_ids": torch.arange(16).reshape(1, 16), "use_cache": False},
    )
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    print(small.report, file=sys.stderr)
    record = small.report.rows[0]
    rows.add(
        f"Llama {size / 4e9:.2f}B, {layers} layers, INT4 g128",
        "graphwright",
        wall_s=seconds,
        pass_s=record.seconds,
        verify_after_s=record.verify_seconds,
        peak_rss_gb=peak / 1e9,
        peak_before_optimize_gb=before / 1e9,
        fp32_model_gb=size / 1e9,
        peak_over_model=peak / size,
        quantized_gb=record.bytes_after / 1e9,
        threads=torch.get_num_threads(),
    )
    if layers == 22:
        rows.require(seconds <= SECONDS, f"{seconds:.0f} s, {SECONDS:.0f} s allowed")
        rows.require(peak <= MEMORY * size, f"peak memory {peak / size:.2f} of the fp32 model, {MEMORY} allowed")
    return int(rows.finish(options.json))


def llama(layers: int) -> LlamaForCausalLM:
    """The model, filled with one block of random numbers over and over: a billion fresh ones would take longer."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    model.train(False)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1:
                value.fill_(1.0)
                continue
            flat = value.view(-1)
            for start in range(0, len(flat), len(block)):
                piece = flat[start : start + len(block)]
                piece.copy_(block[: len(piece)])
            flat[:: 1 + len(name)] *= 1.5  # layers of the same size are not all alike
    return model


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    raise SystemExit(main())
