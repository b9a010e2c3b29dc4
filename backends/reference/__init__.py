"""The reference backend: every operator in plain PyTorch. Slow, right, and what the others are checked against."""

from __future__ import annotations

from typing import Any

import torch

from graphwright.backends.depth import DepthSchedule
from graphwright.backends.executable import Backend, Executable, KernelUse
from graphwright.backends.reference.depth import ReferenceScheduled
from graphwright.backends.reference.pipeline import ReferencePipeline
from graphwright.backends.reference.session import ReferenceSession
from graphwright.ir import ops
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.stages import cut_stage


class ReferenceExecutable(Executable):
    """A program run by PyTorch, dialect operators by their reference."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run on flat inputs; gradients flow where the caller wants them."""
        results: tuple[Any, ...] = self.program.run_graph(*inputs)
        return results

    def explain(self) -> list[KernelUse]:
        """Dialect operators run their reference, all others torch's own kernels."""
        return [
            KernelUse(node.name, path_of(node), op_name(node), "reference" if ops.is_dialect(node.target) else "torch")
            for node in self.program.nodes
            if node.op == "call_function"
        ]

    def session(self, *, slots: int = 1, capacity: int = 2048, cache: str = "float32") -> ReferenceSession:
        """Decoding in plain PyTorch; caches have the model's dtype."""
        if cache != "float32":
            raise InputError(f"the reference rounds no caches to {cache!r}", where="session", hint="use target='cpu'")
        return ReferenceSession(self.program, slots=slots, capacity=capacity)

    def pipeline(self, *, slots: int = 1, capacity: int = 2048, cache: str = "float32") -> ReferencePipeline:
        """Decoding by stages in plain PyTorch; caches have the model's dtype."""
        if cache != "float32":
            raise InputError(f"the reference rounds no caches to {cache!r}", where="session", hint="use target='cpu'")
        return ReferencePipeline(cut_stage(self.program), slots=slots, capacity=capacity)

    def scheduled(
        self, schedule: DepthSchedule, *, slots: int = 1, capacity: int = 2048, cache: str = "float32"
    ) -> ReferenceScheduled:
        """Decoding at falling depth in plain PyTorch; caches have the model's dtype."""
        if cache != "float32":
            raise InputError(f"the reference rounds no caches to {cache!r}", where="session", hint="use target='cpu'")
        return ReferenceScheduled(self.program, schedule, slots=slots, capacity=capacity)


class ReferenceBackend(Backend):
    """Plain PyTorch."""

    name = "reference"

    def lower(self, program: Program) -> ReferenceExecutable:
        """Nothing to do: a program runs as it is."""
        return ReferenceExecutable(program)
