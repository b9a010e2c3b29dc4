"""Weights that are mapped from files: which they are, and letting go of their pages once they have been used.

A mapped weight costs no memory until it is read; then its pages count as the process's until the kernel is short of
memory. Work that goes through a model layer by layer gives them back as it goes, so that a model need not fit. The
file's content stays in the system's cache, from where the pages come back when they are read again. Linux only; on
other systems, and where ``/proc`` is not there, nothing is let go of.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphwright.ir.memory import extent

_MADV_DONTNEED = 4
# Bits of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst in the kernel's sources).
_PRESENT, _SWAPPED, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
_ENTRY = 8  # bytes


def release(tensor: torch.Tensor) -> int:
    """Let go of the memory behind a tensor that is mapped from a file.

    Values are not lost: pages that hold anything but the file's content, such as those that have been written into, are
    recognised, and then nothing is let go of. So it can be called with any tensor.

    Returns:
        bytes that are no longer in memory; 0 for what lies in no file, and where the system cannot do it.
    """
    if not _has_address(tensor):
        return 0
    start, end = tensor.data_ptr(), tensor.data_ptr() + extent(tensor)
    first, last = start // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
    pages = _pages(first, last)
    here = pages & _PRESENT != 0
    if not here.any() or (pages & _SWAPPED != 0).any() or (pages[here] & _OF_FILE == 0).any():
        return 0
    failed = _madvise()(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, _MADV_DONTNEED)
    return 0 if failed else int(here.sum()) * mmap.PAGESIZE


def give_back_freed() -> None:
    """Give memory that has been freed back to the system, where the C library is glibc, which keeps it otherwise.

    For moments at which much is freed that will not be needed again soon: a call takes milliseconds.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def mapped(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Those of the tensors that lie in a mapped file."""
    candidates = [tensor for tensor in tensors if _has_address(tensor)]
    files = _file_ranges() if candidates else []
    starts = [start for start, _ in files]

    def is_inside(tensor: torch.Tensor) -> bool:
        index = bisect.bisect_right(starts, tensor.data_ptr()) - 1
        return index >= 0 and tensor.data_ptr() + extent(tensor) <= files[index][1]

    return [tensor for tensor in candidates if is_inside(tensor)]


def streaming(tensors: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Inside the block, what an operator has read of mapped tensors is let go of as soon as it has run.

    Operators are followed below autograd, so models, programs and plain calculations stream alike; results are the same
    bit for bit. It does nothing where no tensor is mapped.

    Args:
        tensors: a model's weights.
    """
    found = mapped(tensors)
    return _Streaming(found) if found else contextlib.nullcontext()


class _Streaming(TorchDispatchMode):
    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + extent(tensor)) for tensor in tensors)
        self._starts, self._ends = [start for start, _ in ranges], [end for _, end in ranges]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_view(func):
            for item in pytree.tree_leaves((args, kwargs)):
                if _has_address(item) and self._is_weight(item):
                    release(item)
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        give_back_freed()

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        index = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        return index >= 0 and bool(tensor.data_ptr() < self._ends[index])


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an operator hands on its operand's memory instead of reading it."""
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def _has_address(item: Any) -> bool:
    # Fake tensors and other subclasses have none of their own.
    if type(item) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return bool(item.layout == torch.strided and item.device.type == "cpu" and item.numel() > 0)


def _file_ranges() -> list[tuple[int, int]]:
    """Addresses of this process that map files, in order; neighbouring parts of one file as one."""
    ranges: list[tuple[int, int]] = []
    previous = ""
    for line in _lines(Path("/proc/self/maps")):
        addresses, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode == "0" or not path:
            continue
        start, end = (int(each, 16) for each in addresses.split("-"))
        if ranges and ranges[-1][1] == start and path[0] == previous:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
        previous = path[0]
    return ranges


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return []


def _pages(first: int, last: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The kernel's entries for pages of this process; none where it gives none."""
    descriptor = _pagemap()
    content = os.pread(descriptor, (last - first) * _ENTRY, first * _ENTRY) if descriptor is not None else b""
    return np.frombuffer(content if len(content) == (last - first) * _ENTRY else b"", np.uint64)


def _pagemap() -> int | None:
    # By process: in a child of fork the parent's descriptor would still show the parent's pages.
    return _pagemap_of(os.getpid()) if sys.platform == "linux" else None


@functools.lru_cache(maxsize=1)
def _pagemap_of(process: int) -> int | None:
    try:
        return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


@functools.cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    result: Callable[[int, int, int], int] = function
    return result
