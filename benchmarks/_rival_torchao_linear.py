"""torchao, in its own process: one linear on INT4 weights, bfloat16 activations or ones quantised as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _rival_worker import Call, serve
from torchao.prototype.quantization.int4 import Int8DynamicActivationInt4WeightConfig
from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
from torchao.quantization import quantize_
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros


def load(request: dict[str, Any]) -> Callable[[int], Call]:
    """``weights`` (npz), ``copies`` of them, ``dynamic``: whether the activations become int8, ``threads``."""
    torch.set_num_threads(request["threads"])
    held = np.load(request["weights"])
    packed, scales = torch.from_numpy(held["codes"]), torch.from_numpy(held["scales"])
    codes = torch.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1)
    x = torch.from_numpy(held["x"]).bfloat16()
    make = _dynamic if request["dynamic"] else _weight_only
    calls = [make(codes, scales) for _ in range(request["copies"])]

    def with_rows(rows: int) -> Call:
        given, turn = x[:rows].contiguous(), 0

        def call() -> Any:
            nonlocal turn
            turn = (turn + 1) % len(calls)
            with torch.inference_mode():
                found = calls[turn](given)
            return _Answer(found)

        return call

    return with_rows


class _Answer:
    """numpy has no bfloat16, and turning it into fp32 is no part of what is timed."""

    def __init__(self, found: torch.Tensor) -> None:
        self._found = found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._found.float().numpy(), dtype)


def _weight_only(codes: torch.Tensor, scales: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """torchao's kernel for CPUs, called as in a compiled graph: nothing of the tensor's own dispatch is timed."""
    narrow, group = scales.bfloat16(), codes.shape[1] // scales.shape[1]
    weight = Int4OpaqueTensor(
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1),
        pack_tinygemm_scales_and_zeros(narrow, torch.zeros_like(narrow), torch.bfloat16),
        [1, group],
        codes.shape,
    )
    qdata, scale_and_zero = weight.qdata, weight.scale_and_zero
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, qdata, group, scale_and_zero)


def _dynamic(codes: torch.Tensor, scales: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """int8 activations; a release of torchao may come without the kernel, and says so."""
    group = codes.shape[1] // scales.shape[1]
    linear = torch.nn.Linear(codes.shape[1], codes.shape[0], bias=False, dtype=torch.bfloat16)
    centred = codes.reshape(*scales.shape, group).float() - 8
    linear.weight.data = (centred * scales.float()[..., None]).reshape(codes.shape).bfloat16()
    quantize_(linear, Int8DynamicActivationInt4WeightConfig(group_size=group))
    return linear


if __name__ == "__main__":
    serve(load)
