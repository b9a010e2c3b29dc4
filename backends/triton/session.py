"""Decoding on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from graphwright.backends.session import CACHES, Session
from graphwright.backends.triton.graphs import StepGraphs
from graphwright.backends.triton.memory import room
from graphwright.backends.triton.nodes.attention import Cache
from graphwright.ir.arguments import arguments_of
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import BackendError, InputError
from graphwright.ir.names import op_name

if TYPE_CHECKING:
    from graphwright.backends.triton.executable import TritonExecutable

# How caches may be stored: as everywhere, and in the half precision that GPUs have besides.
STORED = {**CACHES, "float16": torch.float16}

_APPEND, _ATTENTION = "graphwright.cache_append", "graphwright.cached_attention"


class TritonSession(Session):
    """Caches on the GPU that steps write in place.

    Args:
        executable: of a decoding step.
        layout: of the decoder.
        slots: sequences held at a time.
        capacity: tokens that each can hold.
        cache: one of :data:`STORED`.
        capture: whether short steps are recorded as CUDA graphs.

    Raises:
        InputError: there are no slots or no capacity.
        BackendError: caches are read by something else than attention, or memory does not suffice.
    """

    def __init__(
        self,
        executable: TritonExecutable,
        layout: DecoderLayout,
        *,
        slots: int,
        capacity: int,
        cache: str,
        capture: bool,
    ) -> None:
        if slots < 1 or capacity < 1:
            raise InputError(f"needs slots and capacity, not {slots} and {capacity}", where="session")
        _check_caches(layout.caches(executable.program))
        self.layout, self.slots, self.capacity, self.cache = layout, slots, capacity, cache
        self._executable, self._device = executable, executable.device
        places = (*layout.keys, *layout.values)
        each = [width * STORED[cache].itemsize + (4 if cache == "int8" else 0) for _, width in places]
        needed = slots * capacity * sum(heads * size for (heads, _), size in zip(places, each))
        what = f"the caches of {slots} sequences of {capacity} tokens need"
        hint = "take a smaller capacity or fewer slots, or cache='int8'"
        with room(needed, self._device, what, where="session", hint=hint):
            self._caches = [_empty((slots, heads, capacity, width), cache, self._device) for heads, width in places]
        self._graphs = StepGraphs(self._logits, self._device) if capture else None

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys, values and scales, all slots filled."""
        return sum(each.values.nbytes + (0 if each.scales is None else each.scales.nbytes) for each in self._caches)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        for cache in self._caches:
            for tensor in (cache.values, cache.scales):
                if tensor is not None:
                    tensor[target, :, :length] = tensor[source, :, :length]

    def _step(
        self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        given = tokens, slots, starts, rows, *self._weights(slots)
        if self._graphs is not None:
            return self._graphs.run(*given).cpu()
        return self._logits(*(each.to(self._device) for each in given)).cpu()

    def _logits(
        self,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        rows: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        with torch.no_grad():
            body = self._executable.lowered.body
            logits: torch.Tensor = body(tokens, slots, starts, rows, *self._caches, *weights)[0]
        return logits.float()


def _empty(shape: tuple[int, int, int, int], cache: str, device: torch.device) -> Cache:
    values = torch.zeros(shape, dtype=STORED[cache], device=device)
    return Cache(values, values.new_zeros(shape[:3], dtype=torch.float32) if cache == "int8" else None)


def _check_caches(caches: list[fx.Node]) -> None:
    """Check that caches can be written in place: only a ``cache_append`` reads each, and only attention what it gives.

    Raises:
        BackendError: naming the node that is in the way.
    """
    for cache in caches:
        readers = list(cache.users)
        fits = len(readers) == 1 and op_name(readers[0]) == _APPEND and arguments_of(readers[0])["cache"] is cache
        after = [user for user in readers[0].users if user.op != "output"] if fits else []
        others = [user for user in after if op_name(user) != _ATTENTION]
        if not fits or others:
            bad = others[0] if others else cache
            raise BackendError(
                "reads a cache that is not written and read by attention alone",
                where=f"node %{bad.name}",
                hint="use target='reference'",
            )
