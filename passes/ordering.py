"""Declared order and compatibility of passes, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx

from graphwright.ir.errors import OrderError
from graphwright.passes.base import Pass


def check_order(passes: Sequence[Pass], history: Sequence[str] = ()) -> None:
    """Check that passes may run in this order on a program with this history.

    Args:
        passes: in the order in which they would run.
        history: names of passes that changed the program before.

    Raises:
        OrderError: naming both passes, the reason and an order that works.
    """
    seen: list[str] = list(history)
    for index, item in enumerate(passes):
        later = {other.name for other in passes[index + 1 :]}
        barred = seen[len(history) :] if item.judges_history else seen
        for earlier, reason in item.conflicts().items():
            if earlier in barred:
                done = earlier in history and earlier not in {other.name for other in passes[:index]}
                raise OrderError(
                    f"{item.name!r} cannot run after {earlier!r}: {reason}",
                    hint=(
                        f"{earlier!r} has already changed this program: start from the program before it"
                        if done
                        else _suggestion(passes)
                    ),
                )
        for wanted in item.needs:
            if wanted not in seen:
                raise OrderError(
                    f"{item.name!r} needs {wanted!r} to have run before it",
                    hint=_suggestion(passes) if wanted in later else f"put {wanted!r} before {item.name!r}",
                )
        for wanted in item.after:
            if wanted in later:
                raise OrderError(f"{item.name!r} must come after {wanted!r}", hint=_suggestion(passes))
        for other in passes[:index]:
            if item.name in other.after:
                continue  # reported above, from the other side
            if other.name in item.before:
                raise OrderError(f"{item.name!r} must come before {other.name!r}", hint=_suggestion(passes))
        seen.append(item.name)


def sorted_passes(passes: Sequence[Pass]) -> list[Pass]:
    """The passes in an order that keeps every declaration, as near to the given one as possible.

    Raises:
        OrderError: the declarations contradict each other.
    """
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for index, item in enumerate(passes):
        for other, candidate in enumerate(passes):
            if other == index or candidate.name == item.name:
                continue
            first = candidate.name in (*item.after, *item.needs) or item.name in candidate.before
            if first or item.name in candidate.conflicts():
                graph.add_edge(other, index)
            if candidate.name in item.before or candidate.name in item.conflicts():
                graph.add_edge(index, other)
    try:
        return [passes[index] for index in nx.lexicographical_topological_sort(graph)]
    except nx.NetworkXUnfeasible as error:
        cycle = " -> ".join(passes[edge[0]].name for edge in nx.find_cycle(graph))
        raise OrderError(f"these passes contradict each other: {cycle}", hint="leave one of them out") from error


def _suggestion(passes: Sequence[Pass]) -> str:
    try:
        order = sorted_passes(passes)
    except OrderError as error:
        return error.what
    return "an order that works: " + ", ".join(item.name for item in order)
