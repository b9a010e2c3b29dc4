"""Attention, rotary embedding, RMS norm and gated activations, in one operator and written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphwright as gw
from graphwright.ir import ops

ROUTES = [{"opset": 23}, {"opset": 21}, {"opset": 23, "mode": "portable"}, {"opset": 21, "mode": "portable"}]
IDS = ["runtime 23", "runtime 21", "portable 23", "portable 21"]


class Call(nn.Module):
    """A function of two inputs as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(x, y)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def export(tmp_path: Path, module: nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any) -> onnx.ModelProto:
    """Trace with batch and sequence open, export with the check on, read the file."""
    axes = {"x": {0: "batch", 1: "sequence"}, "y": {0: "batch"} if inputs[1].dim() else {}}
    if inputs[1].dim() > 1:
        axes["y"][1] = "sequence" if inputs[1].shape[1] == inputs[0].shape[1] else "keys"
    program = gw.trace(module, inputs, dynamic=axes)
    report = gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=inputs, **options)
    assert len({each.sizes for each in report.differences}) == 2
    return onnx.load(tmp_path / "model.onnx")


def count(model: onnx.ModelProto, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph.node)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    """The dialect's attention with defaults."""
    settings = {
        "key_mask": None,
        "bias": None,
        "scale": query.shape[-1] ** -0.5,
        "causal": False,
        "window": 0,
        **options,
    }
    return ops.get("attention").target(query, key, value, *settings.values())


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def padding(x: torch.Tensor) -> torch.Tensor:
    """A key mask computed from the input: each row leaves some keys out, the first row all of them."""
    length, rows = torch.arange(x.shape[1]), torch.arange(x.shape[0])
    return length[None, :] < (rows * 2)[:, None]


# x is [B, S, 24], y is [B, T, 24].
ATTENTION: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "plain": lambda x, y: attend(heads(x, 4), heads(y, 4), heads(y * 2, 4)),
    "self": lambda x, y: attend(heads(x, 4), heads(x, 4), heads(x, 4)),
    "grouped queries": lambda x, y: attend(heads(x, 6), heads(y[..., :8], 2), heads(y[..., 8:16], 2)),
    "wide values": lambda x, y: attend(heads(x, 4), heads(y, 4), heads(torch.cat((y, y), -1), 4)),
    "scale": lambda x, y: attend(heads(x, 4), heads(y, 4), heads(y, 4), scale=0.7),
    "causal": lambda x, y: attend(heads(x, 4), heads(x, 4), heads(x, 4), causal=True),
    "causal with more keys": lambda x, y: attend(
        heads(x, 4), heads(torch.cat((y, x), 1), 4), heads(torch.cat((y, x), 1), 4), causal=True
    ),
    "window": lambda x, y: attend(heads(x, 4), heads(x, 4), heads(x, 4), causal=True, window=3),
    "window both ways": lambda x, y: attend(heads(x, 4), heads(x, 4), heads(x, 4), window=2),
    "key mask with empty rows": lambda x, y: attend(heads(x, 4), heads(x, 4), heads(x, 4), key_mask=padding(x)),
    "one key mask for all": lambda x, y: attend(heads(x, 4), heads(x, 4), heads(x, 4), key_mask=padding(x)[1:2]),
    "float bias": lambda x, y: attend(
        heads(x, 4), heads(y, 4), heads(y, 4), bias=(x[:, :, None, :1] + y[:, None, :, 1:2])[..., 0][:, None]
    ),
    "bias over keys": lambda x, y: attend(heads(x, 4), heads(y, 4), heads(y, 4), bias=y[:, None, None, :, 0] * 3),
    "bias of lowest numbers": lambda x, y: attend(
        heads(x, 4),
        heads(x, 4),
        heads(x, 4),
        bias=torch.where(padding(x), 0.0, torch.finfo(x.dtype).min)[:, None, None],
    ),
    "bias of infinity": lambda x, y: attend(
        heads(x, 4), heads(x, 4), heads(x, 4), bias=torch.where(padding(x), 0.5, float("-inf"))[:, None, None]
    ),
    "bool bias": lambda x, y: attend(
        heads(x, 4),
        heads(x, 4),
        heads(x, 4),
        bias=(torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs() < 2,
    ),
    "everything": lambda x, y: attend(
        heads(x, 4),
        heads(x, 4),
        heads(x, 4),
        key_mask=padding(x),
        bias=x[:, None, None, :, 0] * 3,
        causal=True,
        window=4,
    ),
    "not from a view": lambda x, y: attend(heads(x, 4) * 2, heads(y, 4) * 2, heads(y, 4) * 2),
    "sdpa": lambda x, y: F.scaled_dot_product_attention(heads(x, 4), heads(y, 4), heads(y, 4)),
    "sdpa causal": lambda x, y: F.scaled_dot_product_attention(heads(x, 4), heads(x, 4), heads(x, 4), is_causal=True),
    "sdpa grouped": lambda x, y: F.scaled_dot_product_attention(
        heads(x, 6), heads(y[..., :8], 2), heads(y[..., 8:16], 2), enable_gqa=True, scale=0.3
    ),
    "sdpa bool mask": lambda x, y: F.scaled_dot_product_attention(
        heads(x, 4), heads(x, 4), heads(x, 4), attn_mask=padding(x)[:, None, None]
    ),
    "sdpa float mask": lambda x, y: F.scaled_dot_product_attention(
        heads(x, 4), heads(x, 4), heads(x, 4), attn_mask=x[:, None, :, :1] * x[:, None, None, :, 1]
    ),
}


class Attentions(nn.Module):
    """All attentions, given back as attention layers use them: heads side by side again."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        results = {name.replace(" ", "_"): function(x, y) for name, function in ATTENTION.items()}
        return {name: value.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1) for name, value in results.items()}


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_attention_agrees(tmp_path: Path, options: dict[str, Any]) -> None:
    model = export(tmp_path, Attentions(), (normal(3, 5, 24), normal(3, 7, 24)), **options)
    operators = len(ATTENTION) if options["opset"] == 23 else 0
    assert count(model, "Attention") == operators
    assert count(model, "Softmax") == len(ATTENTION) - operators


def test_attention_between_linears_needs_no_transpose(tmp_path: Path) -> None:
    """Heads stay side by side from the projections to the output, and the mask is made once for all layers."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(24, 24) for _ in range(4))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
            attended = attend(*(heads(part(x), 4) for part in (self.query, self.key, self.value)), key_mask=mask)
            return self.out(attended.transpose(1, 2).reshape(x.shape))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            mask = y > 0
            for layer in self.layers:
                x = layer(x, mask)
            return x

    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model = export(tmp_path, Model(), (normal(2, 5, 24), mask))
    assert count(model, "Attention") == 2
    assert count(model, "Transpose") == 0
    assert count(model, "Expand") == 1
    assert count(model, "Gemm") == 8


def rotate(x: torch.Tensor, width: int, *, interleaved: bool) -> Any:
    """The dialect's rotary embedding with angles made from positions."""
    position = torch.arange(x.shape[2])[:, None] * 0.3 * torch.arange(1, width // 2 + 1)
    angles = position.repeat_interleave(2, -1) if interleaved else torch.cat((position, position), -1)
    return ops.get("rotary_embedding").target(x, angles.cos()[None], angles.sin()[None], interleaved)


ROTARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "halves": lambda x, y: rotate(heads(x, 3), 8, interleaved=False),
    "interleaved": lambda x, y: rotate(heads(x, 3), 8, interleaved=True),
    "partial": lambda x, y: rotate(heads(x, 3), 4, interleaved=False),
    "partial interleaved": lambda x, y: rotate(heads(x, 3), 4, interleaved=True),
    "not from a view": lambda x, y: rotate(heads(x, 3) * 2, 8, interleaved=False),
    "angles of every row": lambda x, y: ops.get("rotary_embedding").target(
        heads(x, 3), y[..., :8].cos(), y[..., :8].sin(), False
    ),
    "into attention": lambda x, y: attend(
        rotate(heads(x, 3), 8, interleaved=False), rotate(heads(x, 3), 8, interleaved=False), heads(x, 3), causal=True
    ),
}


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_rotary_embedding_agrees(tmp_path: Path, options: dict[str, Any]) -> None:
    # A row's angles must be equal for both members of a pair, so y repeats itself.
    angles = torch.cat((normal(3, 5, 4), normal(3, 5, 4)), -1)
    module = Call(lambda x, y: {name.replace(" ", "_"): function(x, y) for name, function in ROTARY.items()})
    model = export(tmp_path, module, (normal(3, 5, 24), angles), **options)
    assert count(model, "RotaryEmbedding") == (len(ROTARY) + 1 if options["opset"] == 23 else 0)


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_rms_norm_agrees(tmp_path: Path, options: dict[str, Any]) -> None:
    norm = ops.get("rms_norm").target
    weight = torch.arange(1.0, 25.0)
    module = Call(lambda x, y: {"weighted": norm(x, weight, 1e-5), "plain": norm(y, None, 1e-2)})
    model = export(tmp_path, module, (normal(3, 5, 24), normal(3, 7, 24)), **options)
    wanted = "RMSNormalization" if options["opset"] == 23 else "SimplifiedLayerNormalization"
    assert count(model, wanted) == (2 if options["opset"] == 23 or "mode" not in options else 0)


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_gated_activations_agree(tmp_path: Path, options: dict[str, Any]) -> None:
    gate = ops.get("gated_activation").target
    kinds = ("silu", "gelu", "gelu_tanh", "relu")
    module = Call(lambda x, y: {kind: gate(x, x * y, kind) for kind in kinds})
    export(tmp_path, module, (normal(3, 5, 24), normal(3, 5, 24)), **options)


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_linears_on_kronecker_products_agree(tmp_path: Path, options: dict[str, Any]) -> None:
    """In both orders, with a factor and without; the product of the factors is in no file."""
    kron = ops.get("kron_linear").target
    shapes = {"b_first": ((5, 2), (3, 12)), "a_first": ((3, 12), (5, 2)), "one_column": ((1, 24), (7, 1))}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, (a, b) in shapes.items():
                self.register_buffer(f"{name}_a", normal(*a))
                self.register_buffer(f"{name}_b", normal(*b) * 0.3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            factors = {name: (getattr(self, f"{name}_a"), getattr(self, f"{name}_b")) for name in shapes}
            plain = {name: kron(x, *each) for name, each in factors.items()}
            scaled = {f"{name}_scaled": kron(y, *each, -16.0) for name, each in factors.items()}
            return {**plain, **scaled, "flat": kron(x, *factors["b_first"]).flatten(0, 1) + 1}

    model = export(tmp_path, Model(), (normal(3, 5, 24), normal(3, 7, 24)), **options)
    assert count(model, "Gemm") == count(model, "MatMul") == 7
    assert count(model, "Mul") == 3
    sizes = {initializer.name: list(initializer.dims) for initializer in model.graph.initializer}
    assert all(len(size) < 2 or max(size) <= 24 for size in sizes.values())


DOWN, UP, SQUARE, ROWS = normal(4, 24), normal(24, 4) * 0.3, normal(4, 4) * 0.5, normal(3, 24)
FACTORS = torch.linspace(0.5, 1.5, 24)


def adapters(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """What adapters of all kinds compute beside a layer's value, in the operators that they are put in with."""
    down, up = DOWN, UP
    hidden = F.linear(x, down)
    inner = F.leaky_relu(F.linear(F.leaky_relu(F.linear(hidden, SQUARE), 0.8), SQUARE.t()), 0.8)
    inner = F.layer_norm(inner, (4,))
    return {
        "lora": y + F.linear(hidden * 2.0, up),
        "loda": y + F.linear(hidden, up) + F.linear(inner, up),
        "ia3": y * FACTORS,
        "residual": y + x * torch.tensor(0.7),
        "residual_of_one": y + x * torch.tensor([0.7]),
        "bottleneck": y + F.linear(F.gelu(F.linear(y, down)), up),
        "magnitudes": (y + F.linear(hidden, up)) * (1 / FACTORS) + FACTORS,
        "gated_rank": y + F.linear(hidden * torch.tensor([1.0, 0.0, -0.5, 2.0]), up),
        "prompt": torch.cat((ROWS.expand(x.shape[0], -1, -1), y), dim=1),
        "rows": y + torch.index_select(ROWS, 0, (x[:, 0, 0] > 0).long())[:, None],
    }


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_what_adapters_compute_agrees(tmp_path: Path, options: dict[str, Any]) -> None:
    export(tmp_path, Call(adapters), (normal(3, 5, 24), normal(3, 5, 24)), **options)
