"""One decoding step of attention: queries and keys are turned, keys and values are appended, queries attend."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from graphwright.backends.cpu.kernels.attention import rows, words
from graphwright.backends.cpu.kernels.base import Kernel, stored_floats, tensor_like
from graphwright.ir.errors import BackendError


class DecoderAttention(Kernel):
    """``rotary_embedding`` of query and key, ``cache_append`` of key and value, ``cached_attention``, in one call.

    The caches are written in place; see :mod:`graphwright.ir.ops.cache` and :mod:`graphwright.ir.ops.position` for what
    is computed, in float32. Where the caches are int8, each position of each head has a scale, its largest size / 127.

    Args:
        isa: instruction set of the kernel.
        scale: factor on the scores.
        window: how many keys a token sees, its own among them, or 0 for all.
        softcap: 0 for none.
        slopes: ``[Hq]`` (ALiBi) or ``None``.
        interleaved: how pairs of features lie that are turned: neighbours, or halves.

    Attributes:
        instruction: what the executor runs; ``csrc/decoder_attention.h`` names its operands.
    """

    inputs = (
        "query",
        "key",
        "value",
        "cos",
        "sin",
        "keys",
        "values",
        "key_scales",
        "value_scales",
        "slots",
        "starts",
    )

    def __init__(
        self,
        isa: str,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        slopes: torch.Tensor | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self.instruction = _native.DecoderAttention(isa, scale, window, softcap, stored_floats(slopes), interleaved)
        self.label = f"decoder_attention {self.instruction.isa} (float32, flash)"

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_scales: torch.Tensor | None,
        value_scales: torch.Tensor | None,
        slots: torch.Tensor,
        starts: torch.Tensor,
    ) -> torch.Tensor:
        """One step.

        Args:
            query: ``[B, Hq, S, D]``, floating.
            key, value: ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``, floating.
            cos, sin: ``[B or 1, S, R]`` with even ``R <= D``, or ``None``.
            keys, values: ``[N, Hkv, C, D]`` and ``[N, Hkv, C, Dv]``, float32, bfloat16 or int8, written to.
            key_scales, value_scales: float32 ``[N, Hkv, C]`` where they are int8, written to.
            slots, starts: int64 ``[B]``; slots are distinct.

        Returns:
            ``[B, Hq, S, Dv]`` of query's dtype, which lies in memory as ``[B, S, Hq, Dv]``.

        Raises:
            BackendError: shapes or dtypes do not fit, a tensor is not on the CPU, or a position is not in the caches.
        """
        try:
            queries = rows(query)
            if queries.ndim != 4 or values.dim() != 4:
                raise ValueError("query and caches must have four axes")
            batch, heads, length, _ = queries.shape
            result = np.empty((batch, length, heads, values.shape[3]), np.float32).transpose(0, 2, 1, 3)
            self.instruction.run(
                queries,
                rows(key),
                rows(value),
                None if cos is None else rows(cos),
                None if sin is None else rows(sin),
                _stored(keys),
                _stored(values),
                None if key_scales is None else _scales(key_scales),
                None if value_scales is None else _scales(value_scales),
                slots.numpy(),
                starts.numpy(),
                result,
                torch.get_num_threads(),
            )
        except (TypeError, ValueError) as error:  # numpy's, of tensors that are not on the CPU, and the kernel's
            given = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in (query, key, value, keys, values))
            message = f"{error} (query, key, value and caches are {given})"
            raise BackendError(message, where="decoder attention kernel") from None
        return tensor_like(result, query)


def _stored(cache: torch.Tensor) -> npt.NDArray[Any]:
    """A cache as the kernel writes it: never a copy."""
    if cache.dtype not in (torch.float32, torch.bfloat16, torch.int8) or cache.stride(-1) != 1:
        raise ValueError("caches must be float32, bfloat16 or int8, and their last axis contiguous")
    return words(cache)


def _scales(scales: torch.Tensor) -> npt.NDArray[np.float32]:
    if scales.dtype != torch.float32:
        raise ValueError("scales must be float32")
    values: npt.NDArray[np.float32] = scales.numpy()
    return values
