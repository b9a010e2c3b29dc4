"""What a reduced program must compute: the original with zeros wherever something of a removed unit lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import graphwright as gw
from graphwright.passes.removal import passes
from graphwright.passes.removal.units import Units


@dataclass
class Seen:
    """What a pass cut: the units and which of them went."""

    units: Units
    gone: set[int]


def reduced(program: gw.Program, item: gw.Pass, monkeypatch: Any) -> tuple[gw.Program, gw.Program]:
    """The program that a pass makes, and the one with zeros in the place of what it removed."""
    seen: list[Seen] = []

    def watching(program: gw.Program, units: Units, gone: set[int], **options: Any) -> None:
        labels = {axis: units.of(axis).clone() for axis in units.labels}
        zeroed.append(_zeroed(program, labels, gone))
        seen.append(Seen(units, gone))
        original(program, units, gone, **options)

    zeroed: list[gw.Program] = []
    original = passes.cut
    monkeypatch.setattr(passes, "cut", watching)
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
