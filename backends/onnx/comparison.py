"""Comparing an exported file with the program it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from graphwright.backends.onnx.noise import Gap, activation_error, difference, rounding_error, run
from graphwright.backends.onnx.runtime import Session
from graphwright.ir.arguments import argument
from graphwright.ir.errors import ExportError, InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import Dim, TensorType

# Flat tensors in the program's order, keyword arguments of the model, or one tensor.
ExampleInputs: TypeAlias = Sequence[torch.Tensor] | Mapping[str, Any] | torch.Tensor

# A right file differs from the program by no more than a small multiple of what disturbed rounding does to it. Of the
# largest difference that is a rough measure, of the mean square a steady one.
_LARGEST_MARGIN = 8.0
_SPREAD_MARGIN = 2.5
# What is added to every size for the second call; the first that the program takes.
_OFFSETS = (3, 1, 2, 5, -1, -2)
# Roundings to int8 in the runtime are not ours bit for bit, but of their size.
_ACTIVATION_MARGIN = 2.0


@dataclass(frozen=True)
class Difference:
    """How far one output is from the program's.

    Attributes:
        output: its name.
        sizes: the dimensions of the call: ``batch=3 sequence=10``.
        error: largest absolute and root mean square difference.
        tolerance: what rounding, and int8 activations if they were chosen, explain of both.
        scale: root mean square of the program's output.
    """

    output: str
    sizes: str
    error: Gap
    tolerance: Gap
    scale: float

    @property
    def is_within(self) -> bool:
        """Whether the error is explained."""
        return self.error.largest <= self.tolerance.largest and self.error.spread <= self.tolerance.spread


def compare(
    program: Program,
    session: Session,
    calls: Sequence[Sequence[torch.Tensor]],
    *,
    int8_activations: bool,
    tolerance: float | None,
) -> list[Difference]:
    """Run both on the same inputs.

    Args:
        program: the program.
        session: the file, opened.
        calls: flat inputs.
        int8_activations: whether the runtime was told to round activations of weight-only linears to int8.
        tolerance: largest absolute difference; measured when left out.

    Raises:
        ExportError: an output differs by more than its tolerance.
        BackendError: onnxruntime fails.
    """
    found: list[Difference] = []
    results_wanted = [run(program, inputs) for inputs in calls]
    # The last call is the largest: its rounding error serves for all.
    limits = _limits(program, calls[-1], results_wanted[-1], int8_activations, tolerance)
    for inputs, wanted in zip(calls, results_wanted, strict=True):
        sizes = " ".join(f"{name}={size}" for name, size in sizes_of_call(program, inputs).items())
        results = session.run(inputs)
        for name, one, other, limit in zip(session.output_names, wanted, results, limits, strict=True):
            scale = float(one.double().pow(2).mean().sqrt()) if isinstance(one, torch.Tensor) and one.numel() else 0.0
            found.append(Difference(name, sizes, difference(_tensor(one), other), limit, scale))
    refuse_unexplained(found)
    return found


def refuse_unexplained(found: Sequence[Difference]) -> None:
    """Refuse a file one of whose outputs is further from the program's than is explained.

    Raises:
        ExportError: names the first such output.
    """
    for each in found:
        if not each.is_within:
            raise ExportError(
                f"the exported file is {each.error.largest:.3g} from the program (root mean square "
                f"{each.error.spread:.3g}); rounding explains {each.tolerance.largest:.3g} and "
                f"{each.tolerance.spread:.3g}",
                where=f"output {each.output!r}, {each.sizes or 'fixed sizes'}",
                hint="this is a fault of the export or of the runtime; nothing was written",
            )


def tolerance_of(rounding: Gap, activations: Gap | None) -> Gap:
    """What disturbed rounding, and int8 activations if they were chosen, explain.

    Args:
        rounding: what disturbed rounding did to the program's output.
        activations: what int8 activations did to it.
    """
    limit = Gap(_LARGEST_MARGIN * rounding.largest, _SPREAD_MARGIN * rounding.spread)
    if activations is None:
        return limit
    return Gap(
        limit.largest + _ACTIVATION_MARGIN * activations.largest,
        limit.spread + _ACTIVATION_MARGIN * activations.spread,
    )


def _limits(
    program: Program,
    inputs: Sequence[torch.Tensor],
    wanted: Sequence[Any],
    int8_activations: bool,
    tolerance: float | None,
) -> list[Gap]:
    if tolerance is not None:
        return [Gap(tolerance, tolerance)] * len(wanted)
    rounding = rounding_error(program, inputs, wanted)
    rounded = activation_error(program, inputs, wanted) if int8_activations else [None] * len(wanted)
    return [tolerance_of(one, other) for one, other in zip(rounding, rounded, strict=True)]


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def sizes_of_call(program: Program, inputs: Sequence[torch.Tensor]) -> dict[str, int]:
    """The size of each named dimension in a call."""
    sizes: dict[str, int] = {}
    for node, value in zip(program.inputs, inputs, strict=True):
        kind = program.type_of(node)
        if isinstance(kind, TensorType):
            sizes.update({name: int(size) for name, size in zip(kind.shape, value.shape) if isinstance(name, str)})
    return sizes


def check_calls(program: Program, examples: ExampleInputs | None) -> list[list[torch.Tensor]]:
    """Inputs to compare on: the examples, and the same at other sizes with padding where an input is a mask.

    Raises:
        InputError: the examples do not fit the program.
    """
    first = _made_up(program) if examples is None else flat_examples(program, examples)
    program.check_inputs(first)
    sizes = sizes_of_call(program, first)
    for offset in _OFFSETS if sizes else ():
        other = {name: size + offset for name, size in sizes.items()}
        resized = [_resize(program, node, value, other) for node, value in zip(program.inputs, first, strict=True)]
        try:
            program.check_inputs(resized)
        except InputError:
            continue  # a limit of the model, or a condition on its sizes
        return [first, resized]
    return [first]


def flat_examples(program: Program, examples: ExampleInputs) -> list[torch.Tensor]:
    """Examples as flat tensors in the program's order.

    Raises:
        InputError: they do not fit the program.
    """
    if isinstance(examples, torch.Tensor):
        return program.signature.flatten((examples,), {})
    if isinstance(examples, Mapping):
        return program.signature.flatten((), dict(examples))
    if len(examples) != len(program.inputs):
        raise InputError(
            f"there are {len(examples)} tensors, the program takes {len(program.inputs)}",
            where="argument 'example_inputs'",
            hint=f"its inputs are {', '.join(program.signature.names)}",
        )
    return list(examples)


def _resize(program: Program, node: fx.Node, value: torch.Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
    kind = program.type_of(node)
    assert isinstance(kind, TensorType)
    resized = value
    for axis, size in enumerate(kind.shape):
        if isinstance(size, str):
            resized = resized.index_select(axis, torch.arange(max(sizes[size], 0)) % max(resized.shape[axis], 1))
    if "mask" in str(node.target) and resized.dim() == 2 and resized.shape[1] > 2 and _is_binary(resized):
        resized = resized.clone()
        resized[::2, -(resized.shape[1] // 3) :] = 0
    return resized


def _is_binary(value: torch.Tensor) -> bool:
    return value.dtype == torch.bool or (
        not value.is_floating_point() and bool(((value == 0) | (value == 1)).all().item())
    )


def _made_up(program: Program) -> list[torch.Tensor]:
    """Inputs from the program's types alone: indices within every table they are looked up in, ones, normals."""
    generator = torch.Generator().manual_seed(0)
    # Different sizes, so that a mix-up of dimensions shows.
    sizes = {name: _admitted(dim, 3 + 2 * index) for index, (name, dim) in enumerate(program.dims.items())}
    inputs: list[torch.Tensor] = []
    for node in program.inputs:
        kind = program.type_of(node)
        if not isinstance(kind, TensorType):
            raise InputError("is not a tensor", where=f"input {node.target!r}")
        shape = [size if isinstance(size, int) else sizes[size] for size in kind.shape]
        rows = table_rows(program, node)
        if kind.dtype.is_floating_point:
            inputs.append(torch.randn(shape, generator=generator).to(kind.dtype))
        elif rows is not None:
            inputs.append(torch.randint(0, rows, shape, generator=generator).to(kind.dtype))
        else:
            inputs.append(torch.ones(shape, dtype=kind.dtype))
    return inputs


def _admitted(dim: Dim, size: int) -> int:
    size = max(size, dim.min)
    return size if dim.max is None else min(size, dim.max)


def table_rows(program: Program, node: fx.Node) -> int | None:
    """Rows of the smallest embedding table that an input is looked up in; ``None`` when it is looked up in none."""
    rows: list[int] = []
    for user in node.users:
        table = {"aten.embedding": "weight", "graphwright.embedding_nbits": "qweight"}.get(op_name(user))
        if table is not None and argument(user, "indices") is node:
            rows.append(int(program.tensor(argument(user, table)).shape[0]))
    return min(rows) if rows else None
