"""Lowering a program to the C++ kernels; what has none runs in PyTorch, and ``explain()`` says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from graphwright.backends.cpu.features import features
from graphwright.backends.cpu.kernels import LOWERINGS, Kernel, Site
from graphwright.backends.executable import Backend, Executable, KernelUse
from graphwright.ir import ops
from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import BackendError, InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of

COMPUTE = ("float32", "bfloat16", "int8")


class CpuExecutable(Executable):
    """A program that runs on the C++ kernels. Inference only: it gives no gradients."""

    def __init__(self, program: Program, isa: str | None, compute: str) -> None:
        self._uses: list[KernelUse] = []
        self._isa, self._compute = isa, compute
        self._body = self._lower(program)

    def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run on flat inputs; gives flat outputs."""
        with torch.no_grad():
            results: tuple[Any, ...] = self._body(*inputs)
        return results

    def explain(self) -> list[KernelUse]:
        """The kernel of every node, and why it is PyTorch's where there would be one of ours."""
        return list(self._uses)

    def _lower(self, program: Program) -> fx.GraphModule:
        lowered = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        parts: dict[str, nn.Module | torch.Tensor] = {}
        for node in program.nodes:
            found = self._kernel(program, node) if node.op == "call_function" else None
            if isinstance(found, Kernel):
                name, given = f"kernel_{len(self._uses)}", arguments_of(node)
                parts[name] = found
                made[node] = lowered.call_module(
                    name, tuple(fx.node.map_arg(given[each], made.__getitem__) for each in found.inputs)
                )
            else:
                made[node] = lowered.node_copy(node, made.__getitem__)
            if node.op == "call_function":
                self._note(node, found)
        tensors = program.tensors()
        for copy in list(lowered.nodes):
            if copy.op == "get_attr" and copy.users:
                parts[str(copy.target)] = tensors[str(copy.target)]
            elif copy.op == "get_attr":  # it has been packed
                lowered.erase_node(copy)
        return fx.GraphModule(parts, lowered, class_name=program.title)

    def _kernel(self, program: Program, node: fx.Node) -> Kernel | str | None:
        """The kernel of a node, why it has none, or ``None`` when no kernel of ours computes such operators."""
        lower = LOWERINGS.get(op_name(node))
        if lower is None:
            return None
        if self._isa is None:
            return "the C++ kernels are not in this installation"
        return lower(Site(program, node, self._isa, self._compute))

    def _note(self, node: fx.Node, found: Kernel | str | None) -> None:
        name, path, op = node.name, path_of(node), op_name(node)
        if isinstance(found, Kernel):
            self._uses.append(KernelUse(name, path, op, found.label))
            return
        kernel = "reference" if ops.is_dialect(node.target) else "torch"
        self._uses.append(KernelUse(name, path, op, kernel, found or ""))


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

            A model whose weights are bfloat16 computes in bfloat16 anyway.

    Raises:
        InputError: there is no such ``compute``.
    """

    name = "cpu"

    def __init__(self, *, compute: str = "float32") -> None:
        if compute not in COMPUTE:
            raise InputError(f"must be one of {', '.join(COMPUTE)}, not {compute!r}", where="CpuBackend: compute")
        self.compute = compute

    def lower(self, program: Program) -> CpuExecutable:
        """Pack the weights and choose the kernels.

        Raises:
            InputError: ``GRAPHWRIGHT_CPU_ISA`` names no instruction set.
            BackendError: it names one that cannot be used here, or the program's weights are not on the CPU.
        """
        if any(value.device.type != "cpu" for value in program.tensors().values()):
            raise BackendError("has weights that are not on the CPU", where="program", hint="move it: model.cpu()")
        return CpuExecutable(program, features().selected, self.compute)
