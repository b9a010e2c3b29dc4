"""From torch.export's result to a Program: flat inputs, tied weights once, plain ATen, provenance."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from graphwright.frontends.torch.dynamic import Leaf, Roles
from graphwright.ir import provenance
from graphwright.ir.arguments import canonicalize
from graphwright.ir.errors import TraceError
from graphwright.ir.names import target_name
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature
from graphwright.ir.types import VAL, Dim, SymbolTable, TensorType

# wrap_with_set_grad_enabled(mode, body, *operands), wrap_with_autocast(device, dtype, enabled, cache, body, *operands)
_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def to_program(
    exported: torch.export.ExportedProgram,
    model: nn.Module,
    leaves: list[Leaf],
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
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _inline_wrappers(module)
    tensors, aliases = _weights(module, model)
    graph, inputs, constants = _flat_graph(module, tensors, aliases, leaves)
    dims, types = _dimensions(exported, module, leaves, roles)
    signature = Signature(
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        inputs=inputs,
        constants=constants,
        parameters=parameters,
    )
    symbols = SymbolTable(dims)
    program = Program(
        fx.GraphModule(nn.Module(), fx.Graph()), signature, symbols, title=type(model).__name__, aliases=aliases
    )
    for name, tensor in tensors.items():
        program.set_tensor(name, tensor)
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta[VAL] = symbols.fake(types[str(node.target)])
    program.body.graph = graph
    program.infer_types()
    program.drop_unused_tensors()
    program.body.recompile()
    return program


def _inline_wrappers(module: fx.GraphModule) -> None:
    """Put the bodies of grad-mode and autocast regions in line; the operators inside already have their dtypes."""
    graph = module.graph
    for node in list(graph.nodes):
        skipped = _WRAPPERS.get(getattr(node.target, "__name__", ""))
        if node.op != "call_function" or skipped is None:
            continue
        body = getattr(module, str(node.args[skipped].target))
        _inline_wrappers(body)
        with graph.inserting_before(node):
            operands = iter(node.args[skipped + 1 :])
            mapping: dict[fx.Node, Any] = {}
            for inner in body.graph.nodes:
                if inner.op == "placeholder":
                    mapping[inner] = next(operands)
                elif inner.op == "output":
                    results = fx.node.map_arg(inner.args[0], mapping.__getitem__)
                else:
                    mapping[inner] = graph.node_copy(inner, mapping.__getitem__)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)


def _weights(module: fx.GraphModule, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Weights by canonical name, and the further names of tied ones."""
    original: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    original.update(model.named_buffers(remove_duplicate=False))
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, tensor in original.items():
        canonical = first_name.setdefault(id(tensor), name)
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


def _flat_graph(
    module: fx.GraphModule, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str], leaves: list[Leaf]
) -> tuple[fx.Graph, tuple[str | None, ...], dict[int, Any]]:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
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


def _copy_call(graph: fx.Graph, node: fx.Node, mapping: Mapping[fx.Node, fx.Node]) -> fx.Node:
    path, source = _path(node), _source(node)
    name = getattr(node.target, "__name__", str(node.target))
    try:
        target_name(node.target)
    except Exception as error:
        raise TraceError(
            f"the operator {name} has no place in a Program (control flow and side effects are not supported)",
            where=f"{path or 'the model'}, {source}",
            hint="rewrite this part of the model without data-dependent control flow",
        ) from error
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise TraceError(
            f"the model writes into a tensor in place ({name})",
            where=f"{path or 'the model'}, {source}",
            hint="put the model into eval mode, or compute a new tensor instead",
        )
    copied = graph.create_node(
        "call_function",
        node.target,
        fx.node.map_arg(node.args, mapping.__getitem__),
        fx.node.map_arg(node.kwargs, mapping.__getitem__),
        node.name,
    )
    copied.meta[provenance.PATH] = path
    copied.meta[provenance.SOURCE] = source
    canonicalize(copied)
    return copied


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return re.sub(r"^L\['self'\]\.?", "", path)


def _source(node: fx.Node) -> str:
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{found[-1][0].rsplit('/', 1)[-1]}:{found[-1][1]}" if found else ""


def _dimensions(
    exported: torch.export.ExportedProgram, module: fx.GraphModule, leaves: list[Leaf], roles: Roles
) -> tuple[dict[str, Dim], dict[str, TensorType]]:
    """The dimensions that stayed symbolic under their names, and the type of every input."""
    dims: dict[str, Dim] = {}
    types: dict[str, TensorType] = {}
    by_symbol: dict[str, str] = {}
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for leaf, node in zip(leaves, placeholders, strict=True):
        if not isinstance(leaf.value, torch.Tensor):
            continue
        shape: list[int | str] = []
        for axis, size in enumerate(node.meta["val"].shape):
            expression = size.node.expr if isinstance(size, torch.SymInt) else None
            if expression is None or not expression.is_symbol:
                shape.append(int(leaf.value.shape[axis]))
                continue
            wanted = roles.get(leaf.index, {}).get(axis, f"{leaf.name}_{axis}")
            name = by_symbol.setdefault(str(expression), wanted)
            limits = exported.range_constraints.get(expression)
            # A lower bound of 2 is torch's own (it never traces sizes 0 and 1 dynamically), not the model's.
            low = int(limits.lower) if limits is not None and int(limits.lower) > 2 else 1
            high = None if limits is None or limits.upper >= int_oo or int(limits.upper) >= 2**31 else int(limits.upper)
            dims.setdefault(name, Dim(name, low, high, int(leaf.value.shape[axis])))
            shape.append(name)
        types[str(node.target)] = TensorType(leaf.value.dtype, tuple(shape))
    return dims, types
