"""BLOOM's attention (BigScience 2022): one joint linear, ALiBi, the residual added inside."""

from __future__ import annotations

from typing import Any

import torch

from graphwright.frontends.huggingface.step.attention import RUNNING


def forward(
    self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, alibi: Any, attention_mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    """Replaces ``BloomAttention.forward``."""
    batch, tokens, _ = hidden_states.shape
    joint = self.query_key_value(hidden_states).view(batch, tokens, self.num_heads, 3 * self.head_dim)
    query, key, value = (part.transpose(1, 2) for part in joint.chunk(3, dim=3))
    mixed = RUNNING.get().attend(self, query, key, value, attention_mask, scale=self.inv_norm_factor)
    return residual + self.dense(mixed.reshape(batch, tokens, -1)), None


def slopes(model: Any) -> torch.Tensor:
    """``[Hq]``."""
    biases: torch.Tensor = model.transformer.build_alibi_tensor(
        torch.ones(1, 2, dtype=torch.int64), model.config.n_head, torch.float32
    )
    return biases[:, 0, 1]
