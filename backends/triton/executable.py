"""The Triton backend and what it makes of a program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from graphwright.backends.executable import Backend, Executable, KernelUse, need_device
from graphwright.backends.session import Session
from graphwright.backends.triton.memory import room_for
from graphwright.backends.triton.rest import compiler_of
from graphwright.backends.triton.status import need_gpu, need_triton
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import BackendError, InputError
from graphwright.ir.program import Program

if TYPE_CHECKING:
    from graphwright.backends.triton.lowering import Lowered


class TritonExecutable(Executable):
    """A program on a GPU. Gradients flow where they are wanted: through kernels that have them, else the reference.

    To train weights, have the model on the GPU before it is optimised: those that are copied there do not train.
    """

    def __init__(self, program: Program, lowered: Lowered, device: torch.device) -> None:
        self.program, self.lowered, self.device = program, lowered, device

    def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run on flat inputs, which lie on the device, and give flat outputs there.

        Raises:
            InputError: an input lies elsewhere.
        """
        need_device(self.program, inputs, self.device)
        results: tuple[Any, ...] = self.lowered.body(*inputs)
        return results

    def explain(self) -> list[KernelUse]:
        """The kernel of every node, what its first run launched, and why it is torch's where there could be ours.

        Before the first run, what one of the sizes that the program was traced with would launch.
        """
        self.lowered.plan(self.device)
        return [use.shown() for use in self.lowered.uses]

    def session(
        self, *, slots: int = 1, capacity: int = 2048, cache: str = "float32", capture: bool | None = None
    ) -> Session:
        """Decoding on caches that stay where they are; see :meth:`Executable.session`.

        Args:
            slots: sequences held at a time.
            capacity: tokens that each can hold.
            cache: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"``.
            capture: record short steps as CUDA graphs, one for each shape; by default on a GPU.

        Raises:
            BackendError: memory does not suffice; it says how much is needed.
        """
        from graphwright.backends.triton.session import STORED, TritonSession

        layout = DecoderLayout.of(self.program)
        if cache not in STORED:
            raise InputError(f"must be one of {', '.join(STORED)}, not {cache!r}", where="session: cache")
        wanted = self.device.type == "cuda" if capture is None else capture
        return TritonSession(self, layout, slots=slots, capacity=capacity, cache=cache, capture=wanted)


class TritonBackend(Backend):
    """Triton kernels on a GPU.

    Args:
        device: such as ``"cuda"`` or ``"cuda:1"``; ``"cpu"`` only where triton's interpreter runs the kernels, which is
            for tests.
        compile_rest: what no kernel takes runs through ``torch.compile``: ``True`` for its default backend, or the name
            of another one of its backends. Compiling takes its time in the first runs, and again for other sizes.

    Raises:
        InputError: there is no such device, or torch.compile has no such backend.
    """

    name = "cuda"

    def __init__(self, device: str | torch.device = "cuda", *, compile_rest: bool | str = False) -> None:
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise InputError(f"there is no device {device!r}", where="TritonBackend", hint="use 'cuda'") from error
        self.compiler = compiler_of(compile_rest)

    def check(self) -> None:
        """Check triton and the GPU.

        Raises:
            BackendError: triton is not installed, or interprets; there is no GPU, or it is too old.
        """
        status = need_triton()
        if self.device.type == "cuda":
            need_gpu(self.device)
        if status.interpreted != (self.device.type == "cpu") or self.device.type not in ("cpu", "cuda"):
            mode = "interprets" if status.interpreted else "compiles"
            raise BackendError(
                f"triton {mode} kernels in this process, they do not run on {self.device}",
                where="TritonBackend",
                hint="use device='cuda' without TRITON_INTERPRET; target='cpu' has kernels for the CPU",
            )

    def lower(self, program: Program) -> TritonExecutable:
        """Choose kernels, and move packed weights to the GPU; the program keeps its own.

        Raises:
            BackendError: as of :meth:`check`; the weights do not fit; the file with what tuning has found is damaged.
        """
        self.check()
        from graphwright.backends.triton.lowering import lower
        from graphwright.backends.triton.tuning import load_choices

        load_choices(self.device)
        with room_for(program, self.device):
            return TritonExecutable(program, lower(program, self.device, self.compiler), self.device)
        raise AssertionError("room_for has raised")
