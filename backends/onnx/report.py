"""What an export wrote, and what was found when it was checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphwright.backends.onnx.comparison import Difference
from graphwright.backends.onnx.kernels import KernelTable
from graphwright.backends.onnx.options import ACCURACY_LEVELS

_INTEGER_PRODUCTS = frozenset({"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})


@dataclass(frozen=True)
class OnnxExport:
    """The result of an export; prints as a short report.

    Attributes:
        path: the model file.
        files: every file written.
        mode: ``"runtime"`` or ``"portable"``.
        opset: ONNX opset.
        accuracy_level: what weight-only quantised linears compute on.
        input_names: graph inputs.
        output_names: graph outputs.
        quantized: node of each quantised linear -> runtime operator that runs it; empty if unchecked.
        kernels: what runs, by count; ``None`` if unchecked.
        differences: per output and call, how far the file is from the program; empty if unchecked.
        sparse: names of weights that are stored as sparse initialisers.
        vnni: whether weights of integer products are signed, for processors with VNNI only.
    """

    path: Path
    files: tuple[Path, ...]
    mode: str
    opset: int
    accuracy_level: int
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    quantized: Mapping[str, str]
    kernels: KernelTable | None
    differences: tuple[Difference, ...]
    sparse: tuple[str, ...] = ()
    vnni: bool = False

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def error(self) -> float:
        """Largest absolute difference from the program."""
        return max((each.error.largest for each in self.differences), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "path": str(self.path),
            "files": [str(file) for file in self.files],
            "bytes": self.bytes,
            "mode": self.mode,
            "opset": self.opset,
            "accuracy_level": self.accuracy_level,
            "vnni": self.vnni,
            "inputs": list(self.input_names),
            "outputs": list(self.output_names),
            "quantized": dict(self.quantized),
            "sparse": list(self.sparse),
            "kernels": [{"kernel": row.kernel, "count": row.count, "note": row.note} for row in self.kernels or ()],
            "differences": [
                {
                    "output": each.output,
                    "sizes": each.sizes,
                    "error": each.error.largest,
                    "error_rms": each.error.spread,
                    "tolerance": each.tolerance.largest,
                    "tolerance_rms": each.tolerance.spread,
                    "values_rms": each.scale,
                }
                for each in self.differences
            ],
        }

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.bytes / 2**20:.1f} MiB, ONNX opset {self.opset}, {self.mode} mode"]
        if self.sparse:
            count = f"{len(self.sparse)} weight" + ("s" if len(self.sparse) > 1 else "")
            lines.append(f"{count} stored as sparse initialisers: onnxruntime makes them dense, they save no time")
        if self.kernels is None:
            return "\n".join([*lines, "not checked"])
        for each in self.differences:
            calls = f"{each.sizes}: " if each.sizes else ""
            lines.append(
                f"{each.output}: {calls}{each.error.spread:.2g} from the program, {each.error.largest:.2g} at most "
                f"(tolerance {each.tolerance.spread:.2g}, {each.tolerance.largest:.2g}; values about {each.scale:.2g})"
            )
        if self.quantized:
            lines.append(f"{len(self.quantized)} quantised linears, all on quantised weights:")
            kinds = sorted(set(self.quantized.values()))
            lines.append(f"  {', '.join(f'{list(self.quantized.values()).count(kind)} {kind}' for kind in kinds)}")
            if "MatMulNBits" in kinds:
                lines.append(f"  accuracy level {self.accuracy_level}: {ACCURACY_LEVELS[self.accuracy_level]}")
            if _INTEGER_PRODUCTS.intersection(kinds):
                lines.append(
                    "  INT8 weights are signed: right on processors with VNNI (or Arm) only"
                    if self.vnni
                    else "  INT8 weights are unsigned: right everywhere; vnni=True is faster on processors with VNNI"
                )
            if self.mode == "portable" and "MatMulNBits" in kinds:
                level = self.accuracy_level
                lines.append(
                    "  a portable file cannot hold the accuracy level: onnxruntime takes 4 (int8 activations) unless "
                    f"the session config has session.qdq_matmulnbits_accuracy_level={level}"
                )
        return "\n".join([*lines, str(self.kernels)])
