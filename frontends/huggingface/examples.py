"""Example inputs for a transformers model, made from its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from graphwright.ir.errors import InputError

_BATCH, _LENGTH, _TARGET_LENGTH = 2, 12, 7


def make_examples(model: Any, *, also: Sequence[str] = (), seed: int = 0) -> dict[str, Any]:
    """Example keyword arguments for a transformers model.

    Token ids are drawn from the whole vocabulary but the padding id, and one row is padded, so that the attention mask
    matters; images are normal. No labels; ``use_cache`` is off where the model has it. Segment ids (``token_type_ids``)
    are only made when asked for, as most callers leave them to the model's default.

    Args:
        model: a ``PreTrainedModel``.
        also: optional inputs to make as well: ``token_type_ids``, ``position_ids``.
        seed: for the random numbers.

    Raises:
        InputError: the model takes inputs that cannot be made from its configuration.
    """
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    made: dict[str, Any] = {}
    if "input_ids" in parameters and _vocabulary(config) is not None:
        made.update(_text(config, parameters, also, generator))
    if "pixel_values" in parameters:
        made["pixel_values"] = torch.randn(_image_shape(config), generator=generator).to(model.dtype)
    if not made:
        raise InputError(
            f"example inputs for {type(model).__name__} cannot be made from its configuration",
            where=f"main input {getattr(model, 'main_input_name', 'unknown')!r}",
            hint="pass example_inputs={...} yourself",
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        made["decoder_input_ids"] = _ids(config, (_BATCH, _TARGET_LENGTH), generator)
    if "use_cache" in parameters:
        made["use_cache"] = False
    return made


def _text(config: Any, parameters: Any, also: Sequence[str], generator: torch.Generator) -> dict[str, torch.Tensor]:
    length = min(_LENGTH, max(int(getattr(_text_config(config), "max_position_embeddings", 0) or _LENGTH) // 2, 2))
    ids = _ids(config, (_BATCH, length), generator)
    made = {"input_ids": ids}
    if "attention_mask" in parameters:
        mask = torch.ones_like(ids)
        mask[1, length - length // 3 :] = 0
        pad = _special(config, "pad_token_id")
        if pad is not None:
            ids.masked_fill_(mask == 0, pad)
        made["attention_mask"] = mask
    if "token_type_ids" in also and "token_type_ids" in parameters:
        kinds = max(int(getattr(_text_config(config), "type_vocab_size", 1) or 1), 1)
        made["token_type_ids"] = torch.randint(0, kinds, ids.shape, generator=generator)
    if "position_ids" in also and "position_ids" in parameters:
        made["position_ids"] = torch.arange(length).expand_as(ids).contiguous()
    return made


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _vocabulary(config: Any) -> int | None:
    size = getattr(_text_config(config), "vocab_size", None)
    return int(size) if isinstance(size, int) and size > 0 else None


def _special(config: Any, name: str) -> int | None:
    value = getattr(_text_config(config), name, None)
    vocabulary = _vocabulary(config)
    return value if isinstance(value, int) and vocabulary is not None and 0 <= value < vocabulary else None


def _ids(config: Any, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    vocabulary = _vocabulary(config)
    assert vocabulary is not None
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    pad = _special(config, "pad_token_id")
    if pad is not None and vocabulary > 1:
        ids = torch.where(ids == pad, (ids + 1) % vocabulary, ids)  # padding stands at the end only
    return ids


def _image_shape(config: Any) -> tuple[int, int, int, int]:
    vision = getattr(config, "vision_config", config)
    size: Any = getattr(vision, "image_size", 224)
    height, width = (int(side) for side in size[-2:]) if isinstance(size, list | tuple) else (int(size), int(size))
    return _BATCH, int(getattr(vision, "num_channels", 3)), height, width
