"""torchao, on a Python of its own: a model's linears rounded to nearest, written as the floats they stand for."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_primitives import MappingType


def main() -> None:
    """Quantise and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="taken for uniformity: rounding to nearest needs none")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    shutil.copytree(given.model, given.out, dirs_exist_ok=True)
    (file,) = given.out.glob("*.safetensors")
    weights = {name: value.float() for name, value in load_file(file).items()}
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{given.bits}"),
        granularity=PerGroup(given.group),
        mapping_type=MappingType.SYMMETRIC,
    )
    for name, value in weights.items():
        if not name.endswith("proj.weight"):
            continue
        linear = torch.nn.Linear(value.shape[1], value.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(value, requires_grad=False)
        quantize_(linear, config)
        weights[name] = linear.weight.dequantize().float().contiguous()
    save_file(weights, file)


if __name__ == "__main__":
    main()
