"""From torch.export's result to a Program: flat inputs, tied weights once, plain ATen, provenance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphwright.frontends.torch import inplace, regions
from graphwright.frontends.torch.dimensions import conditions, dimensions
from graphwright.frontends.torch.dynamic import Roles
from graphwright.frontends.torch.examples import Leaf
from graphwright.frontends.torch.export import decompose
from graphwright.ir import provenance
from graphwright.ir.arguments import canonicalize
from graphwright.ir.errors import ProgramError, TraceError
from graphwright.ir.names import target_name
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature
from graphwright.ir.types import VAL, SymbolTable

_ATEN = torch.ops.aten


def to_program(
    exported: torch.export.ExportedProgram,
    model: nn.Module,
    leaves: Sequence[Leaf],
    roles: Roles,
    parameters: tuple[str, ...],
) -> Program:
    """Build the Program of an exported model.

    Args:
        exported: result of ``torch.export.export``.
        model: the model it came from; its own tensors become the weights, so nothing is copied.
        leaves: the example inputs as traced.
        roles: names of the dimensions that should vary.
        parameters: names of the forward's parameters in order.

    Raises:
        TraceError: the graph holds something a Program cannot.
    """
    dims, types = dimensions(exported, leaves, roles)
    symbols = SymbolTable(dims, conditions(exported, leaves, types))
    module = _plain_module(exported, model)
    tensors, aliases = _weights(module, model)
    graph, inputs, constants = _flat_graph(module, tensors, aliases, leaves)
    signature = Signature(
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        inputs=inputs,
        constants=constants,
        parameters=parameters,
    )
    program = Program(
        fx.GraphModule(nn.Module(), fx.Graph()), signature, symbols, title=type(model).__name__, aliases=aliases
    )
    for name, tensor in tensors.items():
        program.set_tensor(name, tensor)
    for node, index in zip((node for node in graph.nodes if node.op == "placeholder"), types, strict=True):
        node.meta[VAL] = symbols.fake(types[index])
    program.body.graph = graph
    program.infer_types()
    program.drop_unused_tensors()
    program.body.recompile()
    return program


def _plain_module(exported: torch.export.ExportedProgram, model: nn.Module) -> fx.GraphModule:
    """The exported module as one flat graph that writes nothing in place."""
    signature = exported.graph_signature
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    trainable = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    user_inputs = set(signature.user_inputs)

    def differentiable(node: fx.Node) -> bool:
        return node.name in user_inputs or lifted.get(node.name) in trainable

    flat = regions.inline(exported.graph_module, differentiable)
    flat = inplace.make_functional(exported.graph_module.graph, lifted, _place) and flat
    if not flat:
        exported.graph_module.recompile()
        exported = decompose(exported)
        changed = {**exported.graph_signature.buffers_to_mutate, **exported.graph_signature.user_inputs_to_mutate}
        if changed:
            raise inplace.write_refused(next(iter(changed.values())), "the model")
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def _weights(module: fx.GraphModule, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Weights by canonical name, and the further names of tied ones: the same tensor, or another on the same memory."""
    original: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    original.update(model.named_buffers(remove_duplicate=False))
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[Any, str] = {}
    for name, tensor in original.items():
        canonical = first_name.setdefault(_memory(tensor), name)
        if canonical == name:
            tensors[name] = tensor
        else:
            aliases[name] = canonical
    for node in module.graph.nodes:
        name = str(node.target)
        if node.op != "get_attr" or name in original or name in tensors:
            continue
        value: Any = module
        for part in name.split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach() if not isinstance(value, nn.Parameter) else value
    return tensors, aliases


def _memory(tensor: torch.Tensor) -> Any:
    if tensor.numel() == 0 or tensor.layout != torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), isinstance(tensor, nn.Parameter)


def _flat_graph(
    module: fx.GraphModule, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str], leaves: Sequence[Leaf]
) -> tuple[fx.Graph, tuple[str | None, ...], dict[int, Any]]:
    graph = fx.Graph()
    mapping: dict[fx.Node, Any] = {}
    attributes: dict[str, fx.Node] = {}
    inputs: list[str | None] = []
    constants: dict[int, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            leaf = leaves[len(inputs)]
            if isinstance(leaf.value, torch.Tensor):
                mapping[node] = graph.create_node("placeholder", node.target, (), {}, node.name)
                inputs.append(str(node.target))
            else:
                constants[len(inputs)] = leaf.value
                inputs.append(None)
        elif node.op == "get_attr":
            name = aliases.get(str(node.target), str(node.target))
            if name not in tensors or not node.users:
                continue
            if name not in attributes:
                attributes[name] = graph.create_node("get_attr", name, (), {}, node.name)
            mapping[node] = attributes[name]
        elif node.op == "call_function":
            mapping[node] = _copy_call(graph, node, mapping)
        elif node.op == "output":
            flat = pytree.tree_leaves(node.args[0])
            graph.output(tuple(mapping[item] if isinstance(item, fx.Node) else item for item in flat))
        elif str(node.target) != "_guards_fn":
            raise TraceError(f"the traced graph calls the module {node.target!r}, which has no place in a Program")
    return graph, tuple(inputs), constants


def _copy_call(graph: fx.Graph, node: fx.Node, mapping: Mapping[fx.Node, Any]) -> fx.Node:
    if node.target is _ATEN.lift_fresh_copy.default:
        return mapping[node.args[0]]  # type: ignore[index,no-any-return]  # nothing writes into the constant any more
    if node.target is _ATEN.detach.default and mapping[node.args[0]].op == "get_attr":  # type: ignore[index]
        if not node.args[0].meta["val"].requires_grad:  # type: ignore[union-attr]
            return mapping[node.args[0]]  # type: ignore[index,no-any-return]
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    if target is _ATEN._to_copy.default and set(kwargs) == {"dtype"}:
        target, args, kwargs = _ATEN.to.dtype, (*args, kwargs["dtype"]), {}
    name = getattr(target, "__name__", str(target))
    try:
        target_name(target)
    except ProgramError as error:
        raise TraceError(
            f"the operator {name} has no place in a Program (control flow and side effects are not supported)",
            where=_place(node),
            hint="rewrite this part of the model without branches that depend on values",
        ) from error
    copied = graph.create_node(
        "call_function",
        target,
        fx.node.map_arg(args, mapping.__getitem__),
        fx.node.map_arg(kwargs, mapping.__getitem__),
        node.name,
    )
    copied.meta[provenance.PATH] = _path(node)
    copied.meta[provenance.SOURCE] = _source(node)
    canonicalize(copied)
    return copied


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    if path.startswith("_empty_nn_module_stack"):  # torch's mark for what its own passes put in
        return ""
    return re.sub(r"^L\['self'\]\.?", "", path)


def _source(node: fx.Node) -> str:
    """The user's line, or torch's own where a module of torch stands alone."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [item for item in found if "/torch/" not in item[0] and not item[0].startswith("<")]
    file, line = (own or found or [("", "")])[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line}" if file else ""


def _place(node: fx.Node) -> str:
    path, source = _path(node), _source(node)
    return f"module {path!r}, {source}" if path else source or "the model"
