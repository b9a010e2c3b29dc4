"""Weights made from weights that are mapped from files: mapped as well, from a file that vanishes with them."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence

import torch

from graphwright.ir.mapped import mapped, release

# Smaller results are not worth a file.
_LEAST = 1 << 20


def stack(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``torch.cat(parts)``; where all parts are mapped from files, the result is mapped from a temporary one.

    So passes that put the weights of a model together need not hold them. The file lies in :func:`tempfile.gettempdir`
    (``TMPDIR``), which should be on a disk, and is gone when the tensor is. Where there is no room for it, a warning
    says so and the result is in memory.
    """
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    size = sum(part.nbytes for part in parts)
    if size < _LEAST or len(mapped(parts)) < len(parts) or len({part.dtype for part in parts}) > 1:
        return torch.cat(list(parts))
    try:
        result = _in_file(shape, size, parts[0].dtype)
    except OSError as error:
        warnings.warn(
            f"weights stay in memory: no temporary file of {size} bytes can be made in {tempfile.gettempdir()} "
            f"({error.strerror}); TMPDIR may name another folder",
            stacklevel=2,
        )
        return torch.cat(list(parts))
    row = 0
    for part in parts:
        place = result[row : row + len(part)]
        place.copy_(part)
        release(part)
        release(place)
        row += len(part)
    return result


def _in_file(shape: tuple[int, ...], size: int, dtype: torch.dtype) -> torch.Tensor:
    """Room in a file that has no name any more."""
    descriptor, name = tempfile.mkstemp(prefix="graphwright-")
    try:
        # A hole in the file would be an error only when it is written to, and then a fatal one.
        os.posix_fallocate(descriptor, 0, size)
        return torch.from_file(name, shared=True, size=size // dtype.itemsize, dtype=dtype).view(shape)
    finally:
        os.close(descriptor)
        os.unlink(name)
