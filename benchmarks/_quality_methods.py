"""The methods that the benchmark of quality compares, and the rivals that have the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import graphwright as gw

Batches = Sequence[Any]


@dataclass(frozen=True)
class Rival:
    """A quantiser of another library.

    Attributes:
        name: as results have it.
        script: ``_rival_SCRIPT.py``, and its environment.
        bits: that it has.
        options: of its command line.
    """

    name: str
    script: str
    bits: tuple[int, ...] = (4, 3, 2)
    options: tuple[str, ...] = ()


# Act order that keeps groups together, as ours does.
_BY_IMPORTANCE = "GPTQModel 7.7, groups by importance"

RIVALS = (
    Rival("GPTQModel 7.7", "gptq"),
    Rival(_BY_IMPORTANCE, "gptq", options=("--group-order",)),
    Rival("hqq 0.2.8", "hqq"),
    Rival("auto-round 0.16", "autoround"),
    Rival("llm-compressor 0.14 AWQ", "awq"),
    Rival("torchao 0.18 nearest", "torchao"),
    Rival("NNCF 3.4", "nncf", (4,)),
    Rival("NNCF 3.4 AWQ, scale estimation", "nncf", (4,), ("--data-aware",)),
)


@dataclass(frozen=True)
class Method:
    """A way to quantise the linears.

    Attributes:
        name: as results have it.
        passes: from bits, group size and calibration batches.
        rivals: names of those that it is held against.
        quick: part of the quick run.
    """

    name: str
    passes: Callable[[int, int, Batches], list[gw.Pass]]
    rivals: tuple[str, ...] = ()
    quick: bool = False


def _linears(**options: Any) -> Callable[[int, int, Batches], list[gw.Pass]]:
    """Quantised linears, without data."""
    return lambda bits, group, _: [gw.QuantizeLinears(bits=bits, group_size=group, **options)]


def _calibrated(*before: Callable[[int, int, Batches], gw.Pass], **options: Any) -> Any:
    """Quantised linears, with data, behind other passes."""

    def made(bits: int, group: int, batches: Batches) -> list[gw.Pass]:
        last = gw.QuantizeLinears(bits=bits, group_size=group, calibration=batches, **options)
        return [*(each(bits, group, batches) for each in before), last]

    return made


def _salient(bits: int, group: int, batches: Batches) -> gw.Pass:
    return gw.ScaleSalientChannels(bits=bits, group_size=group, calibration=batches)


def _trained(bits: int, group: int, batches: Batches) -> gw.Pass:
    return gw.TrainEquivalentScales(bits=bits, group_size=group, clip_search=True, calibration=batches)


def _rotated(_bits: int, _group: int, _batches: Batches) -> gw.Pass:
    return gw.RotateHiddenStates()


# Neither torchao nor GPTQModel search for a clip, and hqq's zero points are floats: with the same settings as theirs,
# ours have even ranges and such zero points.
_EVEN: dict[str, Any] = {"clip_search": False, "even_range": True}
_FLOATS: dict[str, Any] = {"symmetric": False, "float_zero_points": True}


def _hqq(bits: int, group: int, _: Batches) -> list[gw.Pass]:
    """As hqq has it, which starts from whole zero points at 4 bits."""
    rounding = gw.Hqq(fit_scale=False, whole_start=bits == 4)
    return [gw.QuantizeLinears(bits=bits, group_size=group, rounding=rounding, **_FLOATS)]


METHODS = (
    Method("nearest, full range", _linears(clip_search=False), ("NNCF 3.4",)),
    Method("nearest, even range", _linears(**_EVEN), ("torchao 0.18 nearest",)),
    Method("nearest", _linears(), quick=True),
    Method("nearest asymmetric", _linears(symmetric=False)),
    Method("HQQ", _hqq, ("hqq 0.2.8",)),
    Method("HQQ, scales fitted", _linears(rounding=gw.Hqq(fit_scale=True), **_FLOATS)),
    Method("HQQ, whole zero points", _linears(symmetric=False, rounding="hqq")),
    Method("GPTQ", _calibrated(), ("GPTQModel 7.7",), quick=True),
    Method("GPTQ, even range", _calibrated(**_EVEN), ("GPTQModel 7.7",)),
    Method("GPTQ act-order", _calibrated(rounding=gw.Gptq(act_order=True)), (_BY_IMPORTANCE,)),
    Method(
        "AWQ", _calibrated(_salient, rounding="awq-clip"), ("llm-compressor 0.14 AWQ", "NNCF 3.4 AWQ, scale estimation")
    ),
    Method("TEQ", _calibrated(_trained, rounding="nearest")),
    Method("rotation, GPTQ", _calibrated(_rotated)),
    Method("AutoRound", _calibrated(rounding="autoround"), ("auto-round 0.16",)),
    Method("GPTQ, low rank 8", _calibrated(compensation=gw.LowRank(rank=8))),
)
