"""OpenVINO, in its own process: one linear on compressed weights, activations quantised as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
from _rival_worker import Call, serve
from openvino import opset13 as ops


def load(request: dict[str, Any]) -> Callable[[int], Call]:
    """``weights`` (npz), ``copies`` of them, ``group`` of columns with a scale of the activations, ``threads``."""
    held = dict(np.load(request["weights"]))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": request["threads"],
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": request["group"],
    }
    core = openvino.Core()
    made = [core.compile_model(model(**held), "CPU", settings) for _ in range(request["copies"])]
    requests = [compiled.create_infer_request() for compiled in made]
    ready: set[int] = set()

    def with_rows(rows: int) -> Call:
        given, turn = openvino.Tensor(np.ascontiguousarray(held["x"][:rows])), 0
        for each in requests:
            each.set_input_tensor(given)
            if rows not in ready:  # each packs its weights in its first inference, which can take a hundred calls' time
                each.infer()
        ready.add(rows)

        def call() -> Any:
            nonlocal turn
            each = requests[turn]
            turn = (turn + 1) % len(requests)
            each.infer()
            return each.get_output_tensor().data

        return call

    return with_rows


def model(x: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> openvino.Model:
    """What the CPU plugin takes for one linear on compressed weights: ``codes`` of int8, or of uint8, two to a byte."""
    given = ops.parameter([-1, x.shape[1]], np.float32, name="x")
    # Constants copy what they are given. One that shares its memory outlives the array, and answers nonsense.
    if codes.dtype == np.int8:
        weight = ops.multiply(ops.convert(ops.constant(codes), "f32"), ops.constant(scales.reshape(-1, 1)))
    else:
        outputs, groups, half = codes.shape
        nibbles = openvino.Tensor(codes, openvino.Shape([outputs, groups, 2 * half]), openvino.Type.u4)
        zero = ops.convert(ops.constant(np.full((1, 1, 1), 8, np.uint8)), "f16")
        centred = ops.subtract(ops.convert(ops.constant(nibbles), "f16"), zero)
        grouped = ops.multiply(centred, ops.constant(scales.reshape(outputs, groups, 1)))
        weight = ops.convert(ops.reshape(grouped, np.array([outputs, x.shape[1]]), False), "f32")
    return openvino.Model([ops.matmul(given, weight, False, True)], [given], "linear")


if __name__ == "__main__":
    serve(load)
