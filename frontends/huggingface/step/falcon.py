"""Falcon's attention (Almazrouei et al. 2023): one joint linear, rotary positions or ALiBi."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphwright.frontends.huggingface.step.attention import RUNNING


def forward(
    self: Any,
    hidden_states: torch.Tensor,
    alibi: torch.Tensor | None,
    attention_mask: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Replaces ``FalconAttention.forward``."""
    joint = self.query_key_value(hidden_states)
    query, key, value = (heads.transpose(1, 2) for heads in _heads(self, joint))
    if alibi is None:
        from transformers.models.falcon import modeling_falcon

        assert position_embeddings is not None
        rotate: Callable[..., Any] = modeling_falcon.apply_rotary_pos_emb
        query, key = rotate(query, key, *position_embeddings)
    mixed = RUNNING.get().attend(self, query, key, value, attention_mask, scale=self.inv_norm_factor)
    return self.dense(mixed.reshape(*joint.shape[:2], -1)), None


def slopes(model: Any) -> torch.Tensor | None:
    """``[Hq]``; they are scaled like the scores, and bfloat16, as in the original."""
    config = model.config
    if not config.alibi:
        return None
    from transformers.models.falcon import modeling_falcon

    biases = modeling_falcon.build_alibi_tensor(
        torch.ones(1, 2, dtype=torch.int64), config.num_attention_heads, torch.float32
    )
    slopes: torch.Tensor = biases[:, 0, 1] * (config.hidden_size // config.num_attention_heads) ** -0.5
    return slopes


def _heads(module: Any, joint: torch.Tensor) -> Sequence[torch.Tensor]:
    """Query, key and value ``[B, S, H, D]`` of the joint linear's three layouts."""
    batch, tokens, _ = joint.shape
    heads, width = module.num_heads, module.head_dim
    if module.new_decoder_architecture:
        groups = module.num_kv_heads
        parts = joint.view(batch, tokens, groups, -1, width).split([heads // groups, 1, 1], dim=3)
        return [part.reshape(batch, tokens, -1, width) for part in parts]
    if module.multi_query:
        parts = joint.split([heads * width, width, width], dim=2)
        return [part.view(batch, tokens, -1, width) for part in parts]
    return joint.view(batch, tokens, heads, 3 * width).chunk(3, dim=3)
