"""Decoders of random weights that repeat a group of layers, and predictions replayed over their stages."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

import graphwright as gw
from graphwright.backends.pipeline import PipelineSession


def repeated_model(
    groups: int, repeats: int, *, vocabulary: int, hidden: int, feed_forward: int, heads: int, tied: bool = True
) -> Any:
    """A Llama of ``groups`` layers, each ``repeats`` times; ``tied``: to have one table as embeddings and head."""
    torch.manual_seed(0)
    config: Any = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=groups,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8),
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    layers = model.model.layers
    for place in range(groups, groups * repeats):
        source = layers[place % groups]
        layers.append(copy.deepcopy(source, {id(each): each for each in source.parameters()}))
        layers[place].self_attn.layer_idx = place
    model.config.num_hidden_layers = groups * repeats
    return model.eval()


def lowered(model: Any, kind: str) -> Any:
    """A decoder on the CPU: ``"FP32"``, or ``"INT4"`` in groups of 128 with the head, as in the decoder benchmark."""
    passes: list[gw.Pass] = [gw.PrepareDecoder(length=512)]
    backend = gw.CpuBackend(keep_weights=False)
    if kind == "INT4":
        # A search for the best clip takes minutes, and nothing here depends on it.
        passes.append(gw.QuantizeLinears(bits=4, group_size=128, lm_head=True, clip_search=False))
        backend = gw.CpuBackend(compute="int8", keep_weights=False)
    return gw.optimize(gw.load_decoder(model, check=False), passes, target=backend, verify=False)


class ReplayedPredictions(PipelineSession):
    """A session whose stages really run, and whose predictions are then replaced by ones that are known beforehand.

    Args:
        inner: runs the stages.
        flips: how often the first repetitions' prediction is wrong.
        until: how many repetitions a wrong prediction lasts.

    Attributes:
        replacing_seconds: that replacing predictions has taken, which a model that predicts so does not spend.
    """

    def __init__(self, inner: PipelineSession, flips: float, until: int, seed: int = 0) -> None:
        super().__init__(
            inner.layout, repeats=inner.repeats, width=inner.width, slots=inner.slots, capacity=inner.capacity
        )
        self.cache, self._inner, self._until = inner.cache, inner, until
        self.replacing_seconds = 0.0
        random = torch.Generator().manual_seed(seed)
        self._right = torch.randint(0, inner.layout.vocabulary - 1, (inner.capacity + 1,), generator=random).tolist()
        # Exactly as many as are asked for, up to one, and evenly spread: few tokens would else say little.
        self._is_flipped = [int((at + 1) * flips) > int(at * flips) for at in range(inner.capacity + 1)]

    def _stage(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        is_new: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, after = self._inner._stage(tokens, hidden, is_new, slots, starts, rows)
        if rows.shape[1]:
            ends = [start + tokens.shape[1] - 1 for start in starts.tolist()]
            self._replace(logits.numpy()[:, -1], [slot % self.repeats for slot in slots.tolist()], ends)
        return logits, after

    def stage_tokens(
        self,
        tokens: Sequence[int],
        hidden: npt.NDArray[np.float32],
        repetitions: Sequence[int],
        slots: Sequence[int],
        starts: Sequence[int],
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """As the inner session's, then replaced."""
        logits, after = self._inner.stage_tokens(tokens, hidden, repetitions, slots, starts)
        self._replace(logits, repetitions, starts)
        return logits, after

    def _replace(self, logits: npt.NDArray[np.float32], repetitions: Sequence[int], places: Sequence[int]) -> None:
        began = time.perf_counter()
        chosen = [
            self._right[at] + (self._is_flipped[at] and repetition < self._until)
            for repetition, at in zip(repetitions, places, strict=True)
        ]
        logits[range(len(chosen)), chosen] = 1e30
        self.replacing_seconds += time.perf_counter() - began

    def _copy(self, source: int, target: int, length: int) -> None:
        self._inner._copy(source, target, length)
