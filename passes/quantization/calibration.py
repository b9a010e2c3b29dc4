"""What the linears of a program see: second moments of their inputs over calibration data, one for each input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program

Batch = Mapping[str, Any] | Sequence[Any] | torch.Tensor


def second_moments(
    program: Program, sources: Iterable[fx.Node], batches: Iterable[Batch], mask_input: str | None = "attention_mask"
) -> dict[fx.Node, torch.Tensor]:
    """``Σ x xᵀ`` over all tokens of the calibration batches, for each of the given values.

    Args:
        program: runs the batches.
        sources: nodes with values ``[..., features]``.
        batches: arguments of one call each: a mapping, a sequence, or one tensor.
        mask_input: name of the input that is 0 at padding; those positions are left out where a value has one row per
            position. ``None``, or a name the program does not have: nothing is left out.

    Returns:
        ``[features, features]`` float32 for every source.

    Raises:
        InputError: there is no batch, or one does not fit the program; the batch is numbered.
    """
    collector = _Collector(program, set(sources))
    count = 0
    for index, batch in enumerate(batches):
        flat = _flatten(program, batch, index)
        names = program.signature.names
        mask = flat[names.index(mask_input)] if mask_input in names else None
        collector.observe(flat, mask)
        count += 1
    if count == 0:
        raise InputError("there is no calibration data", hint="give at least one batch")
    return collector.moments


class _Collector(fx.Interpreter):
    def __init__(self, program: Program, sources: set[fx.Node]) -> None:
        super().__init__(program.body, garbage_collect_values=True)
        self.sources = sources
        self.moments: dict[fx.Node, torch.Tensor] = {}
        self._mask: torch.Tensor | None = None

    def observe(self, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> None:
        """Run one batch."""
        self._mask = mask.to(torch.bool) if mask is not None else None
        with torch.no_grad():
            self.run(*inputs, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and take the second moment of what it gives if it is wanted."""
        value = super().run_node(n)
        if n in self.sources:
            rows = self._rows(value)
            moment = rows.T @ rows
            self.moments[n] = self.moments[n] + moment if n in self.moments else moment
        return value

    def _rows(self, value: torch.Tensor) -> torch.Tensor:
        value = value.to(torch.float32)
        if self._mask is not None and value.shape[:-1] == self._mask.shape:
            return value[self._mask]
        return value.reshape(-1, value.shape[-1])


def _flatten(program: Program, batch: Batch, index: int) -> list[torch.Tensor]:
    try:
        if isinstance(batch, torch.Tensor):
            flat = program.signature.flatten((batch,), {})
        elif isinstance(batch, Mapping):
            flat = program.signature.flatten((), dict(batch))
        elif isinstance(batch, Sequence) and not isinstance(batch, str):
            flat = program.signature.flatten(tuple(batch), {})
        else:
            raise InputError(f"is a {type(batch).__name__}", hint="give mappings, sequences or tensors")
        program.check_inputs(flat)
    except InputError as error:
        raise InputError(f"calibration batch {index + 1} does not fit: {error}") from error
    for name, value in zip(program.signature.names, flat, strict=True):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError("holds NaN or infinity", where=f"calibration batch {index + 1}, input {name!r}")
    return flat
