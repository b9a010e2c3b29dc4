"""Operators that leave the elements as they are: reshapes, copies, changes of dtype."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphwright.backends.onnx.lowering import Lowering


def view(lower: Lowering, node: fx.Node, x: fx.Node, *arguments: Any) -> None:
    """Another shape of the same elements; the shape is the one torch has inferred."""
    del arguments
    lower.set_elements(node, lower.elements(x))


def same(lower: Lowering, node: fx.Node, x: fx.Node, *arguments: Any) -> None:
    """The same value, cast when the dtype differs."""
    del arguments
    if lower.dtype(node) == lower.dtype(x):
        lower.set_elements(node, lower.elements(x))
        return
    lower.set_elements(node, lower.deferred(lambda: (lower.shape(node), lower.tensor(x, lower.dtype(node)))))


def dropout(lower: Lowering, node: fx.Node, x: fx.Node, p: float, train: bool) -> None:
    """Nothing, outside training.

    Raises:
        ExportError: the program was traced in training mode.
    """
    if train and p > 0:
        raise lower.refuse(node, "dropout in training mode cannot be exported", "trace the model in eval mode")
    lower.set_elements(node, lower.elements(x))
