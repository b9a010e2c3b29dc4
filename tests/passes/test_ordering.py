"""A wrong order is an error that names both passes and an order that works, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tests.passes.conftest import Stack

import graphwright as gw
from graphwright.passes.ordering import check_order, sorted_passes


@dataclass(frozen=True, kw_only=True)
class Nothing(gw.Pass):
    """Does nothing."""

    name: ClassVar[str] = "nothing"

    def run(self, program: gw.Program) -> bool:
        return False


class Fuse(Nothing):
    """Must come before packing."""

    name: ClassVar[str] = "fuse"
    not_after: ClassVar[Mapping[str, str]] = {"pack": "packed weights cannot be joined"}


class Pack(Nothing):
    """Packs."""

    name: ClassVar[str] = "pack"


class Merge(Nothing):
    """Needs an adapter."""

    name: ClassVar[str] = "merge"
    needs: ClassVar[tuple[str, ...]] = ("insert",)
    after: ClassVar[tuple[str, ...]] = ("tune",)


class Insert(Nothing):
    """Inserts."""

    name: ClassVar[str] = "insert"
    before: ClassVar[tuple[str, ...]] = ("pack",)


class Tune(Nothing):
    """Tunes."""

    name: ClassVar[str] = "tune"


class Contrary(Nothing):
    """Wants to be both before and after ``pack``."""

    name: ClassVar[str] = "contrary"
    before: ClassVar[tuple[str, ...]] = ("pack",)
    after: ClassVar[tuple[str, ...]] = ("pack",)


@pytest.mark.parametrize(
    ("passes", "message", "hint"),
    [
        ([Pack(), Fuse()], "'fuse' cannot run after 'pack': packed weights", "fuse, pack"),
        ([Merge(), Insert()], "'merge' needs 'insert'", "insert, merge"),
        ([Merge()], "'merge' needs 'insert'", "put 'insert' before 'merge'"),
        ([Insert(), Merge(), Tune()], "'merge' must come after 'tune'", "insert, tune, merge"),
        ([Pack(), Insert()], "'insert' must come before 'pack'", "insert, pack"),
    ],
)
def test_wrong_orders(passes: list[gw.Pass], message: str, hint: str) -> None:
    with pytest.raises(gw.OrderError, match=message) as caught:
        check_order(passes)
    assert hint in str(caught.value)


def test_right_order_is_accepted_and_sorting_finds_one() -> None:
    right: list[gw.Pass] = [Insert(), Tune(), Merge(), Fuse(), Pack()]
    check_order(right)
    assert [item.name for item in sorted_passes(right)] == [item.name for item in right]
    found = sorted_passes(list(reversed(right)))
    check_order(found)


def test_contradiction_is_named() -> None:
    with pytest.raises(gw.OrderError, match="contradict each other"):
        sorted_passes([Contrary(), Pack()])


def test_history_of_the_program_counts() -> None:
    with pytest.raises(gw.OrderError, match="already changed this program"):
        check_order([Fuse()], history=["pack"])
    check_order([Merge()], history=["insert"])


def test_nothing_runs_when_the_order_is_wrong(stack: Stack, batch: dict[str, torch.Tensor]) -> None:
    program = gw.trace(stack, batch)
    with pytest.raises(gw.OrderError):
        gw.run_passes(program, [Pack(), Fuse()])
    assert not program.journal
