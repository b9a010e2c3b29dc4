"""Lowering a program to the C++ kernels; what has none runs in PyTorch, and ``explain()`` says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphwright.backends.cpu.epilogues import epilogue_of
from graphwright.backends.cpu.features import features
from graphwright.backends.cpu.kernels import LOWERINGS, Kernel, Site
from graphwright.backends.cpu.kernels.linear import Linear
from graphwright.backends.executable import Backend, Executable, KernelUse
from graphwright.ir import ops
from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import BackendError, InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of

COMPUTE = ("float32", "int8")


@dataclass(frozen=True)
class _Call:
    kernel: Kernel
    inputs: tuple[Any, ...]


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
        calls, absorbed = self._calls(program)
        lowered = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        parts: dict[str, nn.Module | torch.Tensor] = {}
        for node in program.nodes:
            call = calls.get(node)
            if call is not None:
                name = f"kernel_{len(parts)}"
                parts[name] = call.kernel
                made[node] = lowered.call_module(name, fx.node.map_arg(call.inputs, made.__getitem__))
            elif node not in absorbed:
                made[node] = lowered.node_copy(node, made.__getitem__)
        tensors = program.tensors()
        for copy in list(lowered.nodes):
            if copy.op == "get_attr" and copy.users:
                parts[str(copy.target)] = tensors[str(copy.target)]
            elif copy.op == "get_attr":  # it has been packed
                lowered.erase_node(copy)
        return fx.GraphModule(parts, lowered, class_name=program.title)

    def _calls(self, program: Program) -> tuple[dict[fx.Node, _Call], set[fx.Node]]:
        """Kernels by the node whose value they give, and the nodes that other kernels have taken in."""
        calls: dict[fx.Node, _Call] = {}
        absorbed: set[fx.Node] = set()
        uses: dict[fx.Node, KernelUse] = {}
        for node in program.nodes:
            if node.op != "call_function" or node in absorbed:
                continue
            found = self._kernel(program, node)
            uses[node] = _use(node, found)
            if not isinstance(found, Kernel):
                continue
            given = arguments_of(node)
            inputs = tuple(given[name] for name in found.inputs)
            if not isinstance(found, Linear):
                calls[node] = _Call(found, inputs)
                continue
            epilogue = epilogue_of(program, node, absorbed)
            found.activation = epilogue.activation
            if epilogue.factor is not None or epilogue.residual is not None:
                inputs = (*inputs, epilogue.factor, epilogue.residual)
            calls[epilogue.last] = _Call(found, inputs)
            absorbed.update((node, *epilogue.absorbed))
            for each in epilogue.absorbed:
                uses[each] = KernelUse(each.name, path_of(each), op_name(each), f"in {node.name}'s {found.label}")
        self._uses = [uses[node] for node in program.nodes if node in uses]
        return calls, absorbed

    def _kernel(self, program: Program, node: fx.Node) -> Kernel | str | None:
        """The kernel of a node, why it has none, or ``None`` when no kernel of ours computes such operators."""
        lower = LOWERINGS.get(op_name(node))
        if lower is None:
            return None
        if self._isa is None:
            return "the C++ kernels are not in this installation"
        return lower(Site(program, node, self._isa, self._compute))


def _use(node: fx.Node, found: Kernel | str | None) -> KernelUse:
    name, path, op = node.name, path_of(node), op_name(node)
    if isinstance(found, Kernel):
        return KernelUse(name, path, op, found.label)
    kernel = "reference" if ops.is_dialect(node.target) else "torch"
    return KernelUse(name, path, op, kernel, found or "")


class CpuBackend(Backend):
    """C++ kernels on this CPU.

    Args:
        compute: what weight-only linears (``linear_nbits``) compute in. ``"float32"`` is exact and has no kernel yet:
            PyTorch runs them. ``"int8"`` rounds their activations to 8 bits, one scale for each row and group of
            columns: fast, with an error that :meth:`CpuExecutable.explain` names and that you should measure.

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
