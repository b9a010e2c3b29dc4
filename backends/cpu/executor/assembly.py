"""A lowered program as instructions of the executor."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphwright.backends.cpu.executor.caches import ATTENTION, CacheStep, cache_step
from graphwright.backends.cpu.executor.python_calls import call_of
from graphwright.backends.cpu.executor.sizes import Size, shape_code, size_code
from graphwright.backends.cpu.kernels import Kernel
from graphwright.backends.cpu.lowering import Lowered
from graphwright.backends.executable import KernelUse
from graphwright.ir import ops
from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import BackendError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.types import ScalarType, TensorType

if TYPE_CHECKING:
    from graphwright.backends.cpu import _native

# Values of these operators are the same numbers in another shape or order.
_SAME = {"aten.alias", "aten.clone", "aten.contiguous", "aten.detach", "aten.to.dtype", "aten._to_copy"}
_RESHAPES = {
    "aten._unsafe_view",
    "aten.flatten.using_ints",
    "aten.reshape",
    "aten.squeeze.dim",
    "aten.unsqueeze",
    "aten.view",
}
_NOTHING = {"aten._assert_tensor_metadata"}


@dataclass(frozen=True)
class Assembled:
    """Instructions and the values around them.

    Attributes:
        executor: the instructions.
        inputs: graph inputs that each call gives, in order.
        bound: the numbers of values that are bound once, by graph input; an int8 cache's scales by its name with
            ``.scales`` after it.
        steps: for each instruction the node it stands for.
        uses: what runs for every node, for ``explain()``.
    """

    executor: _native.Executor
    inputs: tuple[str, ...]
    bound: dict[str, int]
    steps: tuple[str, ...]
    uses: tuple[KernelUse, ...]


def assemble_step(program: Program, lowered: Lowered, isa: str, cache: str) -> Assembled:
    """A decoding step as instructions.

    Args:
        program: the step.
        lowered: its kernels.
        isa: instruction set of the kernels.
        cache: how keys and values are stored: ``"float32"``, ``"bfloat16"`` or ``"int8"``.

    Raises:
        BackendError: values, sizes or caches are of a kind that the executor has not.
    """
    return _Assembly(program, lowered, isa, cache).assembled()


class _Assembly:
    def __init__(self, program: Program, lowered: Lowered, isa: str, cache: str) -> None:
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self.native, self.program, self.lowered, self.isa, self.cache = _native, program, lowered, isa, cache
        self.symbols = {name: index for index, name in enumerate(program.dims)}
        self.executor = _native.Executor(len(self.symbols))
        self.values: dict[fx.Node, int] = {}
        self.constants: dict[str, int] = {}
        self.bound: dict[str, int] = {}
        self.inputs: list[str] = []
        self.steps: list[str] = []
        self.uses = {use.node: use for use in lowered.uses}
        self.cache_steps = {
            node: cache_step(node)
            for node in program.nodes
            if node.op == "call_function" and op_name(node) == ATTENTION
        }
        self.caches = {each: step for step in self.cache_steps.values() for each in (step.keys, step.values)}
        self.absorbed = {node for step in self.cache_steps.values() for node in step.absorbed} | lowered.absorbed

    def assembled(self) -> Assembled:
        for node in self.program.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "call_function" and node not in self.absorbed and node not in self.values:
                self._call(node)
        results: Any = self.program.output.args[0]
        for each in results:
            if each not in self.absorbed:  # caches are written where they are
                self.executor.output(self._value(each))
        ordered = tuple(self.uses[node.name] for node in self.program.nodes if node.name in self.uses)
        return Assembled(self.executor, tuple(self.inputs), self.bound, tuple(self.steps), ordered)

    # -- values --------------------------------------------------------------------------------------------------------

    def _input(self, node: fx.Node) -> None:
        name, shape = str(node.target), self._shape(node)
        if node in self.caches:
            self.bound[name] = self.values[node] = self.executor.bound(self.cache, shape)
            if self.cache == "int8":
                self.bound[f"{name}.scales"] = self.executor.bound("float32", shape[:3])
            return
        self.inputs.append(name)
        self.values[node] = self.executor.input(self._element(node), shape)

    def _value(self, node: fx.Node) -> int:
        if node not in self.values and node.op == "get_attr":
            tensor = self.program.tensor(node).detach()
            if tensor.dtype == torch.float64:
                raise BackendError("has float64 constants; the executor computes in float32", where=f"%{node.name}")
            plain = (
                tensor.float() if tensor.is_floating_point() else tensor.to(_INTEGERS.get(tensor.dtype, torch.int64))
            )
            self.values[node] = self.executor.constant(plain.contiguous().numpy())
        if node not in self.values:
            raise BackendError(f"reads %{node.name}, which the executor does not have", where="executor")
        return self.values[node]

    def _kind(self, node: fx.Node) -> TensorType:
        kind = self.program.type_of(node)
        if not isinstance(kind, TensorType):
            raise BackendError(f"has a value that is no tensor but {kind}", where=f"node %{node.name}")
        return kind

    def _shape(self, node: fx.Node) -> list[Size]:
        return shape_code(self._kind(node).shape, self.symbols)

    def _element(self, node: fx.Node) -> str:
        """Floats are float32 whatever the program has, so that nothing is rounded between kernels."""
        dtype = self._kind(node).dtype
        if dtype == torch.float64 or dtype.is_complex:
            raise BackendError(f"has {dtype} values; the executor computes in float32", where=f"node %{node.name}")
        return "float32" if dtype.is_floating_point else _INTEGER_NAMES.get(dtype, "int64")

    def _buffer(self, node: fx.Node) -> int:
        return self.executor.buffer(self._element(node), self._shape(node))

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> None:
        name = op_name(node)
        call = self.lowered.calls.get(node)
        if node in self.cache_steps:
            self._attend(self.cache_steps[node])
        elif call is not None:
            self._kernel(node, call.kernel, call.inputs, call.gives or (node,))
        elif name in _NOTHING:
            self._used(node, "nothing to do")
        elif isinstance(self.program.type_of(node), ScalarType):
            self._used(node, "size, known beforehand")
        elif not self._view(node, name) and not self._small(node, name):
            self._python(node, node.target, node.args, node.kwargs, self._results(node))  # type: ignore[arg-type]

    def _add(
        self, node: fx.Node, instruction: _native.Instruction, inputs: Sequence[int], outputs: Sequence[int]
    ) -> None:
        self.executor.add_step(instruction, [*inputs, *outputs], len(inputs))
        self.steps.append(node.name)

    def _kernel(self, node: fx.Node, kernel: Kernel, inputs: Sequence[Any], gives: Sequence[fx.Node]) -> None:
        made = kernel.step(tuple(self._shape_of(each) for each in inputs), self._kind(gives[0]).shape)
        if made is None:
            self._python(node, kernel, inputs, {}, gives)
            return
        operands = [-1 if each is None else self._value(each) for each in made.order(inputs)]
        results = [self._buffer(each) for each in gives]
        self.values.update(zip(gives, results, strict=True))
        self._add(node, made.instruction, operands, [*results, *[-1] * (made.outputs - len(results))])

    def _shape_of(self, value: Any) -> tuple[int | str, ...] | None:
        return self._kind(value).shape if isinstance(value, fx.Node) else None

    def _attend(self, step: CacheStep) -> None:
        node, given = step.attention, arguments_of(step.attention)
        slopes = given["slopes"]
        if slopes is not None and slopes.op != "get_attr":
            raise BackendError(
                "has computed slopes", where=f"node %{node.name}", hint="run Cleanup, which folds constants"
            )
        instruction = self.native.DecoderAttention(
            self.isa,
            given["scale"],
            given["window"],
            given["softcap"],
            None if slopes is None else self.program.tensor(slopes).detach().float().contiguous().numpy(),
            step.interleaved,
        )
        scales = [self.bound.get(f"{cache.target}.scales", -1) for cache in (step.keys, step.values)]
        operands = [
            *(self._value(each) for each in (step.query, step.key, step.value)),
            *(-1 if each is None else self._value(each) for each in (step.cos, step.sin)),
            *(self._value(each) for each in (step.keys, step.values)),
            *scales,
            *(self._value(each) for each in (step.slots, step.starts)),
        ]
        # By position in memory, so that joining the heads is a view.
        batch, heads, length, width = self._shape(node)
        buffer = self.executor.buffer("float32", [batch, length, heads, width])
        self.values[node] = self.executor.permute(buffer, [0, 2, 1, 3])
        self._add(node, instruction, operands, [self.values[node]])
        label = f"decoder_attention {instruction.isa}, {self.cache} cache"
        self._used(node, label)
        for each in (*step.appends, *(step.absorbed - set(step.appends))):
            self._used(each, f"part of {label}")

    def _view(self, node: fx.Node, name: str) -> bool:
        """Nodes that only say how values are seen."""
        given = arguments_of(node)
        if name in _SAME:
            source = given["self"]
            if self._element(source) != self._element(node):
                return False
            self.values[node] = self._value(source)
        elif name in _RESHAPES:
            self.values[node] = self.executor.reshape(self._value(given["self"]), self._shape(node))
        elif name == "aten.transpose.int":
            axes = list(range(len(self._kind(node).shape)))
            a, b = (given[key] % len(axes) for key in ("dim0", "dim1"))
            axes[a], axes[b] = axes[b], axes[a]
            self.values[node] = self.executor.permute(self._value(given["self"]), axes)
        elif name == "aten.permute":
            count = len(self._kind(node).shape)
            self.values[node] = self.executor.permute(
                self._value(given["self"]), [axis % count for axis in given["dims"]]
            )
        elif name == "aten.slice.Tensor":
            return self._slice(node, given)
        elif name == "aten.split_with_sizes":
            self._split(node, given)
        else:
            return False
        self._used(node, "view")
        return True

    def _slice(self, node: fx.Node, given: dict[str, Any]) -> bool:
        source, start = given["self"], 0 if given["start"] is None else given["start"]
        if given["step"] != 1 or not isinstance(start, int):
            return False
        shape, whole = self._kind(node).shape, self._kind(source).shape
        axis = given["dim"] % len(shape)
        if shape == whole:
            self.values[node] = self._value(source)
        else:
            begin: Size = [0, start] if start >= 0 else [*size_code(whole[axis], self.symbols), 0, start, 2]
            length = size_code(shape[axis], self.symbols)
            self.values[node] = self.executor.narrow(self._value(source), axis, begin, length)
        self._used(node, "view")
        return True

    def _split(self, node: fx.Node, given: dict[str, Any]) -> None:
        source, begin = given["self"], 0
        axis = given["dim"] % len(self._kind(source).shape)
        for index, size in enumerate(given["split_sizes"]):
            for user in node.users:
                if user.args[1] == index:
                    self.values[user] = self.executor.narrow(self._value(source), axis, [0, begin], [0, size])
                    self._used(user, "view")
            begin += size

    def _small(self, node: fx.Node, name: str) -> bool:
        """Arithmetic on positions, and rows that are wanted."""
        given = arguments_of(node)
        if name in ("aten.arange", "aten.arange.start", "aten.arange.default") and self._element(node) == "int64":
            start = given.get("start", 0)
            if not isinstance(start, int):
                return False
            self._small_step(node, self.native.Arange(start), [], "arange")
        elif name == "graphwright.select_rows":
            operands = [self._value(given["x"]), self._value(given["rows"])]
            self._small_step(node, self.native.SelectRows(), operands, "select_rows")
        elif name == "aten.where.self" and (self._element(given["condition"]), self._element(node)) == (
            "bool",
            "float32",
        ):
            operands = [self._value(given[each]) for each in ("condition", "self", "other")]
            self._small_step(node, self.native.Where(), operands, "where")
        elif name in ("aten.add.Tensor", "aten.mul.Tensor") and self._element(node) == "int64":
            a, b = given["self"], given["other"]
            is_plain = all(not isinstance(each, fx.Node) or self._element(each) == "int64" for each in (a, b))
            if (
                given.get("alpha", 1) != 1
                or not is_plain
                or not isinstance(a, fx.Node)
                or not isinstance(b, fx.Node | int)
            ):
                return False
            number = b if isinstance(b, int) else 0
            operation = self.native.IntegerOperation(name.split(".")[1], number)
            other = self._value(b) if isinstance(b, fx.Node) else -1
            self._small_step(node, operation, [self._value(a), other], f"integer {name.split('.')[1]}")
        else:
            return False
        return True

    def _small_step(self, node: fx.Node, instruction: _native.Instruction, operands: list[int], label: str) -> None:
        self.values[node] = self._buffer(node)
        self._add(node, instruction, operands, [self.values[node]])
        self._used(node, label)

    def _python(
        self,
        node: fx.Node,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        results: Sequence[fx.Node | None],
    ) -> None:
        inputs: dict[fx.Node, None] = {}
        fx.node.map_arg((tuple(args), dict(kwargs)), lambda each: inputs.setdefault(each, None))
        given = [
            each for each in inputs if each.op != "get_attr" and isinstance(self.program.type_of(each), TensorType)
        ]
        operands = [self._value(each) for each in given]
        buffers = [-1 if each is None else self._buffer(each) for each in results]
        self.values.update({each: buffer for each, buffer in zip(results, buffers, strict=True) if each is not None})
        call = self.native.PythonCall(call_of(self.program, function, args, kwargs, given, results))
        self._add(node, call, operands, buffers)
        if not isinstance(function, Kernel):
            kernel = "reference" if ops.is_dialect(node.target) else "torch"
            self._used(node, kernel, "the executor has no instruction for it: it calls PyTorch")

    def _results(self, node: fx.Node) -> list[fx.Node | None]:
        if isinstance(self.program.type_of(node), TensorType):
            return [node]
        parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        count = 1 + max((index for index in parts if isinstance(index, int)), default=-1)
        kind: Any = self.program.type_of(node)
        return [parts.get(index) for index in range(max(count, len(getattr(kind, "items", ()))))]

    def _used(self, node: fx.Node, kernel: str, reason: str = "") -> None:
        self.uses[node.name] = KernelUse(node.name, path_of(node), op_name(node), kernel, reason)


_INTEGERS = {torch.bool: torch.bool}
_INTEGER_NAMES = {torch.bool: "bool"}
