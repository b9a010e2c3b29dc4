"""Export to ONNX, checked in onnxruntime."""

from __future__ import annotations

from graphwright.backends.onnx.executable import OnnxBackend as OnnxBackend
from graphwright.backends.onnx.export import export_onnx as export_onnx
from graphwright.backends.onnx.genai import export_genai as export_genai
from graphwright.backends.onnx.genai import genai_config as genai_config
from graphwright.backends.onnx.kernels import KernelTable as KernelTable
from graphwright.backends.onnx.kernels import explain as explain
from graphwright.backends.onnx.report import OnnxExport as OnnxExport
