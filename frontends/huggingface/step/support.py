"""Which models cannot become a decoding step, by their configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from graphwright.frontends.huggingface.step.families import Family
from graphwright.ir.errors import TraceError

_LAYERS = frozenset({"attention", "full_attention", "sliding_attention"})
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def refuse_unsupported(model: Any, family: Family | None) -> None:
    """Raise TraceError for what is known not to fit a step with a cache of keys and values."""
    for reason in _reasons(model, family):
        raise TraceError(f"cannot be traced as a decoding step: {reason}", where=type(model).__name__)


def _reasons(model: Any, family: Family | None) -> Iterator[str]:
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        yield "it is an encoder-decoder model or attends across to another one"
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        yield "it has no language modelling head"
    kinds = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - _LAYERS)
    if kinds:
        yield f"it has layers of the kinds {', '.join(kinds)}; only full and sliding-window attention are supported"
    if getattr(config, "kv_lora_rank", None):
        yield "it has latent attention (MLA)"
    if getattr(config, "num_kv_shared_layers", 0):
        yield "its layers share keys and values with each other"
    for module in model.modules():
        rope = getattr(module, "rope_type", None)
        for kind in rope.values() if isinstance(rope, dict) else (rope,):
            if isinstance(kind, str) and any(name in kind for name in _LENGTH_DEPENDENT):
                yield f"its rotary positions ({kind}) depend on the length of the text, keys in the cache do not"
    if family is None and "position_ids" not in inspect.signature(model.forward).parameters:
        yield "it takes no position_ids"
