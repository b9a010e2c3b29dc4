"""What the linears of a program see: statistics of their inputs over calibration data, one for each input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.mapped import streaming
from graphwright.ir.program import Program

Batch = Mapping[str, Any] | Sequence[Any] | torch.Tensor


# Rows kept of each input, spread over the calibration data: enough to compare roundings, little to hold.
_SAMPLE_ROWS = 1024

# Statistics are held for so many bytes at a time; the calibration data is run once for each lot.
_LOT_BYTES = 1 << 30


@dataclass
class Observed:
    """Statistics of a value ``[..., features]`` over all its rows, in float32.

    Attributes:
        moment: ``Σ x xᵀ``, ``[features, features]``.
        low: least value of each feature, ``[features]``.
        high: greatest value of each feature, ``[features]``.
        rows: some of the rows, evenly spread, ``[at most 1024, features]``.
    """

    moment: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    rows: torch.Tensor
    _stride: int = 1
    _seen: int = 0

    @classmethod
    def nothing(cls, features: int) -> Observed:
        """Before the first row."""
        low = torch.full((features,), float("inf"))
        return cls(torch.zeros(features, features), low, -low, torch.empty(0, features))

    def add(self, rows: torch.Tensor) -> None:
        """Count more rows, ``[n, features]`` float32."""
        if not len(rows):
            return
        self.moment.addmm_(rows.T, rows)
        self.low, self.high = torch.minimum(self.low, rows.amin(0)), torch.maximum(self.high, rows.amax(0))
        self.rows = torch.cat((self.rows, rows[-self._seen % self._stride :: self._stride]))
        self._seen += len(rows)
        while len(self.rows) > _SAMPLE_ROWS:
            self.rows, self._stride = self.rows[::2].clone(), 2 * self._stride


def observe(
    program: Program, sources: Iterable[fx.Node], batches: Iterable[Batch], mask_input: str | None = "attention_mask"
) -> dict[fx.Node, Observed]:
    """Statistics of values over all tokens of the calibration batches.

    Args:
        program: runs the batches.
        sources: nodes with values ``[..., features]``.
        batches: arguments of one call each: a mapping, a sequence, or one tensor.
        mask_input: name of the input that is 0 at padding; those positions are left out where a value has one row per
            position. ``None``, or a name the program does not have: nothing is left out.

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
    return collector.found


class Observations(Mapping[fx.Node, Observed]):
    """Statistics on demand, a lot at a time, so that not all of a large model's are in memory together."""

    def __init__(self, program: Program, sources: list[fx.Node], batches: Sequence[Batch]) -> None:
        self._program = program.clone()
        names = {node.name: node for node in self._program.nodes}
        self._twins = {source: names[source.name] for source in sources}
        self._sources = sources
        self._batches = batches
        self._held: dict[fx.Node, Observed] = {}

    def __getitem__(self, source: fx.Node) -> Observed:
        if source not in self._held:
            self._held = self._collect(self._sources.index(source))
        return self._held[source]

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def _collect(self, first: int) -> dict[fx.Node, Observed]:
        lot: list[fx.Node] = []
        used = 0
        for source in self._sources[first:]:
            width = int(source.meta["val"].shape[-1])
            used += 4 * width * (width + 2 * _SAMPLE_ROWS)
            if lot and used > _LOT_BYTES:
                break
            lot.append(source)
        found = observe(self._program, [self._twins[source] for source in lot], self._batches)
        return {source: found[self._twins[source]] for source in lot}


class _Collector(fx.Interpreter):
    def __init__(self, program: Program, sources: set[fx.Node]) -> None:
        super().__init__(program.body, garbage_collect_values=True)
        self.sources = sources
        self.found: dict[fx.Node, Observed] = {}
        self._mask: torch.Tensor | None = None

    def observe(self, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> None:
        """Run one batch."""
        self._mask = mask.to(torch.bool) if mask is not None else None
        with torch.no_grad(), streaming(self.module.state_dict().values()):
            self.run(*inputs, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and count what it gives if it is wanted."""
        value = super().run_node(n)
        if n in self.sources:
            self.found.setdefault(n, Observed.nothing(value.shape[-1])).add(self._rows(value))
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
