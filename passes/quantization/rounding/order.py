"""In which order GPTQ rounds the columns of a weight, and in which blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Span:
    """Columns that are rounded together, as places in :attr:`Order.columns`.

    Attributes:
        start: the last that is rounded.
        stop: behind the first that is rounded.
        pieces: ``(start, stop, group)`` of one group each, in the order in which they are rounded; where groups lie
            apart, a single one, whose group does not count.
    """

    start: int
    stop: int
    pieces: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Order:
    """An order of columns; they are rounded from the last place to the first.

    Attributes:
        columns: the column at each place.
        spans: the blocks, in the order in which they are rounded.
        places: by group, ``(start, stop)``. ``None`` where a group's columns lie apart.
    """

    columns: torch.Tensor
    spans: tuple[Span, ...]
    places: tuple[tuple[int, int], ...] | None


def in_groups(importance: torch.Tensor, group_size: int, block: int, *, act_order: bool) -> Order:
    """Group after group, so that a group's grid can be fitted when it is reached.

    Args:
        importance: ``[columns]``.
        group_size: columns to a group.
        block: about how many columns make a block; it holds whole groups, or a part of one.
        act_order: the groups with the greatest total importance first, and within each the columns with the greatest;
            else as they are stored. (GPTQModel calls this group-aware reordering.)
    """
    count = len(importance)
    groups = list(importance.split(group_size))
    rank = list(range(len(groups)))
    if act_order:
        rank.sort(key=lambda group: -float(groups[group].sum()))
    places: list[torch.Tensor] = []
    for group in rank:
        within = groups[group].argsort(descending=True, stable=True) if act_order else torch.arange(len(groups[group]))
        places.append(within + group * group_size)
    spans: list[Span] = []
    whole: dict[int, tuple[int, int]] = {}
    stop = count
    pieces: list[tuple[int, int, int]] = []
    for group in rank:
        start = stop - len(groups[group])
        whole[group] = (start, stop)
        if pieces and pieces[0][1] - start > block:
            spans.append(_span(pieces))
            pieces = []
        while stop > start:
            lower = max(start, stop - block)
            pieces.append((lower, stop, group))
            stop = lower
            if pieces[0][1] - lower >= block:
                spans.append(_span(pieces))
                pieces = []
    if pieces:
        spans.append(_span(pieces))
    columns = torch.cat(places).flip(0)
    return Order(columns, tuple(spans), tuple(whole[group] for group in range(len(groups))))


def by_column(importance: torch.Tensor, block: int) -> Order:
    """Columns by falling importance, wherever their group is: grids must be known beforehand."""
    count = len(importance)
    columns = importance.argsort(descending=True, stable=True).flip(0)
    stops = range(count, 0, -block)
    return Order(columns, tuple(_span([(max(0, stop - block), stop, 0)]) for stop in stops), None)


def _span(pieces: list[tuple[int, int, int]]) -> Span:
    return Span(pieces[-1][0], pieces[0][1], tuple(pieces))
