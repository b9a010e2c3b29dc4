"""Text for the small Llama: what its perplexity is measured on, and what methods are calibrated with."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _rows import SHARED, need
from _stsb import sts
from tokenizers import Tokenizer

WINDOW = 512


def llama_folder() -> Path:
    """Where the model lies."""
    folder: Path = need(SHARED / "models" / "tinylm")
    return folder


def evaluation_windows(folder: Path) -> torch.Tensor:
    """WikiText-2's validation text in windows of 512 tokens, ``[windows, 512]``."""
    text = need(SHARED / "data" / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    return _windows(folder, text)


def calibration_windows(folder: Path, count: int, draw: int = 0) -> torch.Tensor:
    """Windows of 512 tokens of other text, ``[count, 512]``: sentences of STS-B train, then those of RTE.

    Draws do not overlap: number 1 are the ``count`` windows after those of number 0.
    """
    left, right, _ = sts("sts-train.csv", None)
    files = sorted(need(SHARED / "data" / "rte").glob("*.xml"))
    pairs = [found for file in files for found in re.findall(r"<[th]>(.*?)</[th]>", file.read_text("utf-8"), re.S)]
    windows = _windows(folder, " ".join((*left, *right, *(" ".join(text.split()) for text in pairs))))
    if draw and len(windows) < (draw + 1) * count:
        raise SystemExit(f"draw {draw}: the text has {len(windows)} windows, {(draw + 1) * count} are wanted")
    return windows[draw * count : (draw + 1) * count]


def _windows(folder: Path, text: str) -> torch.Tensor:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    return ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)


def inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of the model for one window or several."""
    batch = ids.reshape(-1, ids.shape[-1])
    return {"input_ids": batch, "attention_mask": torch.ones_like(batch)}


def perplexity(model: Callable[..., Any], windows: torch.Tensor, size: int = 4) -> float:
    """Exponential of the mean loss over positions 2 to 512 of every window."""
    total = 0.0
    with torch.no_grad():
        for batch in windows.split(size):
            logits = model(**inputs(batch)).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            total += float(loss)
    return math.exp(total / (windows.shape[0] * (WINDOW - 1)))
