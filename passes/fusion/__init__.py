"""Passes that make one operator of several, so that one kernel can run them."""

from graphwright.passes.fusion.gated import FuseGatedActivation
from graphwright.passes.fusion.gelu import FuseGelu
from graphwright.passes.fusion.layer_norm import FuseLayerNorm
from graphwright.passes.fusion.rms_norm import FuseRMSNorm

__all__ = ["FuseGatedActivation", "FuseGelu", "FuseLayerNorm", "FuseRMSNorm"]
