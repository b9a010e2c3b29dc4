"""Lowering a program to the Triton kernels; what has none runs in torch on the same GPU, and ``explain()`` says so."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from graphwright.backends.epilogues import epilogue_of, sum_before
from graphwright.backends.executable import KernelUse
from graphwright.backends.triton.launching import recorded
from graphwright.backends.triton.nodes import LOWERINGS, LinearKernel, NodeKernel, Site
from graphwright.backends.triton.nodes.epilogues import branch_of
from graphwright.backends.triton.nodes.rows import Norm
from graphwright.backends.triton.rest import compile_rest
from graphwright.ir import ops
from graphwright.ir.arguments import arguments_of, schema_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of


@dataclass(frozen=True)
class Call:
    """A kernel and what it is called with.

    Attributes:
        kernel: the module.
        inputs: nodes of the program, numbers or ``None``.
        gives: the nodes whose values it gives as a tuple; empty where it gives one value.
    """

    kernel: NodeKernel
    inputs: tuple[Any, ...]
    gives: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Use:
    """What runs for a node.

    Attributes:
        node: of the program.
        kernel: whose name and launch are shown, or ``None`` where torch runs.
        reason: why torch runs, where a kernel could be.
        role: empty for the kernel's own node, else what it does of this one; without a kernel, what runs it instead of
            torch's own kernels.
    """

    node: fx.Node
    kernel: NodeKernel | None
    reason: str = ""
    role: str = ""

    def shown(self) -> KernelUse:
        """As ``explain()`` gives it; launch shapes are those of the first run."""
        name, path, op = self.node.name, path_of(self.node), op_name(self.node)
        if self.kernel is None and self.role:
            return KernelUse(name, path, op, self.role, self.reason)
        if self.kernel is None:
            return KernelUse(name, path, op, "reference" if ops.is_dialect(self.node.target) else "torch", self.reason)
        if self.role:
            return KernelUse(name, path, op, f"{self.role} of {self.kernel.label}")
        if self.kernel.idle:
            reason = "its kernel launched nothing: there were no rows, or a gradient was wanted that PyTorch gives"
            return KernelUse(name, path, op, "reference" if ops.is_dialect(self.node.target) else "torch", reason)
        planned = f" (planned: {self.kernel.planned})" if self.kernel.planned else ""
        launched = f": {self.kernel.launched}" if self.kernel.launched else planned
        return KernelUse(name, path, op, f"{self.kernel.runner} {self.kernel.label}{launched}")


@dataclass(frozen=True)
class Lowered:
    """What runs a program.

    Attributes:
        body: the graph with kernels in it, on the device.
        uses: what runs for each node.
        calls: of the kernels.
    """

    body: fx.GraphModule
    uses: tuple[Use, ...]
    calls: tuple[Call, ...]

    def plan(self, device: torch.device) -> None:
        """Note what kernels that have not run would launch for the sizes that the program was traced with."""
        for call in self.calls:
            kernel = call.kernel
            if kernel.launched or kernel.planned or kernel.runner != "triton":
                continue
            given = fx.node.map_arg(call.inputs, _blank)
            with torch.no_grad(), recorded(dry=True, device=device) as launches:
                kernel.forward(*given)
            kernel.planned = "; ".join(map(str, launches))


def _blank(node: fx.Node) -> Any:
    """A value of a node, of the sizes that were traced; tensors without numbers."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value
    sizes = [size if isinstance(size, int) else size.node.hint or 1 for size in value.shape]
    return torch.empty(sizes, dtype=value.dtype, device="meta")


def lower(program: Program, device: torch.device, compiler: str | None = None) -> Lowered:
    """Choose the kernels of a program, and move its weights to a device.

    Args:
        program: what to run; stays as it is.
        device: a GPU, or the CPU where kernels are interpreted.
        compiler: backend of torch.compile for what has no kernel, ``None`` to run it as it is.
    """
    calls: dict[fx.Node, Call] = {}
    absorbed: set[fx.Node] = set()
    uses: dict[fx.Node, Use] = {}
    for node in program.nodes:
        if node.op != "call_function" or node in absorbed:
            continue
        make = LOWERINGS.get(op_name(node))
        found = make(Site(program, node, device)) if make is not None else ""
        if isinstance(found, str):
            uses[node] = Use(node, None, found)
            continue
        uses[node] = Use(node, found)
        given = arguments_of(node)
        inputs = tuple(given[name] for name in found.inputs)
        if isinstance(found, Norm) and (total := sum_before(program, node, absorbed)) is not None:
            found.adds, terms = True, arguments_of(total)
            calls[node] = Call(found, (terms["self"], terms["other"], *inputs[1:]), (node, total))
            absorbed.add(total)
            uses[total] = Use(total, found, role="part")
        elif isinstance(found, LinearKernel):
            branch = branch_of(program, node, absorbed)
            sides: tuple[Any, ...] = (None, None)
            if branch is not None:
                sides, found.branch_scale = (branch.down, branch.up), branch.scale
            epilogue = epilogue_of(program, node, absorbed, branch.absorbed if branch is not None else ())
            found.activation = epilogue.activation
            calls[epilogue.last] = Call(found, (*inputs, *sides, epilogue.factor, epilogue.residual))
            absorbed.update((node, *epilogue.absorbed))
            uses.update((each, Use(each, found, role="epilogue")) for each in epilogue.absorbed)
            if branch is not None:
                uses.update((each, Use(each, found, role="low-rank branch")) for each in branch.absorbed)
        else:
            calls[node] = Call(found, inputs)
    body, made = _assemble(program, calls, absorbed - calls.keys(), device)
    if compiler is not None:
        body, compiled = compile_rest(body, compiler, dynamic=bool(program.dims))
        for node, use in uses.items():
            if use.kernel is None and made[node].name in compiled:
                uses[node] = replace(use, role=f"torch.compile {compiler}")
    return Lowered(body, tuple(uses[node] for node in program.nodes if node in uses), tuple(calls.values()))


def _assemble(
    program: Program, calls: dict[fx.Node, Call], absorbed: set[fx.Node], device: torch.device
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """The graph with kernels in it, and what became of the program's nodes.

    Weights that only kernels read, in a form of their own, are left out.
    """
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    parts: dict[str, nn.Module | torch.Tensor] = {}
    for node in program.nodes:
        call = calls.get(node)
        if call is not None:
            name = f"kernel_{len(parts)}"
            parts[name] = call.kernel
            made[node] = graph.call_module(name, fx.node.map_arg(call.inputs, made.__getitem__))
            results = made[node]
            for place, each in enumerate(call.gives):
                made[each] = graph.call_function(operator.getitem, (results, place))
        elif node not in absorbed:
            made[node] = graph.node_copy(node, made.__getitem__)
            _place(made[node], device)
    tensors = program.tensors()
    moved: dict[int, torch.Tensor] = {}
    for copy in list(graph.nodes):
        if copy.op == "get_attr" and copy.users:
            tensor = tensors[str(copy.target)]
            if id(tensor) not in moved:  # tied weights stay one
                moved[id(tensor)] = _moved(tensor, device)
            parts[str(copy.target)] = moved[id(tensor)]
        elif copy.op == "get_attr":
            graph.erase_node(copy)
    return fx.GraphModule(parts, graph, class_name=program.title), made


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device.type == device.type:
        return tensor
    # A copy does not train: its gradients would reach nobody.
    return tensor.detach().to(device)


def _place(node: fx.Node, device: torch.device) -> None:
    """Make what a node creates on the device, where the program says another one or none."""
    schema = schema_of(node)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    if node.op != "call_function" or "device" not in names:
        return
    given = arguments_of(node)
    creates = not any(isinstance(value.meta.get("val"), torch.Tensor) for value in node.all_input_nodes)
    if given["device"] is None and not creates:
        return  # it takes its operand's
    at = names.index("device")
    if at < len(node.args):
        node.args = (*node.args[:at], device, *node.args[at + 1 :])
    else:
        node.kwargs = {**node.kwargs, "device": device}
