"""What every checkpoint format has in common: which linears it stores, and how one is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from graphwright.frontends.huggingface.quantized.modules import GroupedWeight, IntegerWeight
from graphwright.frontends.huggingface.quantized.tensors import FolderTensors
from graphwright.ir.errors import InputError
from graphwright.ir.ops.quantization import BITS

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Codes that are unpacked at once, so that temporaries stay small whatever the layer.
SLICE_ELEMENTS = 1 << 22


class Reader(ABC):
    """Reads the linears of one format.

    Attributes:
        method: ``quant_method`` in ``config.json``.
        settings: the ``quantization_config``.
        tensors: of the folder.
        where: the file that the settings stand in, for messages.
    """

    method: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, settings: Mapping[str, Any], tensors: FolderTensors, where: str) -> None:
        self.settings, self.tensors, self.where = settings, tensors, where
        self._orders: dict[bytes, torch.Tensor] = {}

    @abstractmethod
    def modules(self) -> list[str]:
        """Names of the modules that are stored quantised."""

    @abstractmethod
    def read(self, module: str, inputs: int, outputs: int) -> GroupedWeight | IntegerWeight:
        """The weight of one of them, ``[outputs, inputs]``.

        Raises:
            InputError: its tensors are missing, or do not fit each other or the settings.
        """

    def consumed(self, module: str) -> list[str]:
        """Its tensors that are no weights of the float model."""
        return [name for suffix in self.suffixes if (name := f"{module}.{suffix}") in self.tensors]

    # -- what the formats share --------------------------------------------------------------------------------------

    def number(self, settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
        """A whole number among the settings.

        Raises:
            InputError: it is missing or something else.
        """
        value = settings.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{name!r} must be a whole number, not {value!r}", where=self.where)
        return value

    def check_bits(self, bits: int, allowed: tuple[int, ...] = tuple(range(1, 9))) -> None:
        """Refuse codes that there is no operator for.

        Raises:
            InputError: naming those there are.
        """
        known = [each for each in BITS if each in allowed]
        if bits not in known:
            raise InputError(
                f"{self.method} weights of {bits} bits are not read, only of {', '.join(map(str, known))}",
                where=self.where,
                hint="start from the original weights",
            )

    def check_group(self, module: str, bits: int, group_size: int, inputs: int) -> int:
        """Columns to a group; -1 stands for a whole row.

        Raises:
            InputError: it is no group size.
        """
        if group_size == -1 or group_size == inputs:
            return inputs
        if group_size < 1 or group_size * bits % 8:
            raise InputError(
                f"a group of {group_size} codes of {bits} bits does not fill whole bytes",
                where=f"{self.where}, module {module!r}",
                hint="group_size must be a multiple of 8, or -1 for one scale to a row",
            )
        return group_size

    def order_of(self, name: str, inputs: int, group_size: int) -> torch.Tensor | None:
        """The order of the columns in which groups are neighbours, from the group of every column.

        Returns:
            int64 ``[inputs]``, the same tensor for layers of the same order, or ``None`` when they are neighbours.

        Raises:
            InputError: a group is out of range, or does not have as many columns as it should.
        """
        groups = -(-inputs // group_size)
        index = self.tensors.require(name, shape=[inputs], dtypes=(torch.int32, torch.int64), because="inputs").long()
        if bool(((index < 0) | (index >= groups)).any()):
            worst = int(index[(index < 0) | (index >= groups)][0])
            raise InputError(
                f"names the group {worst}, but {inputs} inputs in groups of {group_size} make {groups} groups",
                where=self.tensors.place(name),
                hint="check group_size in quantization_config, or quantise the model again",
            )
        plain = torch.arange(inputs) // group_size
        if torch.equal(index, plain):
            return None
        if not torch.equal(index.sort().values, plain):
            raise InputError(
                f"has groups that do not have {group_size} columns each",
                where=self.tensors.place(name),
                hint="check group_size in quantization_config, or quantise the model again",
            )
        order = index.argsort(stable=True)
        return self._orders.setdefault(order.numpy().tobytes(), order)


def check_scales(tensors: FolderTensors, name: str, scales: torch.Tensor) -> torch.Tensor:
    """Scales that are numbers.

    Raises:
        InputError: one is NaN or infinite.
    """
    if not bool(torch.isfinite(scales).all()):
        raise InputError(
            "holds NaN or infinity", where=tensors.place(name), hint="the checkpoint is damaged; quantise it again"
        )
    return scales


def in_columns(width: int, height: int) -> list[slice]:
    """Slices of ``width`` columns of ``height`` elements each, of a limited size."""
    step = max(8, SLICE_ELEMENTS // max(1, height) // 8 * 8)  # AWQ packs eight columns to a word
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]
