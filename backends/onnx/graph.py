"""Building an ONNX graph: nodes with readable names, each constant and each weight once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

CONTRIB = "com.microsoft"

Array = npt.NDArray[Any]


class GraphBuilder:
    """Collects the nodes and initialisers of one ONNX graph.

    Weights are referenced, not copied: a contiguous tensor is wrapped, any other layout is computed when the file is
    written, one tensor at a time.

    Attributes:
        nodes: in execution order.
        initializers: constants and weights by name, in order of first use.
        scope: prefix for names of new nodes, such as a module path.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.scope = ""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._names: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """The name, with a number when it is taken."""
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if count == 0 else self.unique(f"{name}_{count}")

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> ir.Value:
        """A graph input."""
        return ir.Value(
            name=self.unique(name), type=ir.TensorType(from_torch_dtype(dtype)), shape=ir.Shape(list(shape))
        )

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def call(
        self, op: str, *inputs: ir.Value | None, domain: str = "", output: str = "", **attributes: Any
    ) -> ir.Value:
        """A node with one output; ``None`` stands for an operand left out."""
        return self.call_many(op, *inputs, count=1, domain=domain, output=output, **attributes)[0]

    def call_many(
        self,
        op: str,
        *inputs: ir.Value | None,
        count: int,
        domain: str = "",
        output: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """A node with several outputs."""
        name = self.unique(f"{self.scope}/{op}" if self.scope else op)
        operands = list(inputs)
        while operands and operands[-1] is None:
            operands.pop()
        names = [self.unique(output if output and index == 0 else f"{name}:{index}") for index in range(count)]
        outputs = [ir.Value(name=each) for each in names]
        kept = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(ir.node(op, operands, kept, domain=domain, outputs=outputs, name=name))
        return tuple(outputs)

    # -- constants and weights -----------------------------------------------------------------------------------------

    def constant(self, value: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """A small constant; equal ones are shared."""
        array: Array
        if dtype is not None:
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            return self._constant_tensor(tensor.to(dtype))
        array = np.asarray(value)
        return self._constant_tensor(torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)))

    def _constant_tensor(self, tensor: torch.Tensor) -> ir.Value:
        data = tensor.detach().cpu().contiguous().clone()
        wrapped = TorchTensor(data)
        key = (str(data.dtype), tuple(data.shape), wrapped.tobytes())
        if key not in self._constants:
            wrapped.name = self.unique("constant")
            self._constants[key] = self._initializer(wrapped.name, wrapped, data.dtype, tuple(data.shape))
        return self._constants[key]

    def integers(self, *values: int) -> ir.Value:
        """A one-dimensional int64 constant, such as axes or a shape."""
        return self.constant(torch.tensor(values, dtype=torch.int64))

    def weight(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """The initialiser of a program's weight, under its own name, made on first use."""
        if name in self.initializers:
            return self.initializers[name]
        if tensor.is_contiguous() and tensor.device.type == "cpu":
            value: ir.TensorProtocol = TorchTensor(tensor.detach(), name=name)
            self._names.setdefault(name, 1)
            return self._initializer(name, value, tensor.dtype, tuple(tensor.shape))
        return self.derived(name, tensor.dtype, tuple(tensor.shape), lambda: tensor.detach().cpu().contiguous())

    def derived(
        self,
        name: str,
        dtype: torch.dtype | ir.DataType,
        shape: Sequence[int],
        make: Callable[[], torch.Tensor],
    ) -> ir.Value:
        """An initialiser whose content is computed from weights when the file is written.

        Args:
            name: initialiser name; an existing one of this name is returned.
            dtype: element type. For 4-bit types ``make`` gives the packed bytes.
            shape: logical shape.
            make: computes the content.
        """
        if name in self.initializers:
            return self.initializers[name]
        kind = dtype if isinstance(dtype, ir.DataType) else from_torch_dtype(dtype)

        def tensor() -> ir.TensorProtocol:
            made = make().contiguous()
            if isinstance(dtype, torch.dtype):
                return TorchTensor(made, name=name)
            return ir.PackedTensor(made.flatten().numpy(), kind, shape=ir.Shape(list(shape)), name=name)

        self._names.setdefault(name, 1)
        lazy = ir.LazyTensor(tensor, kind, ir.Shape(list(shape)), name=name)
        return self._initializer(name, lazy, kind, tuple(shape))

    def _initializer(
        self, name: str, content: ir.TensorProtocol, dtype: torch.dtype | ir.DataType, shape: tuple[int, ...]
    ) -> ir.Value:
        kind = dtype if isinstance(dtype, ir.DataType) else from_torch_dtype(dtype)
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(list(shape)), const_value=content)
        self.initializers[name] = value
        return value
