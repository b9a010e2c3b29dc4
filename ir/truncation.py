"""A decoding step of fewer layers, on the same weights."""

from __future__ import annotations

from torch import fx, nn
from torch.utils import _pytree as pytree

from graphwright.ir.copying import copy_graph
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import ProgramError
from graphwright.ir.names import resolve_target
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature
from graphwright.ir.stacks import Stack, find_stacks


def layers_of(program: Program) -> Stack:
    """The repeated layers of a decoding step.

    Raises:
        ProgramError: the program is no decoding step, or repeats no layer.
    """
    DecoderLayout.of(program)
    stacks = find_stacks(program)
    if not stacks:
        raise ProgramError("has no repeated layers", where=f"program {program.title!r}")
    return stacks[0]


def truncated(program: Program, stack: Stack, depth: int) -> Program:
    """The first layers of a decoding step with what follows the last.

    Args:
        program: a decoding step, before or after ``HoistRowSelection``; it stays as it is.
        stack: its layers, see :func:`layers_of`.
        depth: how many run; at least one.

    Returns:
        a program on the same weights, whose inputs and outputs are those of the step without the caches of the layers
        that do not run; they keep their names.
    """
    graph = copy_graph(program.graph)
    nodes = {node.name: node for node in graph.nodes}
    last, early = (nodes[stack.layers[at].exit.name] for at in (-1, depth - 1))
    skipped = {node.name for layer in stack.layers[depth:] for node in (*layer.nodes, *layer.aside)}
    if program.type_of(stack.layers[-1].exit) != program.type_of(stack.layers[depth - 1].exit):
        # The last layer selects the wanted rows before its end.
        rows = next(node for node in graph.nodes if node.op == "placeholder" and node.target == "rows")
        with graph.inserting_before(last):
            early = graph.call_function(resolve_target("graphwright.select_rows"), (early, rows))
        early.meta = dict(last.meta)
    if early is not last:
        last.replace_all_uses_with(early, delete_user_cb=lambda user: user.name not in skipped)
    layout = DecoderLayout.of(program)
    results = graph.output_node().args[0]
    assert isinstance(results, tuple | list)
    caches = [nodes[node.name] for node in layout.caches(program)]
    kept = [(cache, new) for cache, new in zip(caches, results[1:], strict=True) if new.name not in skipped]
    graph.output_node().args = ((results[0], *(new for _, new in kept)),)
    for node in reversed(list(graph.nodes)):
        is_gone = node.op in ("call_function", "get_attr") or (node in caches and node not in dict(kept))
        if is_gone and not node.users:
            graph.erase_node(node)
    inputs = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    made = Program(
        fx.GraphModule(nn.Module(), fx.Graph()),
        _signature(inputs, [str(cache.target) for cache, _ in kept]),
        program.symbols,
        title=f"{program.title}, {depth} of {len(stack.layers)} layers",
    )
    for node in graph.nodes:
        if node.op == "get_attr":
            made.set_tensor(str(node.target), program.tensor(str(node.target)))
    made.body.graph = graph
    made.body.recompile()
    return made


def _signature(inputs: list[str], caches: list[str]) -> Signature:
    _, given = pytree.tree_flatten(((), dict.fromkeys(inputs, 0)))
    _, results = pytree.tree_flatten(dict.fromkeys(("logits", *caches), 0))
    return Signature(given, results, tuple(inputs), {})


def names_of_caches(program: Program) -> list[str]:
    """Of a truncated step, in the order of its inputs and outputs."""
    found = [str(node.target) for node in program.inputs]
    return [name for name in found if name.startswith(("keys_", "values_"))]
