"""What training takes, as a table in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphwright.passes.rendering.cells import size
from graphwright.passes.rendering.terminal import columns, plain_text

if TYPE_CHECKING:
    from graphwright.passes.training.memory import TrainingMemory


def render_memory(memory: TrainingMemory) -> str:
    """The table as plain text: with all activations kept, and with layers computed again."""
    layers = memory.kept_at_layers + memory.largest_layer
    rows = [
        *((name, size(number), size(number)) for name, number in _state(memory)),
        ("kept for the backward pass", size(memory.kept), size(memory.kept_at_layers)),
        ("largest layer, computed again", "", size(memory.largest_layer)),
        ("in all", size(memory.state + memory.kept), size(memory.state + layers)),
    ]
    shapes = ", ".join("[" + ", ".join(map(str, shape)) + "]" for shape in memory.shapes)
    heads = ["training takes", "all is kept", "layers are computed again"]
    heads[1 + memory.checkpointed] += " *"
    caption = f"* as the program is set; inputs: {shapes}"
    return plain_text(columns(memory.title, heads, rows, left=1, caption=caption))


def _state(memory: TrainingMemory) -> list[tuple[str, int]]:
    return [
        ("base weights", memory.base),
        ("adapters", memory.adapters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
    ]
