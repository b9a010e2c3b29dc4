"""The systems that are compared, with shapes that train about as many numbers, and what their papers say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import graphwright as gw

# A model's query and value projections, and its feed-forward blocks.
PROJECTIONS = {"MiniLM": ["*.query", "*.value"], "Llama 5.8M": ["*.q_proj", "*.v_proj"]}
RANK = 4


@dataclass(frozen=True)
class System:
    """A way to train a model.

    Attributes:
        name: as the papers call it.
        passes: what is put into a model, by the model's name; ``None`` where it has no place.
        rates: learning rates to choose from.
        base: whether the model itself is trained.
        claims: what its paper says, by task.
        claimed_time: its training time in the paper, fine-tuning being 1.
    """

    name: str
    passes: Callable[[str, int], list[gw.Pass] | None]
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    base: bool = False
    claims: Mapping[str, str] = field(default_factory=dict)
    claimed_time: float | None = None


def _nothing(model: str, seed: int) -> list[gw.Pass]:
    return []


def _lora(model: str, seed: int) -> list[gw.Pass]:
    return [gw.InsertAdapters(gw.LoRA(rank=RANK), where=PROJECTIONS[model], seed=seed)]


def _krona(model: str, seed: int) -> list[gw.Pass]:
    if model == "MiniLM":
        return [gw.InsertAdapters(gw.KronA((64, 48)), where=PROJECTIONS[model], seed=seed)]
    # Powers of two only: 2080 numbers for q, where LoRA has 2048, and 1056 for v, where it has 1536.
    overrides = {"*.v_proj": {"a": (32, 32)}}
    return [gw.InsertAdapters(gw.KronA((64, 32)), where=PROJECTIONS[model], overrides=overrides, seed=seed)]


def _loda(
    outer: str = "", ranks: Mapping[str, int] | None = None, keep: float | None = None
) -> Callable[[str, int], list[gw.Pass]]:
    """LoDA, beside projections that are reduced first where a rank for each model or a share to keep is given."""

    def passes(model: str, seed: int) -> list[gw.Pass]:
        reduced = ranks is not None or keep is not None
        smaller = [gw.ReduceProjections(rank=ranks[model] if ranks else None, keep=keep)] if reduced else []
        kind = gw.LoDA(rank=RANK, outer=outer)
        return [*smaller, gw.InsertAdapters(kind, where=PROJECTIONS[model], seed=seed)]

    return passes


def _krona_block(model: str, seed: int) -> list[gw.Pass]:
    shape = (64, 96) if model == "MiniLM" else (64, 64)
    return [gw.InsertAdapters(gw.KronABlock(shape, residual=True), seed=seed)]


def _parallel(model: str, seed: int) -> list[gw.Pass]:
    return [gw.InsertAdapters(gw.ParallelAdapter(7 if model == "MiniLM" else 6), seed=seed)]


def _bitfit(model: str, seed: int) -> list[gw.Pass] | None:
    return [gw.InsertAdapters(gw.BitFit(), seed=seed)] if model == "MiniLM" else None  # a Llama has no biases


def _glue(points: float) -> dict[str, str]:
    return dict.fromkeys(("RTE", "STS-B"), f"GLUE mean {points}")


# R-LoDA's rank is the paper's share of the width (300 of 1024), S-LoDA keeps the paper's 40 %.
_RANKS = {"MiniLM": 112, "Llama 5.8M": 75}

SYSTEMS: tuple[System, ...] = (
    System("not trained", _nothing, (0.0,)),
    System("fine-tuning", _nothing, (3e-5, 1e-4, 3e-4), base=True, claims=_glue(85.65), claimed_time=1.0),
    System("LoRA", _lora, claims={**_glue(85.73), "E2E": "BLEU 69.0"}, claimed_time=0.72),
    System("KronA", _krona, claims=_glue(86.14), claimed_time=0.75),
    System("KronA^B_res", _krona_block, claims=_glue(86.57), claimed_time=0.81),
    System("PA", _parallel, claims=_glue(85.86), claimed_time=0.71),
    System("BitFit", _bitfit, claims=_glue(84.17), claimed_time=0.64),
    System("LoDA", _loda(), claims={"E2E": "BLEU 70.2"}),
    System("LoDA+", _loda("activation")),
    System("S-LoDA 40 %", _loda(keep=0.4), claims={"E2E": "BLEU 70.2"}),
    System("R-LoDA", _loda(ranks=_RANKS), claims={"E2E": "BLEU 69.7"}),
)
