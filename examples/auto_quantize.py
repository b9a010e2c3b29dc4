"""Let graphwright find the settings: the smallest weights that keep a score, every trial in a journal.

The model here is a small random Llama, which must predict its own greedy text as well as before. Give a function that
judges your model instead, and a folder for the journal, from which a search that was interrupted goes on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphwright as gw


def small_llama() -> LlamaForCausalLM:
    """Two layers with grouped-query attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=256,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Search, and say what was found."""
    model = small_llama()
    program = gw.load_huggingface(model)
    batches = [{"input_ids": torch.randint(0, 256, (2, 16)), "attention_mask": torch.ones(2, 16)} for _ in range(6)]
    batches = [{key: value.to(torch.int64) for key, value in batch.items()} for batch in batches]
    with torch.no_grad():
        wanted = [program(**batch).logits.softmax(-1) for batch in batches]

    def loss(candidate: Any) -> float:
        """Cross entropy with what the original predicts, over batches that calibration has not seen."""
        total = 0.0
        for batch, original in zip(batches[4:], wanted[4:]):
            total -= float((original * candidate(**batch).logits.log_softmax(-1)).sum(-1).mean())
        return total / 2

    with tempfile.TemporaryDirectory() as folder:
        result = gw.auto_quantize(
            program,
            loss,
            higher_is_better=False,
            target=gw.Relative(0.01),
            calibration=batches[:4],
            space=gw.SearchSpace(bits=(4, 8), group_sizes=(32,)),
            journal=folder,
        )
        print(result)
        print("\nwritten:", ", ".join(sorted(path.name for path in Path(folder).iterdir())))
    print("found the settings" if result.met else "no settings serve")


if __name__ == "__main__":
    main()
