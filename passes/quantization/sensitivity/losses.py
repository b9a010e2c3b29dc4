"""The number whose change sensitivities foretell: a loss of the model's outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.passes.calibration import Batch

LossFunction = Callable[[Any, Any], torch.Tensor]

IGNORED = -100


@dataclass(frozen=True)
class ModelLoss(ABC):
    """A loss over one batch.

    Attributes:
        program: whose outputs are judged.
    """

    program: Program

    @abstractmethod
    def gradient_of(self, outputs: tuple[Any, ...], inputs: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        """The scalar whose gradient is taken."""

    def reference(self, outputs: tuple[Any, ...], inputs: list[torch.Tensor], batch: Batch) -> Any:
        """What must be known of the exact outputs to compare others with them."""
        return float(self.gradient_of(outputs, inputs, batch))

    def rise(self, outputs: tuple[Any, ...], reference: Any, inputs: list[torch.Tensor], batch: Batch) -> float:
        """The loss of changed outputs, less that of the exact ones."""
        return float(self.gradient_of(outputs, inputs, batch)) - float(reference)

    @property
    def is_mean(self) -> bool:
        """Whether it is a mean over rows, so that a row's own loss weighs as much as there are rows."""
        return True


@dataclass(frozen=True)
class NextToken(ModelLoss):
    """Mean cross entropy of every token given those before it, padding left out."""

    def gradient_of(self, outputs: tuple[Any, ...], inputs: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Of outputs ``logits [batch, length, vocabulary]`` and inputs ``input_ids [batch, length]``."""
        logits = outputs[self.program.signature.output_names().index("logits")]
        names = self.program.signature.names
        wanted = inputs[names.index("input_ids")]
        if "attention_mask" in names and inputs[names.index("attention_mask")].shape == wanted.shape:
            wanted = wanted.masked_fill(inputs[names.index("attention_mask")] == 0, IGNORED)
        return functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).to(torch.float32), wanted[:, 1:].flatten(), ignore_index=IGNORED
        )

    @staticmethod
    def fits(program: Program) -> bool:
        """Whether the program gives logits for the tokens it is given."""
        names, outputs = program.signature.names, program.signature.output_names()
        if "logits" not in outputs or "input_ids" not in names:
            return False
        items = program.output.args[0]
        assert isinstance(items, tuple | list)
        logits = getattr(items[outputs.index("logits")], "meta", {}).get("val")
        ids = program.inputs[names.index("input_ids")].meta["val"]
        return isinstance(logits, torch.Tensor) and logits.dim() == 3 and logits.shape[:2] == ids.shape


@dataclass(frozen=True)
class Labelled(ModelLoss):
    """Mean cross entropy of the logits against labels that come with each batch.

    Attributes:
        labels: what they are called in the batch; -100 is left out.
    """

    labels: str

    def gradient_of(self, outputs: tuple[Any, ...], inputs: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Of outputs ``logits [..., classes]`` and labels ``[...]``."""
        names = self.program.signature.output_names()
        if "logits" not in names:
            raise InputError("the model gives no 'logits'", where="labels", hint="give loss=function(outputs, batch)")
        if not isinstance(batch, Mapping) or self.labels not in batch:
            raise InputError(f"a calibration batch has no {self.labels!r}", where="labels", hint="give mappings")
        logits = outputs[names.index("logits")].to(torch.float32)
        return functional.cross_entropy(logits.flatten(0, -2), batch[self.labels].flatten(), ignore_index=IGNORED)


@dataclass(frozen=True)
class Given(ModelLoss):
    """The user's function of the model's outputs and the batch."""

    function: LossFunction

    def gradient_of(self, outputs: tuple[Any, ...], inputs: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        """What the function gives.

        Raises:
            InputError: that is no finite number.
        """
        found = self.function(self.program.signature.unflatten(outputs), batch)
        if not isinstance(found, torch.Tensor) or found.numel() != 1 or not bool(torch.isfinite(found).all()):
            raise InputError(f"must give one finite number as a tensor, not {found!r}", where="loss")
        return found.reshape(())


@dataclass(frozen=True)
class OutputChange(ModelLoss):
    """How much the outputs change, where there is no loss: squared, relative to their size.

    Its gradient is zero at the exact weights. What is differentiated is a random projection of the outputs, whose
    squared gradients have the Gauss-Newton matrix of the squared change as their mean.
    """

    def gradient_of(self, outputs: tuple[Any, ...], inputs: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        """A projection on random signs, relative to the size of the outputs."""
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros(())
        for value in _floating(outputs):
            signs = torch.randint(0, 2, value.shape, generator=generator).to(value.dtype) * 2 - 1
            total = total + (value * signs).sum() / value.detach().norm().clamp(min=1e-30)
        return total

    def reference(self, outputs: tuple[Any, ...], inputs: list[torch.Tensor], batch: Batch) -> Any:
        """The outputs themselves."""
        return _floating(outputs)

    def rise(self, outputs: tuple[Any, ...], reference: Any, inputs: list[torch.Tensor], batch: Batch) -> float:
        """Squared relative change, of all outputs together."""
        pairs = zip(_floating(outputs), reference, strict=True)
        return sum(float(((a - b).norm() / b.norm().clamp(min=1e-30)) ** 2) for a, b in pairs)

    @property
    def is_mean(self) -> bool:
        """It is a sum."""
        return False


def _floating(values: tuple[Any, ...]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def model_loss(program: Program, loss: LossFunction | None, labels: str | None) -> ModelLoss:
    """The loss that was asked for, or the usual one of such a program.

    Raises:
        InputError: both are given, or ``loss`` is no function.
    """
    if loss is not None and labels is not None:
        raise InputError("are two losses", where="loss and labels", hint="give one of them")
    if loss is not None and not callable(loss):
        raise InputError(f"must be a function of the outputs and the batch, not {loss!r}", where="loss")
    if loss is not None:
        return Given(program, loss)
    if labels is not None:
        return Labelled(program, labels)
    return NextToken(program) if NextToken.fits(program) else OutputChange(program)
