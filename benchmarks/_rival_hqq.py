"""hqq on the CPU, in an environment of its own: quantises a folder and writes it back as plain float weights.

::

    python _rival_hqq.py --model DIR --bits 4 --group 64 --out DIR

The folder written is the model with the weight of every linear but the head replaced by what its codes stand for, in
float32; ``settings.json`` beside it says what was asked for. ``--calibration`` is accepted and not looked at.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from transformers import AutoModelForCausalLM


def main() -> None:
    """Quantise one folder."""
    options = _options()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    start, count = time.perf_counter(), 0
    with torch.no_grad():
        for path, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or path.endswith("lm_head"):
                continue
            # As HQQLinear does with BaseQuantizeConfig's defaults, whose codes are then packed and unpacked again.
            codes, meta = Quantizer.quantize(
                module.weight.data,
                nbits=options.bits,
                group_size=options.group,
                optimize=True,
                axis=1,
                round_zero=options.round_zero or options.bits == 4,
                compute_dtype=torch.float32,
                device="cpu",
            )
            module.weight.copy_(Quantizer.dequantize(codes, meta).to(torch.float32).reshape(module.weight.shape))
            count += 1
    seconds = time.perf_counter() - start
    model.save_pretrained(options.out)
    said = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    text = json.dumps({**said, "seconds": seconds, "weights": count}, indent=1)
    (options.out / "settings.json").write_text(text, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--calibration", type=Path, help="not used")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--round-zero", action="store_true", help="whole zero points before they are optimised")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
