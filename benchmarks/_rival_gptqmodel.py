"""GPTQModel on the CPU, in an environment of its own: unpacks and runs folders of ours, and packs codes for us.

::

    python _rival_gptqmodel.py read FOLDER IDS OUT             weights that its linears make of a folder's tensors, in
                                                               float32, and logits of the folder as it loads it
    python _rival_gptqmodel.py pack LAYOUT CODES OUT [...]     tensors of linears, packed from float weights

Tensors go through safetensors files.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import load_file, save_file


def main() -> None:
    """Do what the first argument says."""
    torch.set_num_threads(2)
    if sys.argv[1] == "read":
        _read(*sys.argv[2:])
    else:
        _pack(*sys.argv[2:])


def _linear(bits: int, group: int, inputs: int, outputs: int) -> TorchLinear:
    return TorchLinear(
        bits=bits, group_size=group, sym=False, desc_act=False, in_features=inputs, out_features=outputs, bias=False
    )


def _read(folder: str, ids: str, out: str) -> None:
    settings = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    tensors = {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}
    bits, group, found = settings["bits"], settings["group_size"], {}
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        given = {leaf: tensors[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales")}
        scales = given["scales"].float()  # as it computes in half precision otherwise
        if settings["quant_method"] == "awq":
            size = given["qweight"].shape[0] // scales.shape[0]
            found[name] = dequantize_gemm(given["qweight"], given["qzeros"], scales, bits, size).T
            continue
        inputs, outputs = given["qweight"].shape[0] * 32 // bits, scales.shape[1]
        linear = _linear(bits, group, inputs, outputs)
        linear.qweight, linear.qzeros, linear.scales = given["qweight"], given["qzeros"], scales
        linear.g_idx = tensors[f"{name}.g_idx"]
        if settings["checkpoint_format"] == "gptq":
            convert_gptq_v1_to_v2_format_module(linear, bits=bits, pack_dtype=torch.int32)
        found[name] = linear.dequantize_weight().float().T
    found["logits"] = _logits(folder, ids)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)


def _logits(folder: str, ids: str) -> torch.Tensor:
    from gptqmodel import BACKEND, GPTQModel

    settings = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    backend = BACKEND.AWQ_TORCH if settings["quant_method"] == "awq" else BACKEND.GPTQ_TORCH
    loaded = GPTQModel.load(folder, backend=backend, device="cpu", dtype=torch.float16)
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(input_ids=load_file(ids)["ids"]).logits
    return logits.float()


def _pack(*jobs: str) -> None:
    for start in range(0, len(jobs), 3):
        _pack_one(*jobs[start : start + 3])


def _pack_one(layout: str, codes: str, out: str) -> None:
    given = load_file(codes)
    bits, group = (int(given[name]) for name in ("bits", "group"))
    scales, zeros, outputs, inputs = given["scales"], given["zeros"], *given["weight"].shape
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = given["weight"]
    if layout == "awq":
        options = {"sym": False, "desc_act": False, "in_features": inputs, "out_features": outputs, "bias": False}
        made = AwqTorchLinear(bits=bits, group_size=group, **options)
        made.pack(linear, scales, zeros)
    else:
        made = _linear(bits, group, inputs, outputs)
        made.pack_original(linear, scales, zeros, given["g_idx"])
    names = ("qweight", "qzeros", "scales", "g_idx") if layout == "gptq" else ("qweight", "qzeros", "scales")
    save_file({name: getattr(made, name).contiguous() for name in names}, out)


if __name__ == "__main__":
    main()
