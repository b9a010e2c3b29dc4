"""auto-round, in its own process: a Hugging Face folder with its weights rounded by auto-round and stored as floats.

``python _rival_autoround.py --model DIR --calibration tokens.safetensors --bits 4 --group 128 --out DIR``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Round the model that the options name."""
    parser = argparse.ArgumentParser(description="auto-round with its own defaults")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--calibration", type=Path, required=True, help="safetensors file: input_ids [windows, tokens]")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True, help="columns to a scale; 0 for one scale per channel")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="windows to an iteration")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    windows = load_file(options.calibration)["input_ids"].long()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(options.batch)]
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(options.model),
        bits=options.bits,
        group_size=options.group or -1,
        sym=not options.asymmetric,
        dataset=batches,
        seqlen=windows.shape[1],
        nsamples=len(windows),
        iters=options.iterations,
        batch_size=options.batch,
        seed=options.seed,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    found = rounding.quantize()
    rounded = found[0] if isinstance(found, tuple) else found
    rounded.to(torch.float32).save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)


if __name__ == "__main__":
    main()
