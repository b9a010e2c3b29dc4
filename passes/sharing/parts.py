"""The parts of a layer: which of its weights belong to attention and which to the feed-forward block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.stacks import Layer, Segment

PARTS = ("block", "attention", "feed-forward")

_ATTENDS = frozenset(
    {
        "aten.scaled_dot_product_attention",
        "graphwright.attention",
        "graphwright.cached_attention",
        "graphwright.attention_int8",
        "aten.softmax.int",
        "aten._softmax",
    }
)


def check_part(part: str, where: str) -> None:
    """Check the name of a part.

    Raises:
        InputError: there is none of that name.
    """
    if part not in PARTS:
        raise InputError(f"there is no part {part!r}", where=f"{where}: part", hint=f"parts: {', '.join(PARTS)}")


def has_attention(segment: Segment) -> bool:
    """Whether positions see each other here."""
    return any(op_name(node) in _ATTENDS for node in segment.nodes)


def is_joint(segment: Segment) -> bool:
    """Whether attention and feed-forward stand beside each other here, as in GPT-NeoX, Phi and Falcon."""
    if not has_attention(segment):
        return False
    own = _of_attention(segment)
    return any(op_name(node) == "aten.linear" and node not in own for node in segment.nodes)


def weights_of_part(layer: Layer, part: str) -> tuple[int, ...]:
    """Places in ``layer.weights`` of those of a part, the same for all layers of a stack.

    To attention belongs what leads to it or comes from it within its segment, the norm before it included, also
    where that feeds the feed-forward block as well. A norm that stands by itself belongs to what is before it.
    """
    if part == "block":
        return tuple(range(len(layer.weights)))
    found: list[int] = []
    start, current = 0, "feed-forward" if _first_branch(layer.segments) == "feed-forward" else "attention"
    for segment in layer.segments:
        own = _of_attention(segment)
        if own or _is_matrix_read(segment):
            current = "attention" if own else "feed-forward"
        for offset, weight in enumerate(segment.weights):
            readers = set(weight.users) & set(segment.nodes)
            belongs = ("attention" if readers & own else "feed-forward") if own else current
            if belongs == part:
                found.append(start + offset)
        start += len(segment.weights)
    return tuple(found)


def _first_branch(segments: Sequence[Segment]) -> str:
    for segment in segments:
        if has_attention(segment):
            return "attention"
        if _is_matrix_read(segment):
            return "feed-forward"
    return ""


def _is_matrix_read(segment: Segment) -> bool:
    return any(op_name(node) in ("aten.linear", "aten.addmm", "aten.matmul") for node in segment.nodes)


def _of_attention(segment: Segment) -> set[fx.Node]:
    """The calls that lead to an attention and those that come from it, within a segment."""
    inside = set(segment.nodes)
    waiting = [node for node in segment.nodes if op_name(node) in _ATTENDS]
    before, after = set(waiting), set(waiting)
    back, forth = list(waiting), list(waiting)
    while back:
        found = [each for each in back.pop().all_input_nodes if each in inside and each not in before]
        before.update(found)
        back += found
    while forth:
        found = [each for each in forth.pop().users if each in inside and each not in after]
        after.update(found)
        forth += found
    return before | after
