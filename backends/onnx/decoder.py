"""A decoding step as an ONNX graph with the signature that generation libraries feed.

======================================  ===================================  ==========================================
ONNX                                    shape                                the program's
======================================  ===================================  ==========================================
``input_ids`` int64                     ``[batch, sequence]``                ``input_ids``
``attention_mask`` int64                ``[batch, total sequence]``          gives ``starts`` and ``rows``
``past_key_values.{i}.key``, ``.value``  ``[batch, heads, past, head dim]``  caches, one row of the batch to a slot
``rows`` int64, for ``logits="rows"``   ``[batch, selected]``                ``rows``
``adapter_weights`` float32             ``[batch, adapters]``                the same, where it switches adapters
``logits``                              ``[batch, 1 or … , V]``              logits
``present.{i}.key``, ``.value``         ``[batch, heads, total, head dim]``  caches
======================================  ===================================  ==========================================

The mask counts what each row holds after the step: prompts of different lengths are filled up on the right (zeros in
the mask behind the last token), later steps bring one token for every row, or several for a batch of one. That is what
``GroupQueryAttention`` computes, whose own lengths are made of the mask in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import fx

from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.options import ExportOptions
from graphwright.backends.onnx.sizes import Size, Sizes
from graphwright.ir.decoder import ADAPTER_WEIGHTS, DecoderLayout
from graphwright.ir.errors import ExportError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program

PAST = {"keys": "past_key_values.{}.key", "values": "past_key_values.{}.value"}
PRESENT = {"keys": "present.{}.key", "values": "present.{}.value"}
_BATCH, _LENGTH, _SELECTED = "batch_size", "sequence_length", "selected_tokens"
_PAST, _TOTAL = "past_sequence_length", "total_sequence_length"


@dataclass(frozen=True)
class Append:
    """New keys or values of one layer.

    Attributes:
        cache: the program's input they are written to.
        new: node that gives them, ``[B, H, S, D]``.
    """

    cache: fx.Node
    new: fx.Node


class DecoderLowering(Lowering):
    """Translates a decoding step.

    Attributes:
        layout: of the program.
        positions: how many there are; ``None`` for any number.
        last_lengths: int32 ``[batch]``: tokens of each row after the step, less one.
        total_length: int32 scalar: the largest number of tokens of a row after the step.
        selected: int64 ``[batch, 1 or selected]``: the tokens of the step whose logits are wanted; ``None`` for all.
    """

    def __init__(self, program: Program, options: ExportOptions, layout: DecoderLayout) -> None:
        super().__init__(program, options)
        self.layout = layout
        self.positions = _positions(layout, options)
        self.last_lengths: ir.Value
        self.total_length: ir.Value
        self.selected: ir.Value | None = None
        self._pasts: dict[fx.Node, ir.Value] = {}
        self._appends: dict[fx.Node, Append] = {}
        self._presents: dict[fx.Node, ir.Value] = {}
        self._known: dict[Size, Size] = {}

    # -- inputs --------------------------------------------------------------------------------------------------------

    def add_inputs(self) -> None:
        """``input_ids``, ``attention_mask`` and the past; ``starts`` and ``rows`` are computed of the mask."""
        tokens, _, starts, rows, *caches = self.program.inputs
        weights = caches.pop() if self.layout.adapters else None
        ids = self.graph.input("input_ids", torch.int64, [_BATCH, _LENGTH])
        mask = self.graph.input("attention_mask", torch.int64, [_BATCH, _TOTAL])
        self.inputs.extend((ids, mask))
        self.sizes.add_input(ids, self.shape(tokens))
        self.set(tokens, ids)
        length, wanted = self.shape(tokens)[1], self.shape(rows)[1]
        last = self._count(mask, starts, length)
        if self.options.logits == "rows":
            self.selected = self.graph.input("rows", torch.int64, [_BATCH, _SELECTED])
            self.inputs.append(self.selected)
            self.sizes.add_input(self.selected, self.shape(rows))
        elif not isinstance(wanted, int):
            self._known[wanted] = 1 if self.options.logits == "last" else length
        if self.options.logits == "last":
            self.selected = last
        layers = self.layout.layers
        for layer in range(layers):
            for kind, node in (("keys", caches[layer]), ("values", caches[layers + layer])):
                _, heads, _, width = self.shape(node)
                shape = [_BATCH, heads, _PAST, width]
                value = self.graph.input(PAST[kind].format(layer), self.dtype(node), shape)
                self.inputs.append(value)
                self._pasts[node] = value
        if weights is not None:
            self._switch(weights)

    def _switch(self, weights: fx.Node) -> None:
        """The weights of adapters, as the step has them."""
        value = self.graph.input(ADAPTER_WEIGHTS, torch.float32, [_BATCH, self.layout.adapters])
        self.inputs.append(value)
        self.set(weights, value)

    def _count(self, mask: ir.Value, starts: fx.Node, length: Size) -> ir.Value:
        """Compute lengths of the mask; gives each row's last token of the step."""
        graph, new = self.graph, self.sizes.value(length)
        graph.scope = "lengths"
        one = graph.integers(1)
        held = graph.call("ReduceSum", mask, one, keepdims=0)
        last = graph.call("Sub", held, one)
        self.last_lengths = self._cast(last, torch.int32)
        total = graph.call("Squeeze", graph.call("Shape", mask, start=1, end=2), graph.integers(0))
        self.total_length = self._cast(total, torch.int32)
        # A prompt is filled up behind its end, so it may hold less than the step is long; later steps are not.
        self.set(starts, graph.call("Max", graph.call("Sub", held, new), graph.integers(0)))
        row = graph.call("Min", last, graph.call("Sub", new, one))
        rows = graph.call("Unsqueeze", row, one)
        graph.scope = ""
        return rows

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def shape(self, node: fx.Node) -> Sizes:
        """The shape of a node's value, with the number of rows of logits that this file gives."""
        return tuple(self._resolved(size) for size in super().shape(node))

    def size(self, node: fx.Node, value: Any) -> Size:
        """An integer argument as a size."""
        return self._resolved(super().size(node, value))

    def _resolved(self, size: Size) -> Size:
        if isinstance(size, int) or not self._known:
            return size
        if size not in self._known:
            found = size.subs(self._known)
            self._known[size] = int(found) if found.is_number else found
        return self._known[size]

    # -- caches --------------------------------------------------------------------------------------------------------

    def append(self, node: fx.Node, cache: fx.Node, new: fx.Node, slots: fx.Node, starts: fx.Node) -> None:
        """Note what a ``cache_append`` writes; the attention that reads it writes it.

        Raises:
            ExportError: the cache, slots or starts are not the step's.
        """
        self._check_step(node, slots, starts)
        if cache not in self._pasts:
            raise self.refuse(node, "appends to something other than a cache of the step")
        self._appends[node] = Append(cache, new)

    def appended(self, node: fx.Node, cache: fx.Node, slots: fx.Node, starts: fx.Node) -> Append:
        """What was appended to the cache that an attention reads.

        Raises:
            ExportError: the cache is read elsewhere too, or nothing was appended.
        """
        self._check_step(node, slots, starts)
        if cache not in self._appends:
            raise self.refuse(node, "reads a cache to which this step appends nothing", "GroupQueryAttention does both")
        if cache in self._presents:
            raise self.refuse(node, "reads the cache of another layer", "GroupQueryAttention reads only its own")
        return self._appends[cache]

    def past(self, append: Append) -> ir.Value:
        """The graph input of a cache."""
        return self._pasts[append.cache]

    def set_present(self, cache: fx.Node, value: ir.Value) -> None:
        """Set the graph output of a cache."""
        self._presents[cache] = value

    def _check_step(self, node: fx.Node, slots: fx.Node, starts: fx.Node) -> None:
        if [slots, starts] != self.program.inputs[1:3]:
            raise self.refuse(node, "uses slots or starts other than the step's")

    # -- outputs -------------------------------------------------------------------------------------------------------

    def outputs(self, output_names: Sequence[str]) -> list[ir.Value]:
        """``logits`` and the present of every layer."""
        del output_names
        results: Any = self.program.output.args[0]
        logits, *caches = results
        length = {"last": 1, "all": _LENGTH, "rows": _SELECTED}[self.options.logits]
        outputs = [self._named(self.tensor(logits), "logits", logits, [_BATCH, length, self.layout.vocabulary])]
        layers, inputs = self.layout.layers, self.layout.caches(self.program)
        for layer in range(layers):
            for kind, index in (("keys", layer), ("values", layers + layer)):
                name, cache = PRESENT[kind].format(layer), caches[index]
                if cache not in self._presents or self._appends[cache].cache is not inputs[index]:
                    raise ExportError(
                        f"the {kind} of layer {layer} are not those an attention of the step has read and written",
                        where=f"output {name!r} ({op_name(cache)} %{cache.name})",
                    )
                _, heads, _, width = self.shape(cache)
                outputs.append(self._named(self._presents[cache], name, cache, [_BATCH, heads, _TOTAL, width]))
        return outputs

    def _named(self, value: ir.Value, name: str, node: fx.Node, shape: list[Any]) -> ir.Value:
        if value.producer() is None:
            value = self.graph.call("Identity", value)
        value.name = self.graph.unique(name)
        value.type, value.shape = ir.TensorType(from_torch_dtype(self.dtype(node))), ir.Shape(shape)
        return value


def _positions(layout: DecoderLayout, options: ExportOptions) -> int | None:
    wanted, limit = options.context_length, layout.length
    if wanted is not None and limit is not None and wanted > limit:
        raise ExportError(
            f"the program has embeddings for {limit} positions, not for {wanted}",
            where="option 'context_length'",
            hint="if they come from PrepareDecoder, give it this length",
        )
    return limit if wanted is None else wanted
