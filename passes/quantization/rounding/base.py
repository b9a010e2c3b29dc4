"""What a rounding method is: a choice of codes and scales for weights of a given format."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.passes.calibration import Block, Observed, Stream
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.loss import Loss
from graphwright.passes.quantization.targets import LinearTarget


@dataclass(frozen=True)
class Codes:
    """A weight as codes, before they are packed.

    Attributes:
        codes: ``[rows, columns]`` uint8.
        scales: ``[rows, groups]`` float32.
        zeros: zero points ``[rows, groups]`` float32.
        loss: what it cost: of the outputs where inputs are known, of the weights elsewhere.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    loss: Loss = field(default_factory=Loss)


@dataclass(frozen=True)
class Rounding(ABC):
    """A rounding method; its fields are its options. One of the three kinds below.

    Attributes:
        method: its name in recipes and reports.
    """

    method: ClassVar[str]

    def pattern_of_zeros(self) -> str | None:
        """The pattern of weights that it sets to 0, such as ``"2:4"``; ``None`` where it chooses none."""
        return None

    def as_option(self) -> dict[str, Any]:
        """As it stands in recipes and reports: ``method`` and :meth:`options`."""
        return {"method": self.method, **self.options()}

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.init and getattr(self, item.name) != _default(item)
        }


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


@dataclass(frozen=True)
class WeightRounding(Rounding):
    """A method that looks at nothing but the weight."""

    @abstractmethod
    def codes(self, weight: torch.Tensor, form: Format) -> Codes:
        """Codes of a weight ``[rows, columns]``, floating, finite."""


@dataclass(frozen=True)
class InputRounding(Rounding):
    """A method that looks at the inputs of each linear."""

    @abstractmethod
    def codes(self, weight: torch.Tensor, form: Format, inputs: Observed) -> Codes:
        """Codes of a weight ``[rows, columns]``, floating, finite, whose inputs are ``[n, columns]``.

        ``inputs.moment`` may be overwritten: whoever needs it afterwards gives :meth:`Observed.copy`.

        Raises:
            InputError: the inputs do not determine the codes; without ``where``, which the caller knows.
        """


@dataclass(frozen=True)
class BlockTask:
    """A block whose linears are to be rounded together.

    Attributes:
        block: its nodes are those of ``rounded.program``.
        targets: the linears, in that program, one for each weight.
        forms: their formats, by weight name.
        rounded: the batches as earlier blocks left them, rounded (see ``BlockRounding.rounded_inputs``); stands at the
            block's first node.
        exact: the batches as the program that was given left them; stands behind the block's last node.
        outputs: values of the block that later nodes read.
    """

    block: Block
    targets: Sequence[LinearTarget]
    forms: Mapping[str, Format]
    rounded: Stream
    exact: Stream
    outputs: Sequence[fx.Node]


@dataclass(frozen=True)
class BlockRounding(Rounding):
    """A method that fits all linears of a block to what the block gives.

    Attributes:
        rounded_inputs: a block is given what the rounded blocks before it give, and can make up for their errors; else
            what the exact ones give. Its outputs are held against the exact ones either way.
    """

    rounded_inputs: bool = True

    @abstractmethod
    def codes(self, task: BlockTask) -> dict[str, Codes]:
        """Codes by weight name; of ``[out, in]`` weights, also where a linear stores its weight ``[in, out]``."""
