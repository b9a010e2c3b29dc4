"""Which weights lie in the same memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

# numpy knows no bfloat16, but integers of the same size.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def shared_memory(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Pairs of names whose tensors have an element of memory in common.

    Args:
        tensors: by name; those without values, without elements or not on the CPU are taken as separate.

    Returns:
        pairs in order of address, the first of each being the one that begins earlier.
    """
    ranges = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + extent(tensor), name)
        for name, tensor in tensors.items()
        if tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.numel() > 0
    )
    pairs: list[tuple[str, str]] = []
    open_ranges: list[tuple[int, str]] = []
    for start, end, name in ranges:
        open_ranges = [(other_end, other) for other_end, other in open_ranges if other_end > start]
        pairs += [(other, name) for _, other in open_ranges if _share(tensors[other], tensors[name])]
        open_ranges.append((end, name))
    return pairs


def is_same_view(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are one: same memory, same elements in the same order."""
    return first is second or (
        first.data_ptr() == second.data_ptr()
        and first.dtype == second.dtype
        and first.shape == second.shape
        and first.stride() == second.stride()
    )


def extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last; 0 without elements."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _share(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.is_contiguous() and second.is_contiguous():
        return True
    arrays = [
        tensor.detach().view(_CARRIERS[tensor.element_size()]).numpy()
        for tensor in (first, second)
        if tensor.element_size() in _CARRIERS
    ]
    return len(arrays) < 2 or np.shares_memory(arrays[0], arrays[1])
