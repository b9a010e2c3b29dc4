"""What a reduced program must compute: the original with zeros wherever something of a removed unit lies."""

from __future__ import annotations

from typing import Any

import torch

import graphwright as gw
from graphwright.passes.removal.cutting import cut
from graphwright.passes.removal.units import Units


def reduced(program: gw.Program, item: gw.Pass, monkeypatch: Any) -> tuple[gw.Program, gw.Program]:
    """The program that a pass makes, and the one with zeros in the place of what it removed."""

    def watching(program: gw.Program, units: Units, gone: set[int], **options: Any) -> None:
        labels = {axis: units.of(axis).clone() for axis in units.labels}
        zeroed.append(_zeroed(program, labels, gone))
        cut(program, units, gone, **options)

    zeroed: list[gw.Program] = []
    monkeypatch.setattr("graphwright.passes.removal.passes.cut", watching)
    small = program.clone()
    assert item(small) is True
    monkeypatch.undo()
    return small, zeroed[0]


def _zeroed(program: gw.Program, labels: dict[Any, torch.Tensor], gone: set[int]) -> gw.Program:
    made = program.clone(copy_weights=True)
    away = torch.tensor(sorted(gone))
    with torch.no_grad():
        for axis, own in labels.items():
            if axis.node.op == "get_attr":
                tensor = made.tensor(str(axis.node.target))
                tensor.index_fill_(axis.place, torch.isin(own, away).nonzero().flatten(), 0)
    return made
