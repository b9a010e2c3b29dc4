"""Every ATen operator in the table, traced from a small function, exported and compared in onnxruntime."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphwright as gw
from graphwright.backends.onnx.translations import TRANSLATIONS
from graphwright.ir.names import op_name, resolve_target

aten = torch.ops.aten


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def floats(*shape: int) -> torch.Tensor:
    """Normal values away from zero, so that comparisons and roundings do not depend on the last bit."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def positive(*shape: int) -> torch.Tensor:
    return floats(*shape).abs() + 0.5


def integers(*shape: int, low: int = -5, high: int = 6) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(7))


def bools(*shape: int) -> torch.Tensor:
    return integers(*shape, low=0, high=2).bool()


X, Y = floats(3, 5, 8), floats(3, 5, 8) * 0.7 + 0.1

UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "abs": torch.abs,
    "acos": lambda x: torch.acos(torch.tanh(x)),
    "asin": lambda x: torch.asin(torch.tanh(x)),
    "atan": torch.atan,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "floor": torch.floor,
    "log": lambda x: torch.log(x.abs() + 0.5),
    "log1p": lambda x: torch.log1p(x.abs()),
    "log2": lambda x: torch.log2(x.abs() + 0.5),
    "neg": torch.neg,
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 0.5),
    "round": torch.round,
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.5),
    "sign": torch.sign,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "square": torch.square,
    "tan": lambda x: torch.tan(torch.tanh(x)),
    "tanh": torch.tanh,
    "trunc": torch.trunc,
    "isnan": lambda x: torch.isnan(x / x),
    "isinf": lambda x: torch.isinf(1 / x.floor()),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu6": lambda x: aten.relu6(x * 4),
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "elu": F.elu,
    "selu": lambda x: aten.elu(x, 1.67, 1.05, 1.0),
    "elu scaled": lambda x: aten.elu(x, 1.2, 1.1, 0.7),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": lambda x: F.hardtanh(x, -0.4, 0.3),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "softplus": F.softplus,
    "softplus beta": lambda x: F.softplus(x, beta=2.0),
    "dropout": lambda x: F.dropout(x, 0.5, training=False) * 2,
    "logical_not": lambda x: torch.logical_not(x > 0),
    "bitwise_not": lambda x: ~(x > 0),
    "bitwise_not integer": lambda x: ~x.to(torch.int32),
}

BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": lambda a, b: a + b,
    "add alpha": lambda a, b: torch.add(a, b, alpha=3),
    "add number": lambda a, b: a + 2,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: 2 - a * b,
    "rsub scalar": lambda a, b: aten.rsub.Scalar(a, 2.5),
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (b.abs() + 1),
    "div number": lambda a, b: a / 3,
    "div floor": lambda a, b: torch.div(a, b.abs() + 1, rounding_mode="floor"),
    "div trunc": lambda a, b: torch.div(a * 3, b.abs() + 1, rounding_mode="trunc"),
    "floor_divide": lambda a, b: (a * 3) // 2,
    "remainder": lambda a, b: torch.remainder(a * 3, b.abs() + 0.7),
    "fmod": lambda a, b: torch.fmod(a * 3, b.abs() + 0.7),
    "integer div floor": lambda a, b: torch.div((a * 9).long(), 4, rounding_mode="floor"),
    "integer div trunc": lambda a, b: torch.div((a * 9).long(), 4, rounding_mode="trunc"),
    "integer remainder": lambda a, b: (a * 9).long() % 4,
    "integer true div": lambda a, b: (a * 9).long() / 4,
    "pow 2": lambda a, b: a**2,
    "pow 3": lambda a, b: a**3,
    "pow half": lambda a, b: a.abs() ** 0.5,
    "pow -half": lambda a, b: (a.abs() + 1) ** -0.5,
    "pow -1": lambda a, b: (a.abs() + 1) ** -1,
    "pow 1": lambda a, b: (a**1) * 2,
    "pow other": lambda a, b: (a.abs() + 1) ** 1.3,
    "pow tensor": lambda a, b: (a.abs() + 1) ** b,
    "pow of number": lambda a, b: 2**b,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "max other": torch.max,
    "min other": torch.min,
    "eq": lambda a, b: a.round() == b.round(),
    "ne": lambda a, b: a.round() != b.round(),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "gt number": lambda a, b: a > 0.3,
    "integer against float": lambda a, b: a.long() < 0.5,
    "bool order": lambda a, b: (a > 0) < (b > 0),
    "logical_and": lambda a, b: torch.logical_and(a > 0, b > 0),
    "logical_or": lambda a, b: torch.logical_or(a > 0, b > 0),
    "logical_xor": lambda a, b: torch.logical_xor(a > 0, b > 0),
    "and": lambda a, b: (a > 0) & (b > 0),
    "or": lambda a, b: (a > 0) | (b > 0),
    "xor": lambda a, b: (a > 0) ^ (b > 0),
    "bitwise_and": lambda a, b: torch.bitwise_and((a * 9).int(), (b * 9).int()),
    "bitwise_or": lambda a, b: torch.bitwise_or((a * 9).int(), (b * 9).int()),
    "bool add": lambda a, b: (a > 0) + (b > 0),
    "bool mul": lambda a, b: (a > 0) * (b > 0),
    "mixed dtypes": lambda a, b: a + (b * 9).long(),
    "broadcast": lambda a, b: a + b[:1, :, :1],
    "where": lambda a, b: torch.where(a > 0, a, b),
    "where numbers": lambda a, b: torch.where(a > 0, 1.5, b),
    "where scalar other": lambda a, b: torch.where(a > 0, a, -2.0),
    "masked_fill": lambda a, b: a.masked_fill(b > 0, -3.0),
    "masked_fill tensor": lambda a, b: a.masked_fill(b > 0, torch.tensor(4.0)),
    "clamp": lambda a, b: a.clamp(-0.3, 0.4),
    "clamp min": lambda a, b: a.clamp(min=0.1),
    "clamp_max": lambda a, b: aten.clamp_max(a, 0.1),
    "clamp tensor": lambda a, b: torch.clamp(a, b, b + 1),
    "clamp_min": lambda a, b: aten.clamp_min(a, 0.1),
    "tril": lambda a, b: torch.tril(a),
    "triu": lambda a, b: torch.triu(a, 1),
    "tril bool": lambda a, b: torch.tril(a > 0, -1),
}

MOVES: dict[str, Callable[[torch.Tensor], Any]] = {
    "view": lambda x: x.view(x.shape[0], 5 * 8),
    "reshape": lambda x: x.transpose(0, 1).reshape(5, -1),
    "flatten": lambda x: x.flatten(1) * 2,
    "unflatten": lambda x: x.unflatten(-1, (2, 4)),
    "unsqueeze": lambda x: x[:, None, :, None] * 2,
    "squeeze": lambda x: x[:, :1].squeeze(1) * 2,
    "squeeze all": lambda x: x[:, :1, :1].squeeze() * 2,
    "squeeze dims": lambda x: x[:, :1, :1].squeeze((1, 2)) * 2,
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(2, 0, 1),
    "t": lambda x: x[0].t(),
    "numpy_T": lambda x: x[0].T,
    "movedim": lambda x: x.movedim(0, 2),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "expand": lambda x: x[:, :1].expand(-1, 4, -1),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "cat": lambda x: torch.cat((x, x * 2, x[..., :1].expand(-1, -1, 3)), -1),
    "stack": lambda x: torch.stack((x, x * 2), 1),
    "slice": lambda x: x[:, 1:4:2, -3:],
    "slice to symbol": lambda x: x[: x.shape[0] - 1],
    "select": lambda x: x[:, 2],
    "select last": lambda x: x[:, -1],
    "split": lambda x: x.split(3, -1),
    "split sizes": lambda x: x.split((1, 4), 1),
    "chunk": lambda x: x.chunk(2, -1),
    "unbind": lambda x: x.unbind(1),
    "narrow": lambda x: x.narrow(2, 1, 4),
    "repeat": lambda x: x.repeat(2, 1, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(3, 1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "pad constant": lambda x: aten.constant_pad_nd(x, (1, 2, 0, 1), 0.5),
    "pad reflect": lambda x: F.pad(x, (1, 2), mode="reflect"),
    "pad edge": lambda x: F.pad(x, (1, 2), mode="replicate"),
    "flip": lambda x: x.flip(0, 2),
    "roll": lambda x: x.roll((1, -2), (1, 2)),
    "contiguous": lambda x: x.transpose(0, 1).contiguous(),
    "clone": lambda x: x.clone() + 1,
    "view_as": lambda x: x.flatten(1).view_as(x.transpose(1, 2).flatten(1)) + 1,
    "to": lambda x: (x * 9).to(torch.int64),
    "to half and back": lambda x: x.double().float() * 2,
    "type_as": lambda x: (x > 0).type_as(x),
    "to bool": lambda x: x.round().bool(),
    "zeros": lambda x: x + torch.zeros(x.shape[0], 1, 8),
    "ones": lambda x: x + x.new_ones(8),
    "full": lambda x: x + torch.full((x.shape[0], 1, 1), 2.5),
    "zeros_like": lambda x: x + torch.zeros_like(x),
    "ones_like": lambda x: x + torch.ones_like(x),
    "full_like": lambda x: x + torch.full_like(x, 3),
    "new_full": lambda x: x + x.new_full((5, 1), 3),
    "new_zeros": lambda x: x + x.new_zeros(5, 1),
    "scalar_tensor": lambda x: x + torch.scalar_tensor(2.0),
    "arange": lambda x: x + torch.arange(x.shape[0])[:, None, None],
    "arange start": lambda x: x + torch.arange(1, 9),
    "arange step": lambda x: x + torch.arange(0.0, 4.0, 0.5),
    "constant": lambda x: x + torch.tensor([1.0, 2.0] * 4),
    "mean": lambda x: x.mean(1),
    "mean all": torch.mean,
    "mean keep": lambda x: x.mean((1, -1), keepdim=True),
    "sum": lambda x: x.sum(-1),
    "sum all": torch.sum,
    "sum of bools": lambda x: (x > 0).sum(1),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin((0, 1)),
    "max": lambda x: x.max(1),
    "min": lambda x: x.min(1, keepdim=True),
    "max all": lambda x: x.max(),
    "min all": lambda x: x.min(),
    "prod": lambda x: x.prod(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "argmax": lambda x: x.argmax(1),
    "argmax all": lambda x: x.argmax(),
    "argmin": lambda x: x.argmin(2, keepdim=True),
    "any": lambda x: (x > 1).any(1),
    "all": lambda x: (x > -1).all(2),
    "any all": lambda x: (x > 1).any(),
    "cumsum": lambda x: x.cumsum(1),
    "cumsum bool": lambda x: (x > 0).cumsum(1),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "var": lambda x: x.var(1),
    "std": lambda x: x.std(2, keepdim=True),
    "var biased": lambda x: x.var(1, correction=0),
    "norm 2": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "norm 1": lambda x: torch.linalg.vector_norm(x, ord=1, dim=1, keepdim=True),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "layer_norm 2d": lambda x: F.layer_norm(x, (5, 8)),
    "layer_norm affine": lambda x: F.layer_norm(x, (8,), torch.arange(1.0, 9.0), torch.arange(8.0), 1e-3),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "rms_norm weight": lambda x: F.rms_norm(x, (8,), torch.arange(1.0, 9.0), 1e-3),
    "group_norm": lambda x: F.group_norm(x.transpose(1, 2), 4),
    "batch_norm": lambda x: F.batch_norm(
        x, torch.arange(5.0), torch.arange(1.0, 6.0), torch.arange(2.0, 7.0), torch.ones(5)
    ),
    "batch_norm plain": lambda x: F.batch_norm(x, torch.zeros(5), torch.ones(5)),
    "linear 1d": lambda x: F.linear(x[0, 0] * 1, torch.arange(16.0).view(2, 8) / 16),
    "mm": lambda x: x[0] @ x[0].t(),
    "bmm": lambda x: x @ x.transpose(1, 2),
    "matmul 4d": lambda x: x[:, None] @ x[None].transpose(2, 3),
    "addmm": lambda x: torch.addmm(torch.arange(5.0), x[0], x[0].t(), beta=0.5, alpha=2),
    "baddbmm": lambda x: torch.baddbmm(x @ x.transpose(1, 2), x, x.transpose(1, 2), beta=0.3, alpha=0.7),
    "baddbmm beta 0": lambda x: torch.baddbmm(x @ x.transpose(1, 2), x, x.transpose(1, 2), beta=0),
    "conv1d": lambda x: F.conv1d(x.transpose(1, 2), torch.ones(4, 8, 3) / 9, torch.arange(4.0), padding=1),
    "conv1d same": lambda x: F.conv1d(x, torch.arange(60.0).view(4, 5, 3) / 30, padding="same"),
    "conv1d grouped": lambda x: F.conv1d(
        x.transpose(1, 2), torch.arange(16.0).view(8, 1, 2) / 9, stride=2, dilation=2, groups=8
    ),
    "conv2d": lambda x: F.conv2d(x[:, None], torch.arange(12.0).view(2, 1, 2, 3), stride=(1, 2)),
    "conv2d valid": lambda x: F.conv2d(x[:, None], torch.arange(12.0).view(2, 1, 2, 3), padding="valid"),
}


INDEXING: dict[str, Callable[..., Any]] = {
    "index one": lambda x, i: x[:, i],
    "index two": lambda x, i: x[i[:2], i[:2] + 1],
    "index broadcast": lambda x, i: x[i[:2, None], i[None, :3]],
    "index inner": lambda x, i: x[:, i[:3], i[:3] + 1],
    "index negative": lambda x, i: x[:, i - 3],
    "index_select": lambda x, i: x.index_select(1, i),
    "gather": lambda x, i: x.gather(1, i[None, :, None].expand(x.shape[0], -1, 8)),
    "gather part": lambda x, i: x.gather(2, i[None, None].expand(2, 4, -1)),
    "embedding": lambda x, i: F.embedding(i, torch.arange(40.0).view(10, 4)),
    "python index": lambda x, i: x[1:, ..., None, 2],
}

SIZES: dict[str, Callable[..., Any]] = {
    "product": lambda x: x.reshape(x.shape[0] * 5, 8) * 2,
    "double": lambda x: torch.cat((x, x)).view(2 * x.shape[0], 40),
    "plus": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)) + torch.arange(x.shape[0] + 3)[:, None, None],
    "floor": lambda x: x[: x.shape[0] // 2 + 1],
    "modulo": lambda x: torch.arange(x.shape[0] % 4 + 1),
    "square": lambda x: torch.zeros(x.shape[0] * x.shape[0]),
    "as operand": lambda x: x * x.shape[0] + x.shape[0] ** 2,
    "maximum": lambda x: torch.zeros(torch.sym_max(x.shape[0], 4)),
    "minimum": lambda x: torch.ones(torch.sym_min(x.shape[0], 4)),
    "negative floor": lambda x: torch.zeros(100 + (5 - x.shape[0]) // 2),
}


# Overloads that python code seldom leaves behind, called by name.
SPELLED: dict[str, Callable[..., Any]] = {
    "and number": lambda x: aten.__and__.Scalar(x.int(), 3),
    "or number": lambda x: aten.__or__.Scalar(x.int(), 3),
    "_softmax": lambda x: aten._softmax(x, -1, False),
    "_log_softmax": lambda x: aten._log_softmax(x, 1, False),
    "_to_copy": lambda x: aten._to_copy(x, dtype=torch.int64),
    "_unsafe_view": lambda x: aten._unsafe_view(x, [x.shape[0], 40]),
    "add.Scalar": lambda x: aten.add.Scalar(x, 2, 3),
    "sub.Scalar": lambda x: aten.sub.Scalar(x, 2),
    "mul.Scalar": lambda x: aten.mul.Scalar(x, 2.5),
    "div.Scalar": lambda x: aten.div.Scalar(x, 3),
    "div.Scalar_mode": lambda x: aten.div.Scalar_mode(x, 3, rounding_mode="floor"),
    "alias": lambda x: aten.alias(x) * 2,
    "detach": lambda x: aten.detach(x * 2),
    "all": lambda x: aten.all(x > -9),
    "all.dims": lambda x: aten.all.dims(x > -1, [1, 2]),
    "any.dims": lambda x: aten.any.dims(x > 1, [0, 2], True),
    "bitwise_and.Scalar": lambda x: aten.bitwise_and.Scalar(x.int(), 3),
    "bitwise_or.Scalar": lambda x: aten.bitwise_or.Scalar(x.int(), 3),
    "bitwise_xor.Tensor": lambda x: aten.bitwise_xor.Tensor(x.int(), (x * 2).int()),
    "bmm": lambda x: aten.bmm(x, x.transpose(1, 2)),
    "mm": lambda x: aten.mm(x[0], x[0].t()),
    "empty": lambda x: torch.where(x[:, 0, :2] > 9, aten.empty.memory_format([x.shape[0], 2]), 1.0),
    "empty_like": lambda x: torch.where(x > 9, aten.empty_like(x), 1.0),
    "eq.Scalar": lambda x: aten.eq.Scalar(x.round(), 1),
    "ne.Scalar": lambda x: aten.ne.Scalar(x.round(), 1),
    "ge.Scalar": lambda x: aten.ge.Scalar(x, 0.5),
    "le.Scalar": lambda x: aten.le.Scalar(x, 0.5),
    "feature_dropout": lambda x: aten.feature_dropout(x * 2, 0.5, False),
    "floor_divide.Scalar": lambda x: aten.floor_divide.Scalar(x * 9, 4),
    "fmod.Scalar": lambda x: aten.fmod.Scalar(x * 9, 4),
    "lift_fresh_copy": lambda x: aten.lift_fresh_copy(x * 2),
    "rsub.Tensor": lambda x: aten.rsub.Tensor(x, x * 3, alpha=2),
    "split.sizes": lambda x: aten.split.sizes(x, [1, 4], 1),
    "std.correction": lambda x: aten.std.correction(x, [1], correction=0),
    "std.dim": lambda x: aten.std.dim(x, [1]),
    "swapdims": lambda x: aten.swapdims(x, 0, 2),
    "to.device": lambda x: aten.to.device(x, "cpu", torch.int64),
    "to.dtype_layout": lambda x: aten.to.dtype_layout(x, dtype=torch.float64, layout=torch.strided),
    "to.other": lambda x: aten.to.other(x, x > 0),
    "where.Scalar": lambda x: aten.where.Scalar(x > 0, 1.5, -2.5),
}


class Named(nn.Module):
    """Several functions of the same inputs; the outputs carry their names."""

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> dict[str, Any]:
        inputs = (x,) if y is None else (x, y)
        return {name.replace(" ", "_"): function(*inputs) for name, function in self.functions.items()}


def varying(inputs: tuple[torch.Tensor, ...]) -> dict[str, dict[int, str]]:
    """The first dimension of float inputs varies."""
    return {name: {0: "batch"} for name, value in zip("xy", inputs) if value.is_floating_point()}


def check(tmp_path: Path, module: nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any) -> gw.Program:
    """Trace with a varying first dimension, export, compare at two sizes."""
    program = gw.trace(module, inputs, dynamic=varying(inputs))
    report = gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=inputs, **options)
    assert len(report.differences) == (2 if program.dims else 1) * len(program.signature.output_names())
    return program


GROUPS: dict[str, tuple[dict[str, Callable[..., Any]], tuple[torch.Tensor, ...]]] = {
    "unary": (UNARY, (X,)),
    "binary": (BINARY, (X, Y)),
    "moves": (MOVES, (X,)),
    "indexing": (INDEXING, (X, torch.tensor([1, 0, 2, 3, 1]))),
    "sizes": (SIZES, (X,)),
    "spelled": (SPELLED, (X,)),
}


@pytest.mark.parametrize("options", [{}, {"mode": "portable", "opset": 21}], ids=["runtime", "portable 21"])
@pytest.mark.parametrize("group", GROUPS)
def test_every_function_agrees(tmp_path: Path, group: str, options: dict[str, Any]) -> None:
    functions, inputs = GROUPS[group]
    check(tmp_path, Named(functions), inputs, **options)


def test_the_table_names_operators_and_functions_that_exist() -> None:
    for name, where in TRANSLATIONS.items():
        module, _, function = where.partition(":")
        assert callable(getattr(importlib.import_module(f"graphwright.backends.onnx.translations.{module}"), function))
        resolve_target(name)


def test_every_entry_of_the_table_is_exercised() -> None:
    """Except the dialect and attention, which have tests of their own, and what the frontend spells otherwise."""
    met: set[str] = set()
    for functions, inputs in GROUPS.values():
        met |= {op_name(node) for node in gw.trace(Named(functions), inputs, dynamic=varying(inputs)).nodes}
    elsewhere = {name for name in TRANSLATIONS if "graphwright" in name or "attention" in name}
    respelled = {"aten._to_copy", "aten.lift_fresh_copy"}
    assert sorted(set(TRANSLATIONS) - met - elsewhere - respelled) == []


def test_an_operator_without_translation_is_named_with_its_place(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.linalg.matrix_exp(x)

    model = nn.Sequential(nn.Linear(4, 4), Inner())
    with pytest.raises(gw.ExportError) as caught:
        gw.export_onnx(gw.trace(model, floats(3, 4, 4)), tmp_path / "model.onnx")
    assert "aten.linalg_matrix_exp has no ONNX translation" in str(caught.value)
    assert "in 1)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.var(0), "variance over a dimension that varies"),
        (lambda x: torch.linalg.vector_norm(x, ord=3), "vector norm of order 3"),
        (lambda x: x[[0, 1], :, [1, 2]], "do not lie side by side"),
        (lambda x: x.repeat_interleave(2), "without a dimension"),
        (lambda x: F.dropout(x, 0.5, training=True), "dropout in training mode"),
        (lambda x: F.batch_norm(x, None, None, training=True), "batch_norm in training mode"),
    ],
)
def test_what_cannot_be_exported_says_why(
    tmp_path: Path, function: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    program = gw.trace(Call(function), (X,), dynamic={"x": {0: "batch"}})
    with pytest.raises(gw.ExportError, match=reason):
        gw.export_onnx(program, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
