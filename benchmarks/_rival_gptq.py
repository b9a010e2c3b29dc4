"""GPTQModel on the CPU, in an environment of its own: quantises a folder and writes it back as plain float weights.

::

    python _rival_gptq.py --model DIR --calibration tokens.safetensors --bits 4 --group 128 --out DIR

The calibration file holds one integer tensor ``[windows, length]``. The folder written is the model with every
quantised weight replaced by what its codes stand for, in float32; ``settings.json`` beside it says what was asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default on two cores is one, with which it does not start

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FORMAT
from gptqmodel.utils.backend import BACKEND
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Quantise one folder."""
    options = _options()
    torch.set_num_threads(options.threads)
    tokens = next(iter(load_file(options.calibration).values())).to(torch.int64)
    config = QuantizeConfig(
        bits=options.bits,
        group_size=options.group,
        sym=not options.asymmetric,
        desc_act=options.act_order,
        act_group_aware=options.group_order,
        damp_percent=options.damping,
        device="cpu",
        offload_to_disk=False,
        format=FORMAT.GPTQ_V2,  # whose zero points are as they are; the older one's are off by one until loaded again
    )
    model = GPTQModel.load(str(options.model), config, dtype=torch.float32, backend=BACKEND.TORCH)
    start = time.perf_counter()
    batches = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model.quantize(batches, batch_size=1, backend=BACKEND.TORCH)
    seconds = time.perf_counter() - start
    plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    names = dict(plain.named_modules())
    count = 0
    with torch.no_grad():
        for path, module in model.model.named_modules():
            if hasattr(module, "dequantize_weight"):
                given, weight = names[path].weight, module.dequantize_weight().to(torch.float32).T
                if float((weight - given).norm() / given.norm()) > 1.0:
                    raise RuntimeError(f"{path} is nothing like its original: its codes have been read wrongly")
                given.copy_(weight)
                count += 1
    if not count:
        raise RuntimeError("no weight has been quantised")
    plain.save_pretrained(options.out)
    said = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    text = json.dumps({**said, "seconds": seconds, "weights": count}, indent=1)
    (options.out / "settings.json").write_text(text, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--calibration", type=Path, required=True, help="safetensors with tokens [windows, length]")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128, help="group size; -1 for one scale per channel")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--act-order", action="store_true", help="desc_act")
    parser.add_argument("--group-order", action="store_true", help="act_group_aware")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
