"""The CPU backend and what it makes of a program."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.cpu.executor.assembly import Assembled, assemble_step
from graphwright.backends.cpu.executor.depth import CpuScheduled
from graphwright.backends.cpu.executor.pipeline import CpuPipeline
from graphwright.backends.cpu.executor.session import CpuSession
from graphwright.backends.cpu.features import features
from graphwright.backends.cpu.lowering import Lowered, assemble, lower, lower_stage
from graphwright.backends.depth import Depths, DepthSchedule
from graphwright.backends.executable import Backend, Executable, KernelUse, need_device
from graphwright.backends.session import CACHES
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import BackendError, InputError, ProgramError
from graphwright.ir.program import Program
from graphwright.ir.stages import Stage
from graphwright.ir.truncation import layers_of, truncated

COMPUTE = ("float32", "bfloat16", "int8")


class CpuExecutable(Executable):
    """A program that runs on the C++ kernels. Inference only: it gives no gradients."""

    def __init__(
        self,
        program: Program,
        lowered: Lowered,
        compute: str = "float32",
        stage: tuple[Stage, Lowered] | ProgramError | None = None,
    ) -> None:
        self.program, self.lowered, self.compute = program, lowered, compute
        self._body = assemble(program, lowered)
        self._steps: dict[str, Assembled] = {}
        self._stage = stage
        self._stages: dict[str, Assembled] = {}

    def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run on flat inputs, which lie on the CPU; gives flat outputs."""
        need_device(self.program, inputs, self.device)
        with torch.no_grad():
            results: tuple[Any, ...] = self._body(*inputs)
        return results

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that PyTorch uses; those of kernels are within them."""
        return weights_in_use(self.program, self._body)

    def explain(self) -> list[KernelUse]:
        """The kernel of every node, and why it is PyTorch's where there would be one of ours."""
        if DecoderLayout.find(self.program) is not None and features().selected is not None:
            return list(self._assembled("float32").uses)
        return list(self.lowered.uses)

    def session(self, *, slots: int = 1, capacity: int = 2048, cache: str = "float32") -> CpuSession:
        """Decoding on the executor; see :meth:`Executable.session`."""
        layout = DecoderLayout.of(self.program)
        if cache not in CACHES:
            raise InputError(f"must be one of {', '.join(CACHES)}, not {cache!r}", where="session: cache")
        return CpuSession(self._assembled(cache), layout, slots=slots, capacity=capacity, cache=cache)

    def pipeline(self, *, slots: int = 1, capacity: int = 2048, cache: str = "float32") -> CpuPipeline:
        """Stages on the executor; see :meth:`Executable.pipeline`."""
        if cache not in CACHES:
            raise InputError(f"must be one of {', '.join(CACHES)}, not {cache!r}", where="session: cache")
        stage, lowered = self.stage()
        if cache not in self._stages:
            self._stages[cache] = assemble_step(stage.program, lowered, self._isa(), cache)
        return CpuPipeline(self._stages[cache], stage, slots=slots, capacity=capacity, cache=cache)

    def scheduled(
        self, schedule: DepthSchedule, *, slots: int = 1, capacity: int = 2048, cache: str = "float32"
    ) -> CpuScheduled:
        """Decoding at falling depth on the executor; see :meth:`Executable.scheduled`."""
        if cache not in CACHES:
            raise InputError(f"must be one of {', '.join(CACHES)}, not {cache!r}", where="session: cache")
        self.program.require_values()
        stack, isa = layers_of(self.program), self._isa()

        def assembled(depth: int) -> Assembled:
            if depth == len(stack.layers):
                return self._assembled(cache)
            program = truncated(self.program, stack, depth)
            return assemble_step(program, lower(program, isa, self.compute, packed=self.lowered.packed), isa, cache)

        layout, depths = DecoderLayout.of(self.program), Depths(schedule, len(stack.layers), slots)
        return CpuScheduled(assembled, layout, depths, slots=slots, capacity=capacity, cache=cache)

    def stage(self) -> tuple[Stage, Lowered]:
        """A decoder's repeated group of layers, on the weights that its step has packed.

        Raises:
            BackendError: there are no C++ kernels in this installation.
            ProgramError: the decoder repeats no group of layers, or its weights have been let go of.
        """
        isa = self._isa()
        if isinstance(self._stage, ProgramError):
            raise self._stage
        if self._stage is None:
            self._stage = lower_stage(self.program, self.lowered.packed, isa, self.compute)
        return self._stage

    def explain_stage(self) -> list[KernelUse]:
        """Which kernel runs for every node of a stage; errors as in :meth:`pipeline`."""
        self.pipeline(capacity=1)
        return list(self._stages["float32"].uses)

    def _assembled(self, cache: str) -> Assembled:
        if cache not in self._steps:
            self._steps[cache] = assemble_step(self.program, self.lowered, self._isa(), cache)
        return self._steps[cache]

    @staticmethod
    def _isa() -> str:
        isa = features().selected
        if isa is None:
            raise BackendError("needs the C++ kernels, which are not in this installation", where="session")
        return isa


def weights_in_use(program: Program, body: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The weights that PyTorch uses in a lowered program's ``body``."""
    used = {str(node.target) for node in body.graph.nodes if node.op == "get_attr"}
    return {name: value for name, value in program.tensors().items() if name in used}


class CpuBackend(Backend):
    """C++ kernels on this CPU.

    Args:
        compute: what float and weight-only linears (``linear_nbits``) compute in; :meth:`CpuExecutable.explain` names
            every rounding, and what it costs in quality should be measured. Sums are float32 always.

            - ``"float32"`` rounds nothing.
            - ``"bfloat16"`` rounds their weights and activations to bfloat16; those of weight-only linears only where
              that is faster (more than a few rows, and a CPU that multiplies bfloat16).
            - ``"int8"`` rounds the activations of weight-only linears to 8 bits, one scale for each row and group of
              columns. Float linears compute in float32.

            A model whose weights are bfloat16 computes in bfloat16 anyway. ``lowering_error()`` of the optimised model
            says what the choice costs on its example inputs.
        keep_weights: whether a program keeps its weights beside the packed ones. Without, each is let go of as soon as
            it is packed: the result runs and can be saved packed, but not be exported, saved as a program or optimised
            further. Weights that are mapped from files stay: they cost no memory.

    Raises:
        InputError: there is no such ``compute``.
    """

    name = "cpu"

    def __init__(self, *, compute: str = "float32", keep_weights: bool = True) -> None:
        if compute not in COMPUTE:
            raise InputError(f"must be one of {', '.join(COMPUTE)}, not {compute!r}", where="CpuBackend: compute")
        self.compute, self.keep_weights = compute, keep_weights

    def lower(self, program: Program) -> CpuExecutable:
        """Pack the weights and choose the kernels.

        Raises:
            InputError: ``GRAPHWRIGHT_CPU_ISA`` names no instruction set.
            BackendError: it names one that cannot be used here, or the program's weights are not on the CPU.
            ProgramError: weights have been let go of.
        """
        program.require_values()
        if any(value.device.type != "cpu" for value in program.tensors().values()):
            raise BackendError("has weights that are not on the CPU", where="program", hint="move it: model.cpu()")
        isa = features().selected
        stage: tuple[Stage, Lowered] | ProgramError | None = None
        if not self.keep_weights and isa is not None and DecoderLayout.find(program) is not None:
            try:  # now, as it cannot be lowered without weights; why there is none is told to whoever asks for it
                stage = lower_stage(program, {}, isa, self.compute, keep_weights=False)
            except ProgramError as error:
                stage = error
        packed = stage[1].packed if isinstance(stage, tuple) else {}
        lowered = lower(program, isa, self.compute, keep_weights=self.keep_weights, packed=packed)
        return CpuExecutable(program, lowered, self.compute, stage)
