"""DeepSparse, in its own process."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from _rival_worker import Call, serve
from deepsparse import Engine


def load(request: dict[str, Any]) -> Call:
    """``model`` (ONNX), ``inputs`` (npz, in the model's order), ``threads``; ``copies`` of its weights take turns."""
    inputs = [np.ascontiguousarray(value) for value in np.load(request["inputs"]).values()]
    shapes = [list(value.shape) for value in inputs]
    engines = [
        Engine(request["model"], batch_size=len(inputs[0]), num_cores=request["threads"], input_shapes=shapes)
        for _ in range(request.get("copies", 1))
    ]
    turns = itertools.cycle(engines)
    return lambda: next(turns).run(inputs, val_inp=False)[0]


if __name__ == "__main__":
    serve(load)
