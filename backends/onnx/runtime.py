"""onnxruntime: opening a file, running it, reading the graph it really runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from graphwright.ir.errors import BackendError, ExportError

# What onnxruntime computes fused DequantizeLinear + MatMul with; by default it takes 4, int8 activations.
_ACCURACY_KEY = "session.qdq_matmulnbits_accuracy_level"
_OPTIMIZED = "optimized.onnx"


class Session:
    """An open model.

    Attributes:
        output_names: its outputs in order.
        optimized: the graph that runs, without weights; ``None`` unless it was asked for.
    """

    def __init__(self, session: Any, optimized: onnx.ModelProto | None) -> None:
        self._session = session
        self.input_names = [each.name for each in session.get_inputs()]
        self.output_names = [each.name for each in session.get_outputs()]
        self.optimized = optimized

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run on inputs in the model's order.

        Raises:
            BackendError: onnxruntime fails on them.
        """
        feed = {name: _array(value) for name, value in zip(self.input_names, inputs, strict=True)}
        try:
            results = self._session.run(None, feed)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise BackendError(f"onnxruntime failed: {_first_line(error)}") from error
        return [torch.from_numpy(np.ascontiguousarray(result)).reshape(result.shape) for result in results]


def open_session(
    path: Path, *, accuracy_level: int | None = None, threads: int | None = None, keep_optimized: bool = False
) -> Session:
    """Open a model on the CPU with every optimisation of onnxruntime.

    Args:
        path: ONNX file.
        accuracy_level: for ``DequantizeLinear -> MatMul`` that is fused: 1 float, 4 int8 activations; onnxruntime's own
            choice (4) when left out.
        threads: inside one operator; torch's number when left out.
        keep_optimized: also read back the optimised graph.

    Raises:
        BackendError: onnxruntime is not installed.
        ExportError: it refuses the file.
    """
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if accuracy_level is not None:
        options.add_session_config_entry(_ACCURACY_KEY, str(accuracy_level))
    if not keep_optimized:
        return Session(_open(runtime, path, options), None)
    with tempfile.TemporaryDirectory(prefix=".optimized.", dir=path.parent) as folder:
        target = os.path.join(folder, _OPTIMIZED)
        options.optimized_model_filepath = target
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "64")
        session = _open(runtime, path, options)
        return Session(session, onnx.load(target, load_external_data=False))


def versions() -> Mapping[str, str]:
    """Versions of what an export depends on."""
    import onnx_ir

    return {"onnxruntime": str(_onnxruntime().__version__), "onnx": onnx.__version__, "onnx_ir": onnx_ir.__version__}


def _open(runtime: Any, path: Path, options: Any) -> Any:
    try:
        return runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise ExportError(
            f"onnxruntime does not open the file: {_first_line(error)}",
            where=str(path),
            hint="its CPU kernels take float32 best; a bfloat16 program is exported after .float(), "
            "a decoder when it is loaded with dtype='float32'",
        ) from error


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "onnxruntime is not installed", hint="pip install 'graphwright[onnx]', or export with check=False"
        ) from error
    return onnxruntime


def _array(value: torch.Tensor) -> Any:
    return value.detach().cpu().contiguous().numpy()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
