"""Quantised checkpoints made by hand from known codes, after the formats' public definitions, bit by bit.

Nothing here is shared with what is tested: words are put together as Python integers, one code after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Layer:
    """A linear's codes: weight ``[o, i]`` is ``(codes - zeros[:, groups]) * scales[:, groups]``."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor
    bits: int

    def dense(self) -> torch.Tensor:
        """The weight in float64."""
        zeros, scales = self.zeros[:, self.groups], self.scales[:, self.groups]
        return (self.codes.double() - zeros.double()) * scales.double()


def layer(
    outputs: int, inputs: int, bits: int, group: int, *, symmetric: bool = False, shuffled: bool = False
) -> Layer:
    """A random one; ``group`` -1 stands for a whole row."""
    size = inputs if group == -1 else group
    count = inputs // size
    codes = torch.randint(0, 2**bits, (outputs, inputs))
    zeros = torch.randint(0, 2**bits, (outputs, count))
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    scales = (torch.randn(outputs, count) * 0.3 / 2**bits).half()  # of both signs
    groups = torch.arange(inputs) // size
    return Layer(codes, zeros, scales, groups[torch.randperm(inputs)] if shuffled else groups, bits)


def words(codes: Sequence[int], bits: int) -> list[int]:
    """A little-endian bit string of codes in signed words of 32 bits."""
    whole = sum(code << (position * bits) for position, code in enumerate(codes))
    found = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in found]


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 ``[rows, words]``."""
    return torch.tensor([words(row, bits) for row in codes.tolist()], dtype=torch.int32)


def gptq(name: str, item: Layer, *, version: int = 1) -> dict[str, torch.Tensor]:
    """AutoGPTQ's tensors of a linear."""
    zeros = (item.zeros - 1) % 2**item.bits if version == 1 else item.zeros
    return {
        f"{name}.qweight": pack_rows(item.codes, item.bits).T.contiguous(),
        f"{name}.qzeros": pack_rows(zeros.T, item.bits),
        f"{name}.scales": item.scales.T.contiguous(),
        f"{name}.g_idx": item.groups.to(torch.int32),
    }


def awq(name: str, item: Layer) -> dict[str, torch.Tensor]:
    """AutoAWQ's tensors of a linear, version gemm."""

    def shuffled(codes: torch.Tensor) -> torch.Tensor:
        rows = [[row[8 * word + at] for word in range(len(row) // 8) for at in AWQ_ORDER] for row in codes.tolist()]
        return torch.tensor(rows)

    return {
        f"{name}.qweight": pack_rows(shuffled(item.codes.T), 4),
        f"{name}.qzeros": pack_rows(shuffled(item.zeros.T), 4),
        f"{name}.scales": item.scales.T.contiguous(),
    }


def packed(name: str, item: Layer) -> dict[str, torch.Tensor]:
    """compressed-tensors' tensors of a linear, format pack-quantized."""
    found = {
        f"{name}.weight_packed": pack_rows(item.codes, item.bits),
        f"{name}.weight_scale": item.scales,
        f"{name}.weight_shape": torch.tensor(list(item.codes.shape)),
    }
    if bool((item.zeros != 2 ** (item.bits - 1)).any()):
        found[f"{name}.weight_zero_point"] = pack_rows(item.zeros.T, item.bits).T.contiguous()
    if bool((item.groups.diff() < 0).any()):
        found[f"{name}.weight_g_idx"] = item.groups.to(torch.int32)
    return found


def integers(name: str, item: Layer) -> dict[str, torch.Tensor]:
    """compressed-tensors' tensors of a linear, format int-quantized."""
    return {
        f"{name}.weight": (item.codes - 2 ** (item.bits - 1)).to(torch.int8),
        f"{name}.weight_scale": item.scales,
    }


def linears_of(model: Any) -> dict[str, Any]:
    """Linears by name, but the head."""
    kinds = {"Linear", "Conv1D"}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in kinds and name not in ("lm_head", "embed_out")
    }


def write(
    model: Any,
    folder: Path,
    settings: dict[str, Any],
    make: Callable[[int, int], Layer],
    tensors: Callable[[str, Layer], dict[str, torch.Tensor]],
    **options: Any,
) -> dict[str, Layer]:
    """A folder of a model with all its linears but the head quantised; the model gets the weights they stand for."""
    from safetensors.torch import load_file, save_file

    layers: dict[str, Layer] = {}
    model.save_pretrained(folder, **options)
    files = sorted(folder.glob("*.safetensors"))
    for name, module in linears_of(model).items():
        transposed = type(module).__name__ == "Conv1D"
        shape = tuple(module.weight.shape)
        outputs, inputs = shape[::-1] if transposed else shape
        item = layers[name] = make(outputs, inputs)
        weight = item.dense().to(module.weight.dtype)
        with torch.no_grad():
            module.weight.copy_(weight.T if transposed else weight)
    index = folder / "model.safetensors.index.json"
    weight_map = {}
    for file in files:
        stored = load_file(file)
        for name, item in layers.items():
            if f"{name}.weight" in stored:
                del stored[f"{name}.weight"]
                stored |= tensors(name, item)
        save_file(stored, file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(stored, file.name))
    if index.is_file():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    configuration = folder / "config.json"
    document = json.loads(configuration.read_text())
    configuration.write_text(json.dumps({**document, "quantization_config": settings}))
    return layers


def gptq_settings(bits: int, group: int, **more: Any) -> dict[str, Any]:
    """``quantization_config`` of GPTQ."""
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, **more}


def awq_settings(group: int, **more: Any) -> dict[str, Any]:
    """``quantization_config`` of AWQ."""
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", **more}


def compressed_settings(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors with one group."""
    inputs = more.pop("input_activations", None)
    group = {"targets": ["Linear"], "weights": {"type": "int", **weights}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }
