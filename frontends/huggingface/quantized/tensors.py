"""The tensors of a folder, mapped, with what is expected of each checked where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from graphwright.frontends.huggingface.folder import ModelFolder
from graphwright.ir.errors import InputError
from graphwright.ir.weights_file import WeightsFile


class FolderTensors(Mapping[str, torch.Tensor]):
    """Every tensor of a folder's weight files by name; bytes are read when they are first used."""

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder
        self._files = {name: file for shard in folder.shards for file in (WeightsFile(shard),) for name in file}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name][name]

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def place(self, name: str) -> str:
        """Where a tensor lies, for messages."""
        return f"tensor {name!r} of {self._files[name].path}" if name in self else f"{self._folder.path}"

    def require(
        self, name: str, *, shape: Sequence[int], dtypes: Sequence[torch.dtype], because: str = ""
    ) -> torch.Tensor:
        """A tensor of this shape and one of these dtypes.

        Args:
            name: of the tensor.
            shape: that it must have.
            dtypes: of which it must have one.
            because: what the shape follows from, for the message.

        Raises:
            InputError: it is not there, or something else.
        """
        if name not in self:
            raise InputError(
                f"lacks the tensor {name!r} ({_words(dtypes)} {list(shape)})",
                where=self.place(name),
                hint="the checkpoint is incomplete, or its quantization_config belongs to another one",
            )
        found = self[name]
        if found.dtype not in dtypes or list(found.shape) != list(shape):
            reason = f" ({because})" if because else ""
            raise InputError(
                f"is {_name(found.dtype)} {list(found.shape)}, expected {_words(dtypes)} {list(shape)}{reason}",
                where=self.place(name),
                hint="quantization_config in config.json does not describe these weights; check bits and group_size",
            )
        return found


def _words(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(_name(dtype) for dtype in dtypes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
