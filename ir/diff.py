"""What changed from one program to another: a summary, then the lines of the text form that differ, by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from graphwright.ir.equality import describe_weight, same_operands
from graphwright.ir.literals import format_value
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.text import Printer
from graphwright.ir.types import ValueType

_WEIGHT_KINDS = ("added", "removed", "retyped")


@dataclass(frozen=True)
class NodeChange:
    """One node that differs.

    Attributes:
        kind: ``added``, ``removed``, ``changed`` (another operator, operand, constant, type or tag), or ``redirected``
            (where it read a removed value, it reads an added one or what the removed one read; otherwise the same).
        name: its name in the program that has it; in the first one if both do.
        path: its module path.
        before: its line in the first program, if it is there.
        after: its line in the second program, if it is there.
        op_before: its operator there, or an empty string.
        op_after: likewise.
    """

    kind: Literal["added", "removed", "changed", "redirected"]
    name: str
    path: str
    before: str | None
    after: str | None
    op_before: str
    op_after: str


@dataclass(frozen=True)
class WeightChange:
    """A weight added, removed, or of another type: ``before`` and ``after`` say ``weight f32[3, 4]``, or nothing."""

    name: str
    before: str | None
    after: str | None
    bytes_before: int
    bytes_after: int

    @property
    def kind(self) -> str:
        """``added``, ``removed`` or ``retyped``."""
        return "added" if self.before is None else "removed" if self.after is None else "retyped"


@dataclass(frozen=True)
class Diff:
    """What changed; false when nothing did.

    Attributes:
        header: changed lines of the header (dimensions, conditions, aliases, signature), marked with - and +.
        nodes: changed nodes in the order of the programs, removed ones where they stood.
        weights: changed weights.
    """

    header: tuple[str, ...]
    nodes: tuple[NodeChange, ...]
    weights: tuple[WeightChange, ...]

    def __bool__(self) -> bool:
        return bool(self.header or self.nodes or self.weights)

    def of_kind(self, kind: str) -> list[NodeChange]:
        """The nodes that changed in this way."""
        return [change for change in self.nodes if change.kind == kind]

    def summary(self) -> list[str]:
        """A line for each kind of change, such as ``72 linear -> linear_nbits in encoder.layer.*``."""
        if not self:
            return ["no difference"]
        lines = list(_summary_of_nodes(self.nodes))
        for kind in _WEIGHT_KINDS:
            changes = [change for change in self.weights if change.kind == kind]
            if changes:
                before, after = (
                    sum(getattr(item, f"bytes_{when}") for item in changes) for when in ("before", "after")
                )
                size = f"{before:,} -> {after:,}" if kind == "retyped" else f"{before + after:,}"
                lines.append(f"{_counted(len(changes), 'weight')} {kind}, {size} bytes")
        if self.header:
            lines.append(f"{_counted(len(self.header), 'header line')} changed")
        return lines

    def __str__(self) -> str:
        return self.format()

    def format(self, most_groups: int | None = None) -> str:
        """The summary, then the changed lines by module path.

        Args:
            most_groups: show the lines of so many modules only.
        """
        lines = [*self.summary()]
        if self.header:
            lines += ["", "@@ header @@", *self.header]
        shown = [change for change in self.nodes if change.kind != "redirected"]
        groups: dict[str, list[NodeChange]] = {}
        for change in shown:
            groups.setdefault(change.path, []).append(change)
        for path, changes in list(groups.items())[:most_groups]:
            lines += ["", f"@@ {path or '(root)'} @@"]
            for change in sorted(changes, key=lambda change: change.kind != "removed"):
                lines += [f"- {change.before}"] if change.before is not None else []
                lines += [f"+ {change.after}"] if change.after is not None else []
        if most_groups is not None and len(groups) > most_groups:
            lines += ["", f"... and {_counted(len(groups) - most_groups, 'more module')}"]
        if self.weights:
            lines += ["", "@@ weights @@"]
            for weight in self.weights:
                lines += [f"- {weight.name} : {weight.before}"] if weight.before is not None else []
                lines += [f"+ {weight.name} : {weight.after}"] if weight.after is not None else []
        return "\n".join(lines)


def diff(first: Program, second: Program) -> Diff:
    """What changed from the first program to the second.

    Nodes are matched by name where their module path agrees too, then by operator and operands whatever their name, and
    what is left by name alone. Source lines are not compared.
    """
    matched = _match(first, second)
    return Diff(
        header=tuple(_header(first, second)),
        nodes=tuple(_node_changes(first, second, matched)),
        weights=tuple(_weight_changes(first.tensors(), second.tensors())),
    )


# -- matching ----------------------------------------------------------------------------------------------------------


def _match(first: Program, second: Program) -> dict[fx.Node, fx.Node]:
    """Nodes of the first program to those of the second they correspond to."""
    matched: dict[fx.Node, fx.Node] = {first.output: second.output}
    by_name = {node.name: node for node in first.nodes}
    for op in ("placeholder", "get_attr"):
        targets = {str(node.target): node for node in second.nodes if node.op == op}
        for node in first.nodes:
            if node.op == op and str(node.target) in targets:
                matched[node] = targets[str(node.target)]
    calls = [node for node in second.nodes if node.op == "call_function"]
    for node in calls:
        same = by_name.get(node.name)
        if same is not None and same.op == "call_function" and path_of(same) == path_of(node):
            matched[same] = node
    _match_by_structure(first, calls, matched)
    taken = set(matched.values())
    for node in calls:
        same = by_name.get(node.name)
        if node not in taken and same is not None and same.op == "call_function" and same not in matched:
            matched[same] = node
    return matched


def _match_by_structure(first: Program, calls: Sequence[fx.Node], matched: dict[fx.Node, fx.Node]) -> None:
    back = {other: node for node, other in matched.items()}
    free: dict[str, list[fx.Node]] = {}
    for node in first.nodes:
        if node.op == "call_function" and node not in matched:
            free.setdefault(_spelled(node, {}), []).append(node)
    for node in calls:
        if node in back or any(source not in back for source in node.all_input_nodes):
            continue
        candidates = free.get(_spelled(node, back), [])
        here = [candidate for candidate in candidates if path_of(candidate) == path_of(node)]
        if candidates:
            chosen = (here or candidates)[0]
            candidates.remove(chosen)
            matched[chosen], back[node] = node, chosen


def _spelled(node: fx.Node, names: Mapping[fx.Node, fx.Node]) -> str:
    """The call as text, operands under the names of the nodes they correspond to."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: names.get(source, source))
    written = [format_value(value) for value in args] + [f"{key}={format_value(kwargs[key])}" for key in sorted(kwargs)]
    return f"{op_name(node)}({', '.join(written)})"


# -- comparing ---------------------------------------------------------------------------------------------------------


def _header(first: Program, second: Program) -> Iterator[str]:
    old, new = (list(_header_lines(program)) for program in (first, second))
    yield from (f"- {line}" for line in old if line not in new)
    yield from (f"+ {line}" for line in new if line not in old)


def _header_lines(program: Program) -> Iterator[str]:
    for line in Printer(program, types=True, provenance=False).lines():
        if line.startswith(("  %", "  return")):
            return
        if line.strip():
            yield line.strip()


def _node_changes(first: Program, second: Program, matched: Mapping[fx.Node, fx.Node]) -> Iterator[NodeChange]:
    printers = Printer(first, types=True, provenance=True), Printer(second, types=True, provenance=True)
    back = {other: node for node, other in matched.items()}
    old_nodes = [node for node in first.nodes if node.op != "get_attr"]
    place = {node: index for index, node in enumerate(old_nodes)}
    arrived = {node for node in second.nodes if node not in back}
    kinds = {node: printer.kind(node) for printer in printers for node in printer.program.nodes}
    told = 0  # so many of the old nodes have been looked at for removal
    for node in second.nodes:
        if node.op == "get_attr":
            continue
        old = back.get(node)
        if old is None:
            yield NodeChange("added", node.name, path_of(node), None, printers[1].line(node), "", op_name(node))
            continue
        for gone in old_nodes[told : place[old]]:
            if gone not in matched:
                yield NodeChange("removed", gone.name, path_of(gone), printers[0].line(gone), None, op_name(gone), "")
        told = max(told, place[old] + 1)
        kind = _compare(old, node, kinds, matched, arrived)
        if kind is not None:
            lines = printers[0].line(old), printers[1].line(node)
            yield NodeChange(kind, old.name, path_of(old), *lines, op_name(old), op_name(node))


def _compare(
    old: fx.Node,
    new: fx.Node,
    kinds: Mapping[fx.Node, ValueType | None],
    matched: Mapping[fx.Node, fx.Node],
    arrived: AbstractSet[fx.Node],
) -> Literal["changed", "redirected"] | None:
    if op_name(old) != op_name(new) or tags_of(old) != tags_of(new) or path_of(old) != path_of(new):
        return "changed"
    if kinds[old] != kinds[new]:
        return "changed"
    if same_operands(old.args, new.args, matched) and same_operands(old.kwargs, new.kwargs, matched):
        return None
    redirected = dict(matched)
    for one, other in zip(old.all_input_nodes, new.all_input_nodes):
        if one not in matched and (other in arrived or other in _passed_on(one, matched)):
            redirected[one] = other
    same = same_operands(old.args, new.args, redirected) and same_operands(old.kwargs, new.kwargs, redirected)
    return "redirected" if same else "changed"


def _passed_on(removed: fx.Node, matched: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """What a removed node read, through further removed ones, as it is in the second program."""
    found: set[fx.Node] = set()
    stack, seen = list(removed.all_input_nodes), {removed}
    while stack:
        node = stack.pop()
        if node in matched:
            found.add(matched[node])
        elif node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _weight_changes(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> Iterator[WeightChange]:
    for name in {**old, **new}:
        before = describe_weight(old[name]) if name in old else None
        after = describe_weight(new[name]) if name in new else None
        if before != after:
            yield WeightChange(name, before, after, _bytes(old.get(name)), _bytes(new.get(name)))


def _bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


# -- summary -----------------------------------------------------------------------------------------------------------


def _summary_of_nodes(changes: Sequence[NodeChange]) -> Iterator[str]:
    """Replacements module by module: modules in which the same operators went and came are told together."""
    by_path: dict[str, tuple[Counter[str], Counter[str]]] = {}
    changed: dict[tuple[str, str], list[str]] = {}
    for change in changes:
        gone, come = by_path.setdefault(change.path, (Counter(), Counter()))
        if change.kind == "removed":
            gone[_short(change.op_before)] += 1
        elif change.kind == "added":
            come[_short(change.op_after)] += 1
        elif change.kind == "changed":
            changed.setdefault((_short(change.op_before), _short(change.op_after)), []).append(change.path)
    alike: dict[tuple[Any, Any], list[str]] = {}
    for path, (gone, come) in by_path.items():
        if gone or come:
            alike.setdefault((tuple(sorted(gone.items())), tuple(sorted(come.items()))), []).append(path)
    for (gone_items, come_items), paths in sorted(alike.items(), key=lambda item: -len(item[1])):
        times = _factor([count for _, count in (*gone_items, *come_items)])
        sides = [_listed(items, times) for items in (gone_items, come_items)]
        what = " -> ".join(filter(None, sides)) + ("" if all(sides) else " removed" if sides[0] else " added")
        if len(gone_items) > 1 or len(come_items) > 1 or what[0].isdigit():
            what = f"x ({what})"
        yield f"{len(paths) * times} {what} in {general_paths(paths)}"
    for (before, after), paths in changed.items():
        what = f"{before} changed" if before == after else f"{before} -> {after}"
        yield f"{len(paths)} {what} in {general_paths(paths)}"
    redirected = sum(change.kind == "redirected" for change in changes)
    if redirected:
        yield f"{_counted(redirected, 'node')} reading what took the place of a removed one"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _short(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def _factor(counts: Sequence[int]) -> int:
    """How often all counts repeat: 3 linear -> 3 linear_nbits is three times one."""
    return counts[0] if len(set(counts)) == 1 else 1


def _listed(items: Sequence[tuple[str, int]], times: int) -> str:
    return ", ".join(f"{count // times} {name}" if count > times else name for name, count in items)


def general_paths(paths: Sequence[str]) -> str:
    """Module paths as few patterns: numbers that vary become ``*``; where else they part, under one top, is cut."""
    by_top: dict[str, list[list[str]]] = {}
    for path in paths:
        by_top.setdefault(path.split(".")[0], []).append(path.split("."))
    patterns: list[str] = []
    for group in by_top.values():
        common: list[str] = []
        for parts in zip(*group):
            if len(set(parts)) > 1 and not all(map(str.isdigit, parts)):
                break
            common.append(parts[0] if len(set(parts)) == 1 else "*")
        if any(len(parts) > len(common) for parts in group) and common[-1] != "*":
            common.append("*")
        patterns.append(".".join(common) or "(root)")
    return ", ".join(patterns)
