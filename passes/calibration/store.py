"""Values of many batches: in memory while they are few, in files beyond that."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

# Bytes held in memory; further tensors go to files. Small models never touch the disk.
_IN_MEMORY = 128 << 20
# Smaller tensors are not worth a file.
_LEAST = 1 << 14


class _Filed:
    """A tensor that lies in a file."""

    def __init__(self, path: Path, value: torch.Tensor) -> None:
        self.path, self.dtype, self.shape = path, value.dtype, value.shape
        value.detach().contiguous().view(-1).view(torch.uint8).numpy().tofile(path)

    def load(self) -> torch.Tensor:
        data = torch.from_numpy(np.fromfile(self.path, np.uint8))
        return data.view(self.dtype).view(self.shape)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class _Held:
    """A tensor in memory, and the bytes that it keeps there."""

    def __init__(self, value: torch.Tensor, size: int) -> None:
        self.value, self.size = value, size


class ValueStore:
    """Values by batch and name. Tensors, numbers, and lists of them."""

    def __init__(self, limit: int = _IN_MEMORY) -> None:
        """Make an empty one; tensors beyond ``limit`` bytes go to files."""
        self._folder = tempfile.TemporaryDirectory(prefix="graphwright-calibration-")
        self._entries: dict[tuple[int, str], Any] = {}
        self._limit = limit
        self._bytes = 0
        self._count = 0

    def put(self, batch: int, name: str, value: Any) -> None:
        """Keep a value."""
        self.drop(batch, name)
        leaves, spec = pytree.tree_flatten(value)
        self._entries[batch, name] = ([self._kept(leaf) for leaf in leaves], spec)

    def get(self, batch: int, name: str) -> Any:
        """A value that was put here."""
        leaves, spec = self._entries[batch, name]
        return pytree.tree_unflatten([_opened(leaf) for leaf in leaves], spec)

    def drop(self, batch: int, name: str) -> None:
        """Forget a value, if it is here."""
        leaves, _ = self._entries.pop((batch, name), ((), None))
        for leaf in leaves:
            if isinstance(leaf, _Filed):
                leaf.remove()
            elif isinstance(leaf, _Held):
                self._bytes -= leaf.size

    def close(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._bytes = 0
        self._folder.cleanup()

    @property
    def in_memory(self) -> int:
        """Bytes of the tensors that are in memory."""
        return self._bytes

    @property
    def in_files(self) -> int:
        """How many tensors lie in files."""
        return sum(isinstance(leaf, _Filed) for leaves, _ in self._entries.values() for leaf in leaves)

    def _kept(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        # A part of a larger tensor would keep all of it; an expanded one is less than it looks.
        size = min(leaf.nbytes, leaf.untyped_storage().nbytes())
        if size < _LEAST or self._bytes + size <= self._limit:
            self._bytes += size
            return _Held(leaf.detach() if leaf.untyped_storage().nbytes() <= size else leaf.detach().clone(), size)
        self._count += 1
        return _Filed(Path(self._folder.name) / f"{self._count}.bin", leaf)


def _opened(leaf: Any) -> Any:
    if isinstance(leaf, _Filed):
        return leaf.load()
    return leaf.value if isinstance(leaf, _Held) else leaf
