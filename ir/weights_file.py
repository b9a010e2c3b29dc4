"""Writing tensors to a safetensors file piece by piece, and mapping such a file back.

The file is the format of https://github.com/huggingface/safetensors: eight bytes of header length, a JSON header, the
data. Writing it here keeps memory flat (one tensor at a time, no copy of contiguous ones) and puts a digest of the data
into the header, by which a program knows its own weights again. Reading is left to the safetensors package.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch

from graphwright.ir.errors import SerializationError
from graphwright.ir.mapped import release

_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DIGEST_BYTES = 16
_PIECE = 1 << 24
_ALIGNMENT = 64
DIGEST = "graphwright.digest"


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors so that each one is aligned: those of whole 64 bytes first, then by element size, then by name.

    Args:
        file: opened for writing, at its beginning; need not be readable, must be seekable.
        tensors: any dtype with a safetensors name, any strides, any device.
        metadata: text that goes into the header.

    Returns:
        the digest of the data, which also stands in the header.

    Raises:
        SerializationError: a tensor is sparse, has no values (meta device), or a dtype that cannot be stored.
        OSError: the file cannot be written.
    """
    names = sorted(tensors, key=lambda name: (_is_odd(tensors[name]), -tensors[name].element_size(), name))
    entries: dict[str, object] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        _check(name, tensor)
        size = tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    file.write(_header(entries, {**(metadata or {}), DIGEST: "0" * 2 * _DIGEST_BYTES}))
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name in names:
        for piece in _bytes_of(tensors[name]):
            digest.update(piece)
            file.write(piece)
    file.seek(0)
    file.write(_header(entries, {**(metadata or {}), DIGEST: digest.hexdigest()}))
    return digest.hexdigest()


def _is_odd(tensor: torch.Tensor) -> bool:
    return tensor.numel() * tensor.element_size() % _ALIGNMENT != 0


def _check(name: str, tensor: torch.Tensor) -> None:
    where = f"weight {name!r}"
    if tensor.is_meta:
        raise SerializationError(
            "has no values",
            where=where,
            hint="it was let go of (CpuBackend(keep_weights=False)), or the program was parsed without tensors",
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise SerializationError(f"has layout {tensor.layout}, which cannot be stored", where=where)
    if tensor.dtype not in _NAMES:
        raise SerializationError(f"has dtype {tensor.dtype}, which safetensors cannot store", where=where)
    if name == "__metadata__":
        raise SerializationError("has a name that safetensors keeps for itself", where=where)


def _header(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    if tensor.numel() == 0:
        return
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    data: memoryview = flat.numpy().data
    for start in range(0, len(data), _PIECE):
        yield data[start : start + _PIECE]
        release(flat[start : start + _PIECE])  # a model that is mapped from another file need not fit in memory


class WeightsFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, mapped: bytes are read when they are first used.

    The mapping is private: writing into a tensor does not reach the file.

    Attributes:
        path: where it is.
        metadata: the text in its header.
        digest: what :func:`write_tensors` put there, or an empty string.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            SerializationError: it is missing, truncated, or not a safetensors file.
        """
        self.path = path
        try:
            self._file = safetensors.safe_open(str(path), framework="pt")
        except FileNotFoundError as error:
            raise SerializationError("the file is missing", where=str(path), hint="save the program again") from error
        except (safetensors.SafetensorError, OSError) as error:
            size = os.path.getsize(path) if path.is_file() else 0
            raise SerializationError(
                f"the file is truncated or damaged ({size} bytes): {error}",
                where=str(path),
                hint="copy it again from where it came from, or save the program again",
            ) from error
        file: Any = self._file
        self.metadata: Mapping[str, str] = file.metadata() or {}
        self.digest = self.metadata.get(DIGEST, "")
        self._names: dict[str, None] = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            file: Any = self._file
            tensor: torch.Tensor = file.get_tensor(name)
        except (safetensors.SafetensorError, OSError, RuntimeError) as error:
            raise SerializationError(f"cannot be read: {error}", where=f"weight {name!r} of {self.path}") from error
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def computed_digest(self) -> str:
        """The digest of the data as it is now; reads the whole file."""
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        with self.path.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            while piece := file.read(_PIECE):
                digest.update(piece)
        return digest.hexdigest()
