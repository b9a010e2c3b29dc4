"""Running a program in onnxruntime, as a backend."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import fx

from graphwright.backends.executable import Backend, Executable, KernelUse, need_device
from graphwright.backends.onnx.export import export_onnx
from graphwright.backends.onnx.kernels import label, note_of, unpacked_weights
from graphwright.backends.onnx.runtime import Session, open_session
from graphwright.backends.onnx.session import OnnxSession, run_step
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.types import ScalarType


class OnnxExecutable(Executable):
    """A program exported, checked and opened in onnxruntime; a decoding step is called like any other program.

    Attributes:
        optimized: the graph that runs, without weights.
    """

    def __init__(self, program: Program, session: Session, optimized: onnx.ModelProto) -> None:
        self._session, self._program = session, program
        layout = DecoderLayout.find(program)
        self._is_decoder, self._is_switched = layout is not None, layout is not None and layout.adapters > 0
        self._numbers = [_is_number(program, item) for item in _results(program)]
        self.optimized = optimized

    def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run on flat inputs; gives flat outputs, without gradients.

        Raises:
            BackendError: onnxruntime fails on them.
            InputError: an input is not on the CPU.
        """
        need_device(self._program, inputs, self.device)
        if self._is_decoder:
            tokens, slots, starts, rows, *caches = inputs
            weights = [caches.pop()] if self._is_switched else []
            written = [cache.clone() for cache in caches]
            logits = run_step(self._session, tokens, slots, starts, rows, written, weights)
            return (logits, *written)
        results = self._session.run(inputs)
        return tuple(value.item() if number else value for value, number in zip(results, self._numbers, strict=True))

    def explain(self) -> list[KernelUse]:
        """The runtime's nodes by name; names begin with the module path."""
        unpacked = unpacked_weights(self.optimized.graph)
        return [
            KernelUse(node.name, node.name.rpartition("/")[0], node.op_type, label(node), note_of(node, unpacked))
            for node in self.optimized.graph.node
        ]

    def session(self, *, slots: int = 1, capacity: int = 2048, cache: str = "float32") -> OnnxSession:
        """Decoding in onnxruntime; caches have the model's dtype."""
        if cache != "float32":
            raise InputError(f"onnxruntime keeps no caches in {cache!r}", where="session", hint="use target='cpu'")
        return OnnxSession(self._program, self._session, slots=slots, capacity=capacity)


class OnnxBackend(Backend):
    """onnxruntime on the CPU.

    Args:
        accuracy_level: see :func:`~graphwright.backends.onnx.export_onnx`.
    """

    name = "onnx"

    def __init__(self, *, accuracy_level: int = 1) -> None:
        self.accuracy_level = accuracy_level

    def lower(self, program: Program) -> OnnxExecutable:
        """Export to a temporary file, check it and open it.

        Raises:
            ExportError: the program cannot be exported, or the check fails.
            BackendError: onnxruntime is not installed.
        """
        with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
            path = Path(folder) / "program.onnx"
            export_onnx(program, path, accuracy_level=self.accuracy_level, logits="rows")
            session = open_session(path, keep_optimized=True)
        assert session.optimized is not None
        return OnnxExecutable(program, session, session.optimized)


def _results(program: Program) -> tuple[Any, ...]:
    results: Any = program.output.args[0]
    return tuple(results)


def _is_number(program: Program, item: Any) -> bool:
    return not isinstance(item, fx.Node) or isinstance(program.type_of(item), ScalarType)
