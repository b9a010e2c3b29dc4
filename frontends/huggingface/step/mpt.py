"""MPT's attention (MosaicML 2023): one joint linear, ALiBi."""

from __future__ import annotations

from typing import Any

import torch

from graphwright.frontends.huggingface.step.attention import RUNNING


def forward(self: Any, hidden_states: torch.Tensor, *_: Any, attention_mask: Any, **__: Any) -> tuple[Any, None]:
    """Replaces ``MptAttention.forward``."""
    joint = self.Wqkv(hidden_states)
    if self.clip_qkv:
        joint = joint.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    shape = (*joint.shape[:2], self.n_heads, self.head_dim)
    query, key, value = (part.view(shape).transpose(1, 2) for part in joint.chunk(3, dim=2))
    mixed = RUNNING.get().attend(self, query, key, value, attention_mask, scale=self.softmax_scale)
    return self.out_proj(mixed.reshape(*joint.shape[:2], -1)), None


def slopes(model: Any) -> torch.Tensor:
    """``[Hq]``."""
    biases: torch.Tensor = model.transformer.build_mpt_alibi_tensor(model.config.n_heads, 2)
    return -biases[:, 0, 0]
