"""What every backend offers: a program lowered to something that runs and can say what runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.backends.depth import DepthSchedule
from graphwright.backends.pipeline import PipelineSession
from graphwright.backends.session import Session
from graphwright.ir.errors import BackendError, InputError
from graphwright.ir.program import Program


@dataclass(frozen=True)
class KernelUse:
    """Which kernel runs for one node.

    Attributes:
        node: name in the program.
        path: module path.
        op: operator as written.
        kernel: kernel and variant, such as ``linear_nbits avx512_vnni`` or ``reference``.
        reason: why this one, when it is not the first choice.
    """

    node: str
    path: str
    op: str
    kernel: str
    reason: str = ""


def need_device(program: Program, inputs: Iterable[object], device: torch.device) -> None:
    """Check that a program's flat inputs lie where it runs.

    Raises:
        InputError: one lies elsewhere; it is named.
    """
    for node, value in zip(program.inputs, inputs):
        if isinstance(value, torch.Tensor) and value.device.type != device.type:
            raise InputError(
                f"is on {value.device}, the program runs on {device}",
                where=f"input {str(node.target)!r}",
                hint=f"move it there: x.to({str(device)!r}), or optimise the model for another target",
            )


class Executable(ABC):
    """A lowered program: called with the program's flat inputs.

    Attributes:
        device: where inputs lie.
    """

    device = torch.device("cpu")

    @abstractmethod
    def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run on flat inputs; gives flat outputs.

        Raises:
            InputError: an input lies elsewhere than the program runs.
        """

    @abstractmethod
    def explain(self) -> list[KernelUse]:
        """Which kernel runs for every node."""

    def session(self, *, slots: int = 1, capacity: int = 2048, cache: str = "float32") -> Session:
        """Caches, and steps on them, where the program is a decoding step.

        Args:
            slots: sequences held at a time.
            capacity: tokens that each can hold.
            cache: how keys and values are stored: ``"float32"``, ``"bfloat16"`` or ``"int8"``.

        Raises:
            ProgramError: the program is not a decoding step.
            InputError: there are no slots or no capacity, or caches are not stored so.
            BackendError: this backend runs no decoding steps.
        """
        raise BackendError("runs no decoding steps", where=f"session of {type(self).__name__}", hint="use target='cpu'")

    def pipeline(self, *, slots: int = 1, capacity: int = 2048, cache: str = "float32") -> PipelineSession:
        """The same of a decoder that repeats a group of layers, stage by stage.

        Args:
            slots: sequences held at a time.
            capacity: tokens that each can hold.
            cache: how keys and values are stored.

        Raises:
            ProgramError: the program is not a decoding step, or repeats no group of layers.
            InputError: there are no slots or no capacity, or caches are not stored so.
            BackendError: this backend runs no stages.
        """
        raise BackendError("runs no stages", where=f"pipeline of {type(self).__name__}", hint="use target='cpu'")

    def scheduled(
        self, schedule: DepthSchedule, *, slots: int = 1, capacity: int = 2048, cache: str = "float32"
    ) -> Session:
        """The same with later tokens running through fewer layers.

        Args:
            schedule: how many layers which token runs through.
            slots: sequences held at a time.
            capacity: tokens that each can hold.
            cache: how keys and values are stored.

        Raises:
            ProgramError: the program is not a decoding step, repeats no layer, or has let go of its weights.
            InputError: there are no slots or no capacity, or caches are not stored so.
            BackendError: this backend runs every token through all layers.
        """
        where = f"depth schedule of {type(self).__name__}"
        raise BackendError("runs every token through all layers", where=where, hint="use target='cpu'")


class Backend(ABC):
    """A way out of the IR."""

    name: str

    def check(self) -> None:
        """Check that this machine can run it; asked before minutes are spent on a model.

        Raises:
            BackendError: it cannot.
        """
        return

    @abstractmethod
    def lower(self, program: Program) -> Executable:
        """Lower a program.

        Raises:
            BackendError: this machine or program is not supported.
        """


def summarize(uses: Iterable[KernelUse]) -> str:
    """Kernels by operator with counts, one line each, most frequent first."""
    counts: dict[tuple[str, str, str], int] = {}
    for use in uses:
        key = (use.op, use.kernel, use.reason)
        counts[key] = counts.get(key, 0) + 1
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    width = max((len(op) for op, _, _ in counts), default=0)
    return "\n".join(
        f"{count:5d} × {op:<{width}}  {kernel}{'  (' + reason + ')' if reason else ''}"
        for (op, kernel, reason), count in rows
    )
