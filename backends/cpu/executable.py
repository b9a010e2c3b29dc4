"""Lowering a program to the C++ kernels; what has none runs in PyTorch, and ``explain()`` says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from graphwright.backends.cpu.features import features
from graphwright.backends.cpu.linears import ByteLinear
from graphwright.backends.cpu.packing import pack_int8, pack_nbits
from graphwright.backends.executable import Backend, Executable, KernelUse
from graphwright.ir import ops
from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import BackendError, InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of

COMPUTE = ("float32", "int8")

# The kernels' sums are int32.
_MOST_COLUMNS = 32768


class CpuExecutable(Executable):
    """A program whose quantised linears run on the C++ kernels. Inference only: it gives no gradients."""

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
            if isinstance(found, ByteLinear):
                name = f"kernel_{len(self._uses)}"
                parts[name] = found
                made[node] = lowered.call_module(name, (made[arguments_of(node)["x"]],))
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

    def _kernel(self, program: Program, node: fx.Node) -> ByteLinear | str | None:
        """The kernel of a node, why it has none, or ``None`` when no kernel of ours computes such operators."""
        make = _LINEARS.get(op_name(node))
        if make is None:
            return None
        if self._isa is None:
            return "the C++ kernels are not in this installation"
        arguments = arguments_of(node)
        stored = [value for name, value in arguments.items() if name != "x" and isinstance(value, fx.Node)]
        if any(value.op != "get_attr" for value in stored):
            return "its weights are computed, not stored"
        if arguments["x"].meta["val"].shape[-1] > _MOST_COLUMNS:
            return f"it has more than {_MOST_COLUMNS} input features"
        if arguments["x"].meta["val"].dtype == torch.float64:
            return "the kernels compute in float32"
        tensors = {
            name: program.tensor(value) if isinstance(value, fx.Node) and name != "x" else value
            for name, value in arguments.items()
        }
        columns = int(arguments["x"].meta["val"].shape[-1])
        return make(self._isa, self._compute, columns, tensors)

    def _note(self, node: fx.Node, found: ByteLinear | str | None) -> None:
        name, path, op = node.name, path_of(node), op_name(node)
        if isinstance(found, ByteLinear):
            kernel = f"{op.rpartition('.')[2]} {found.isa}, activations rounded to int8 ({found.rounding})"
            self._uses.append(KernelUse(name, path, op, kernel))
            return
        kernel = "reference" if ops.is_dialect(node.target) else "torch"
        self._uses.append(KernelUse(name, path, op, kernel, found or ""))


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


def _nbits(isa: str, compute: str, columns: int, tensors: dict[str, Any]) -> ByteLinear | str:
    if compute != "int8":
        return "float32 computation has no kernel yet; compute='int8' has"
    packed = pack_nbits(tensors["qweight"], tensors["scales"], tensors["zero_points"], tensors["bits"], columns)
    return ByteLinear(packed, isa, "symmetric", tensors["bias"])


def _dynamic(isa: str, compute: str, columns: int, tensors: dict[str, Any]) -> ByteLinear | str:
    del compute, columns
    if tensors["activation"] != "per_token":
        return "ranges of the whole tensor have no kernel; per token they have"
    return ByteLinear(pack_int8(tensors["qweight"], tensors["scales"]), isa, "shifted", tensors["bias"])


def _static(isa: str, compute: str, columns: int, tensors: dict[str, Any]) -> ByteLinear | str:
    del compute, columns
    packed = pack_int8(tensors["qweight"], tensors["scales"])
    grid = tensors["input_scales"], tensors["input_zero_point"]
    return ByteLinear(packed, isa, "fixed", tensors["bias"], *grid)


_LINEARS: dict[str, Callable[[str, str, int, dict[str, Any]], ByteLinear | str]] = {
    "graphwright.linear_nbits": _nbits,
    "graphwright.linear_int8_dynamic": _dynamic,
    "graphwright.linear_int8_static": _static,
}
