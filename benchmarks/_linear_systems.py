"""Linears as systems of a comparison: what multiplies, how it is timed, and onnxruntime's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from _rival_worker import timed
from onnx import TensorProto, helper, numpy_helper

from graphwright.backends.cpu import features

# Seconds between systems: idle threads of the one before go to sleep.
PAUSE = 0.1
ORT = f"onnxruntime {version('onnxruntime')}"
TORCH = f"torch {version('torch')}"
# Rows of a system's answer that are checked.
CHECKED_ROWS = 4


@dataclass
class System:
    """Something that multiplies some of the prepared rows: ``time`` gives the seconds of each call.

    ``fault`` says why it cannot be measured.
    """

    name: str
    bytes: int
    time: Callable[[int, float, float], list[float]]
    answer: Callable[[int], np.ndarray]
    drop: Callable[[], None] = lambda: None
    fault: str = ""
    times: list[float] = field(default_factory=list)


def here(name: str, size: int, x: np.ndarray, calls: list[Callable[[np.ndarray], Any]]) -> System:
    """A system in this process: a callable for each copy of its weights."""

    def time_it(rows: int, warm: float, seconds: float) -> list[float]:
        given, turn = x[:rows], 0

        def call() -> object:
            nonlocal turn
            turn = (turn + 1) % len(calls)
            return calls[turn](given)

        found: list[float] = timed(call, warm, seconds)
        return found

    return System(name, size, time_it, lambda rows: np.asarray(calls[0](x[:rows])))


def isa() -> str:
    """The instruction set in use."""
    found = features().selected
    assert found is not None, "the C++ kernels are not in this installation"
    return found


def onnx_session(model: onnx.ModelProto) -> Callable[[np.ndarray], Any]:
    """A call of an onnxruntime session."""
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False  # one pool for all copies, as one model would have
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def nbits_model(packed: torch.Tensor, scales: torch.Tensor, columns: int, group: int) -> onnx.ModelProto:
    """``MatMulNBits`` with int8 activations, symmetric."""
    outputs = len(packed)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=outputs,
        bits=4,
        block_size=group,
        accuracy_level=4,
    )
    weights = {"w": packed.numpy(), "s": scales.float().flatten().numpy()}
    return linear_model([node], weights, columns, outputs)


def linear_model(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], columns: int, outputs: int
) -> onnx.ModelProto:
    """A model of float rows `x` and `y` with these weights."""
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
