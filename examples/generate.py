"""A language model to INT4, and text from it on the CPU kernels: greedy, sampled, streamed, and drafted.

Give a folder to do the same with a model of yours: ``python examples/generate.py FOLDER "Once upon a time"``. Without a
folder, a small random Llama says small random things.
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphwright as gw


def small_llama() -> LlamaForCausalLM:
    """Two layers with grouped-query attention; it has no tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        vocab_size=256,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Optimise, then generate."""
    model = sys.argv[1] if len(sys.argv) > 1 else small_llama()
    passes = [gw.PrepareDecoder(length=256), gw.QuantizeLinears(bits=4, group_size=32)]
    small = gw.optimize(model, passes, target="cpu:int8")  # 8-bit activations; "cpu" rounds none
    assert isinstance(small, gw.OptimizedDecoder)  # as every language model is, once optimised
    print(small.report)

    prompt = " ".join(sys.argv[2:]) if len(sys.argv) > 2 else [[11, 42, 11, 42, 11]]
    print("\ngreedy:  ", small.generate(prompt, max_new_tokens=24))
    print("\nsampled: ", small.generate(prompt, max_new_tokens=24, temperature=0.8, top_p=0.9, seed=7))

    plain = small.generate(prompt, max_new_tokens=64, cache="bfloat16")
    drafted = small.generate(prompt, max_new_tokens=64, cache="bfloat16", draft="prompt-lookup")
    same = "the same tokens" if drafted.tokens == plain.tokens else "OTHER tokens"
    print(f"\nwith the prompt itself as a draft: {same}, {drafted}")


if __name__ == "__main__":
    main()
