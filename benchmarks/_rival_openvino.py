"""OpenVINO, in its own process: ONNX models in fp32, or in INT8 as NNCF quantises them after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
from _rival_worker import Call, serve


def load(request: dict[str, Any]) -> Call:
    """``model`` (ONNX), ``inputs`` (npz), ``threads``; for INT8 ``int8`` (made there) and ``samples``; ``hint``."""
    core = openvino.Core()
    model = core.read_model(request["model"])
    if "int8" in request:
        target = Path(request["int8"])
        if not target.exists():
            samples = dict(np.load(request["samples"]))
            count = len(samples["input_ids"])
            each = [{name: value[i : i + 1] for name, value in samples.items()} for i in range(count)]
            quantized = nncf.quantize(
                model, nncf.Dataset(each), model_type=nncf.ModelType.TRANSFORMER, subset_size=count
            )
            openvino.save_model(quantized, target, compress_to_fp16=False)
        model = core.read_model(target)
    inputs = dict(np.load(request["inputs"]))
    model.reshape({name: list(value.shape) for name, value in inputs.items()})
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": request["threads"]}
    if "hint" in request:
        settings["INFERENCE_PRECISION_HINT"] = request["hint"]
    compiled = core.compile_model(model, "CPU", settings)
    infer = compiled.create_infer_request()
    return lambda: infer.infer(inputs)[compiled.output(0)]


if __name__ == "__main__":
    serve(load)
