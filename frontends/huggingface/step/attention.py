"""What stands in for a model's attention and masks while one decoding step of it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from graphwright.ir import ops
from graphwright.ir.errors import TraceError

# What transformers passes to an attention function that says nothing about which scores there are.
_HARMLESS = frozenset(
    {
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "scaling",
        "sliding_window",  # the mask has it too, and that is what transformers' own attention goes by
        "softcap",
        "use_cache",
    }
)

# Lengths beside a window on which a mask is looked at.
_LENGTHS = (0, 1, 63, 300)


@dataclass(frozen=True)
class Mask:
    """What a model gets for the mask that it asks transformers for, and hands on to its attention.

    Attributes:
        window: how many positions back a token sees, itself included; 0 for all.
        problem: why no attention may use it; many models make masks that none of their layers needs.
    """

    window: int
    problem: str = ""

    # Falcon looks for a mask to add its positions to, MPT wants a boolean one.
    ndim = 0

    def to(self, *_: Any) -> Mask:
        """Itself."""
        return self


@dataclass
class Step:
    """What the attention of the step that is running reads, and the caches it leaves behind.

    Attributes:
        slots: int64 ``[B]``.
        starts: int64 ``[B]``.
        keys: by layer ``[N, Hkv, C, D]``; made by the first step where ``room`` says how large.
        values: the same.
        slopes: ``[Hq]`` of ALiBi, or ``None``.
        room: slots and capacity of caches that are not there yet.
        done: layers that have attended.
        look: check each mask's function, which needs real numbers.
    """

    slots: torch.Tensor
    starts: torch.Tensor
    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    slopes: torch.Tensor | None = None
    room: tuple[int, int] | None = None
    done: set[int] = field(default_factory=set)
    look: bool = False

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        *,
        scale: float,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """Write keys and values of the new tokens into the layer's cache and attend over it.

        Args:
            module: the attention, which knows its layer.
            query: ``[B, Hq, S, D]``.
            key: ``[B, Hkv, S, D]``.
            value: ``[B, Hkv, S, Dv]``.
            mask: as the model hands it on.
            scale: factor on the products.
            softcap: 0 for none.

        Returns:
            ``[B, S, Hq, Dv]``.

        Raises:
            TraceError: not a mask of this step, or the layer has attended before.
        """
        layer = getattr(module, "layer_idx", None)
        where = f"attention {type(module).__name__} of layer {layer}"
        if not isinstance(layer, int):
            raise TraceError("does not say which layer it belongs to", where=where)
        if layer in self.done:
            raise TraceError("attends twice in one step", where=where)
        if not isinstance(mask, Mask):
            raise TraceError(
                "makes its mask by itself, so what it hides is not known",
                where=where,
                hint="only masks from transformers.masking_utils can be followed",
            )
        if mask.problem:
            raise TraceError(mask.problem, where=where)
        self.done.add(layer)
        append, attend = ops.get("cache_append").target, ops.get("cached_attention").target
        for cache, new in ((self.keys, key), (self.values, value)):
            if self.room is not None and layer not in cache:
                slots, capacity = self.room
                cache[layer] = torch.zeros(slots, new.shape[1], capacity, new.shape[3], dtype=new.dtype)
            cache[layer] = append(cache[layer], new, self.slots, self.starts)
        caches = self.keys[layer], self.values[layer], self.slots, self.starts
        result: torch.Tensor = attend(query, *caches, self.slopes, float(scale), mask.window, float(softcap))
        return result.transpose(1, 2)


RUNNING: ContextVar[Step] = ContextVar("step")


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: heads come as ``[B, H, S, D]`` and go as ``[B, S, H, D]``."""
    refuse_options(module, options)
    scaling, softcap = options.get("scaling"), options.get("softcap")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return RUNNING.get().attend(module, query, key, value, attention_mask, scale=scale, softcap=softcap or 0.0), None


def refuse_options(module: Any, options: Mapping[str, Any]) -> None:
    """Raise TraceError for anything that changes the scores in a way ``cached_attention`` does not know."""
    for name, value in options.items():
        changed = value is False if name == "is_causal" else name not in _HARMLESS
        if changed and (value is not None and (value is not False or name == "is_causal")):
            what = "attention sinks" if name == "s_aux" else f"{name!r}"
            raise TraceError(
                f"its attention takes {what}, which decoding with a cache does not support",
                where=f"attention {type(module).__name__} of layer {getattr(module, 'layer_idx', None)}",
            )


def make_mask(*_: Any, mask_function: Callable[..., Any], local_size: int | None = None, **__: Any) -> Mask:
    """transformers' mask interface: a note of the window instead of a mask."""
    window = int(local_size or 0)
    return Mask(window, _problem(mask_function, window) if RUNNING.get().look else "")


def _problem(function: Callable[..., Any], window: int) -> str:
    """What keeps a mask from being causal with a window: chunks, blocks, both directions."""
    zero = torch.zeros(1, 1, dtype=torch.int64)
    for length in sorted({*_LENGTHS, *(window * times + more for times in (1, 2) for more in (-1, 0, 1) if window)}):
        keys = torch.arange(length + 3).unsqueeze(0)
        query = torch.full((1, 1), length)
        wanted = keys <= query
        if window:
            wanted = wanted & (keys > query - window)
        try:
            found = torch.as_tensor(function(zero, zero, query, keys)).expand_as(wanted)
        except (IndexError, RuntimeError):
            return "its mask depends on the text"
        if not torch.equal(found, wanted):
            seen = "every position before it" if not window else f"the {window} positions up to it"
            return (
                f"its mask is not the causal one: the token at {length} does not see exactly {seen}"
                " (chunked, blockwise and bidirectional attention are not supported)"
            )
    return ""
