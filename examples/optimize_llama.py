"""A Llama, random and small: traced from transformers, fused, quantised to INT4, saved, loaded and compared.

Give a folder to do the same with a model of yours: ``python examples/optimize_llama.py FOLDER``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphwright as gw


def small_llama() -> LlamaForCausalLM:
    """Two layers with grouped-query attention and tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Optimise, save, load, compare."""
    program = gw.load_huggingface(sys.argv[1] if len(sys.argv) > 1 else small_llama())
    passes = [gw.Cleanup(), gw.FuseAll(), gw.QuantizeLinears(bits=4, group_size=32)]
    small = gw.optimize(program, passes)
    print(small.report)

    print("\nwhat runs:")
    kernels: dict[str, int] = {}
    for use in small.explain():
        kernels[f"{use.op} ({use.kernel})"] = kernels.get(f"{use.op} ({use.kernel})", 0) + 1
    for name, count in sorted(kernels.items(), key=lambda item: -item[1])[:8]:
        print(f"  {count:3} × {name}")

    with tempfile.TemporaryDirectory() as folder:
        small.save(folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        again = gw.Program.load(folder)
    ids = torch.randint(0, 256, (1, 12))
    mask = torch.ones_like(ids)
    same = torch.equal(small(ids, mask).logits, again(ids, mask).logits)
    print(f"\nsaved in {size / 1024:.0f} KiB; loaded again, it gives {'the same' if same else 'OTHER'} logits")


if __name__ == "__main__":
    main()
