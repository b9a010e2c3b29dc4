"""Decoding in onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphwright.backends.onnx import runtime
from graphwright.backends.session import Session
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.types import VAL


def run_step(
    session: runtime.Session,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    rows: torch.Tensor,
    caches: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """One step of a decoder that was exported with ``logits="rows"``.

    The runtime takes prompts together, and single tokens together, but several tokens behind others only one row at a
    time; so do we.

    Args:
        session: the file, opened.
        tokens: int64 ``[B, S]``.
        slots: int64 ``[B]``.
        starts: int64 ``[B]``.
        rows: int64 ``[B, K]``.
        caches: keys and then values of every layer, ``[N, Hkv, C, D]``; written to.
        weights: of adapters, float32 ``[B, adapters]``, where they are switched.

    Returns:
        logits ``[B, K, V]``.

    Raises:
        BackendError: onnxruntime fails.
    """
    if rows.shape[1] == 0:
        some = torch.zeros_like(starts).unsqueeze(1)
        return run_step(session, tokens, slots, starts, some, caches, weights)[:, :0]
    length = tokens.shape[1]
    if length > 1 and len(tokens) > 1 and bool((starts > 0).any()):
        pieces = [
            run_step(session, tokens[one], slots[one], starts[one], rows[one], caches, [each[one] for each in weights])
            for one in torch.arange(len(tokens)).split(1)
        ]
        return torch.cat(pieces)
    ends = starts + length
    mask = (torch.arange(int(ends.max())) < ends.unsqueeze(1)).long()
    held, half = int(starts.max()), len(caches) // 2
    order = [index for layer in range(half) for index in (layer, half + layer)]
    pasts = [caches[index][slots, :, :held] for index in order]
    logits, *presents = session.run([tokens, mask, rows, *pasts, *weights])
    positions = starts.unsqueeze(1) + torch.arange(length)
    batch = torch.arange(len(tokens)).unsqueeze(1)
    for index, present in zip(order, presents, strict=True):
        caches[index][slots.unsqueeze(1), :, positions] = present[batch, :, positions]
    return logits


class OnnxSession(Session):
    """A decoder exported, checked and opened in onnxruntime.

    Args:
        program: the decoding step that was exported.
        session: the file, opened; exported with ``logits="rows"``.
        slots: sequences held at a time.
        capacity: tokens that each can hold.

    Raises:
        ProgramError: the program is not a decoding step.
        InputError: there are no slots or no capacity.
    """

    cache = "float32"

    def __init__(self, program: Program, session: runtime.Session, *, slots: int, capacity: int) -> None:
        if slots < 1 or capacity < 1:
            raise InputError(f"needs slots and capacity, not {slots} and {capacity}", where="session")
        self.layout, self._session = DecoderLayout.of(program), session
        self.slots, self.capacity = slots, capacity
        shapes = (*self.layout.keys, *self.layout.values)
        self._caches = [
            torch.zeros(slots, heads, capacity, width, dtype=node.meta[VAL].dtype)
            for (heads, width), node in zip(shapes, self.layout.caches(program), strict=True)
        ]

    def _step(
        self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        return run_step(self._session, tokens, slots, starts, rows, self._caches, self._weights(slots)).float()

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        for cache in self._caches:
            cache[target, :, :length] = cache[source, :, :length]
