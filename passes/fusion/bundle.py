"""The fusion passes together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphwright.passes.base import Pass
from graphwright.passes.fusion.attention import FuseAttention
from graphwright.passes.fusion.gated import FuseGatedActivation
from graphwright.passes.fusion.gelu import FuseGelu
from graphwright.passes.fusion.layer_norm import FuseLayerNorm
from graphwright.passes.fusion.linears import FuseGateUp, FuseQKV
from graphwright.passes.fusion.rms_norm import FuseRMSNorm
from graphwright.passes.fusion.rotary import FuseRotaryEmbedding
from graphwright.passes.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class FuseAll(Pipeline):
    """Every fusion, each pattern before those that would take its parts apart.

    Norms and activations first; rotary embedding before the attention it feeds; linears last, when what follows them
    has its final form. Each pass is verified and reported by itself. Run ``Cleanup`` before: tracing noise hides
    patterns.
    """

    name: ClassVar[str] = "fuse-all"
    passes: tuple[Pass, ...] = (
        FuseLayerNorm(),
        FuseRMSNorm(),
        FuseGelu(),
        FuseGatedActivation(),
        FuseRotaryEmbedding(),
        FuseAttention(),
        FuseQKV(),
        FuseGateUp(),
    )
