"""Passes that make one operator of several, so that one kernel can run them."""

from graphwright.passes.fusion.attention import FuseAttention
from graphwright.passes.fusion.bundle import FuseAll
from graphwright.passes.fusion.gated import FuseGatedActivation
from graphwright.passes.fusion.gelu import FuseGelu
from graphwright.passes.fusion.layer_norm import FuseLayerNorm
from graphwright.passes.fusion.linears import FuseGateUp, FuseQKV
from graphwright.passes.fusion.rms_norm import FuseRMSNorm
from graphwright.passes.fusion.rotary import FuseRotaryEmbedding

__all__ = [
    "FuseAll",
    "FuseAttention",
    "FuseGateUp",
    "FuseGatedActivation",
    "FuseGelu",
    "FuseLayerNorm",
    "FuseQKV",
    "FuseRMSNorm",
    "FuseRotaryEmbedding",
]
