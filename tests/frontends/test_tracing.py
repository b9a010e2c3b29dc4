"""Any ``nn.Module`` becomes a Program that does exactly what it does, at other sizes too."""

from __future__ import annotations

import dataclasses
import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphwright.frontends.torch import trace
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.provenance import path_of, source_of
from graphwright.ir.types import Dim


class Function(nn.Module):
    """A module that applies a function, for models of one line."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any, y: Any = None) -> Any:
        return self.function(x) if y is None else self.function(x, y)


class Block(nn.Module):
    """Attention and feed-forward as in a small encoder, with tied input and output embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = self.embed(ids)
        h = self.norm(x)
        pad = None if mask is None else mask == 0
        x = x + self.attention(h, h, h, key_padding_mask=pad, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return {"logits": self.head(x), "pooled": x[:, 0]}


def assert_equal(found: Any, expected: Any) -> None:
    wanted, spec = pytree.tree_flatten(expected)
    values, other = pytree.tree_flatten(found)
    assert other == spec
    for a, b in zip(values, wanted, strict=True):
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


def quiet_trace(*args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return trace(*args, **kwargs)


def test_batch_and_sequence_vary() -> None:
    model = Block().eval()
    program = quiet_trace(model, {"ids": torch.randint(0, 50, (1, 6)), "mask": torch.ones(1, 6, dtype=torch.int64)})
    assert list(program.dims) == ["batch", "sequence"]
    assert all(dim.min == 1 and dim.max is None for dim in program.dims.values())
    for shape in ((1, 1), (1, 6), (2, 9), (5, 3), (7, 7)):
        ids, mask = torch.randint(0, 50, shape), torch.ones(shape, dtype=torch.int64)
        mask[-1, 1 + shape[1] // 2 :] = 0
        torch.testing.assert_close(program(ids=ids, mask=mask), model(ids=ids, mask=mask), rtol=1e-6, atol=1e-6)


def test_names_ties_and_places_are_the_models() -> None:
    model = Block()
    program = trace(model, {"ids": torch.randint(0, 50, (2, 6))})
    assert program.aliases == {"head.weight": "embed.weight"}
    assert set(program.state_dict()) == set(model.state_dict())
    for name, parameter in program.named_parameters():
        assert parameter is dict(model.named_parameters())[name]
    up = next(node for node in program.nodes if path_of(node) == "up")
    assert op_name(up) == "aten.linear"
    assert source_of(up).startswith("test_tracing.py:")


def test_gradients_equal_the_models() -> None:
    model = Block().eval()
    program = trace(model, {"ids": torch.randint(0, 50, (2, 6))}).clone(copy_weights=True)
    ids = torch.randint(0, 50, (3, 5))
    model(ids)["logits"].square().mean().backward()
    program(ids)["logits"].square().mean().backward()
    expected = dict(model.named_parameters())
    for name, parameter in program.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-7)


def test_no_gradient_flows_where_the_model_lets_none_flow() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            with torch.no_grad():
                scale = self.a(x).mean(-1, keepdim=True)
            return self.b(x) * scale

    model = Detached()
    program = trace(model, torch.randn(3, 4)).clone(copy_weights=True)
    x = torch.randn(2, 4)
    program(x).sum().backward()
    model(x).sum().backward()
    gradients = {name: parameter.grad for name, parameter in program.named_parameters()}
    assert gradients["a.weight"] is None
    assert model.a.weight.grad is None
    torch.testing.assert_close(gradients["b.weight"], model.b.weight.grad)


def test_frozen_parameters_stay_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    program = trace(model, torch.randn(2, 4))
    assert {name: p.requires_grad for name, p in program.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }


def test_parameters_on_the_same_memory_are_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    program = trace(model, torch.randn(2, 4))
    assert program.aliases == {"1.weight": "0.weight"}


@dataclasses.dataclass
class Output:
    values: torch.Tensor
    extra: torch.Tensor | None = None


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + 1, [x * 2, {"three": x * 3}]),
        lambda x: {"a": x + 1, "none": None, "number": 3, "text": "t"},
        lambda x: Pair(x + 1, x * 2),
        lambda x: Output(x * 2),
        lambda x: (x, x, x + 0),
        lambda x: (x.shape[0], x * x.shape[0]),
    ],
)
def test_output_types(function: Callable[..., Any]) -> None:
    model = Function(function)
    program = quiet_trace(model, torch.randn(3, 4))
    x = torch.randn(5, 4)
    assert_equal(program(x), model(x))


def test_nested_inputs_and_constants() -> None:
    class Nested(nn.Module):
        def forward(self, batch: Any, scale: float = 1.0, flag: bool = True, extra: Any = None) -> Any:
            y = batch["a"] + batch["b"][0] * scale
            return y if flag and extra is None else y - 1

    model = Nested()
    x = torch.randn(3, 4)
    program = quiet_trace(model, {"batch": {"a": x, "b": [x]}, "scale": 3.0, "flag": True, "extra": None})
    y = {"a": torch.randn(2, 4), "b": [torch.randn(2, 4)]}
    assert_equal(program(batch=y, scale=3.0, flag=True, extra=None), model(y, 3.0))
    assert_equal(program(y), model(y, 3.0))
    with pytest.raises(InputError, match="constant 3"):
        program(batch=y, scale=2.0)


def test_positional_and_keyword_arguments() -> None:
    class Rest(nn.Module):
        def forward(self, x: Any, *rest: Any, bias: Any, **more: Any) -> Any:
            return x * rest[0] + bias - more["shift"]

    x = torch.randn(3, 4)
    model = Rest()
    program = quiet_trace(model, (x, x + 1), example_kwargs={"bias": x, "shift": x})
    values = [torch.randn(2, 4) for _ in range(4)]
    assert_equal(
        program(values[0], values[1], bias=values[2], shift=values[3]),
        model(values[0], values[1], bias=values[2], shift=values[3]),
    )


def test_one_tensor_for_two_inputs_is_two_inputs() -> None:
    x = torch.randn(3, 4)
    program = quiet_trace(Function(lambda a, b: a - 2 * b), (x, x))
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(program(a, b), a - 2 * b)


@pytest.mark.parametrize(
    ("function", "functional"),
    [
        (lambda x: torch.relu_(x * 2), True),
        (lambda x: (x * 2).add_(1).clamp_(min=0), True),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), True),
        (lambda x: (x * 2).masked_fill_(x > 0, 1.0), True),
    ],
)
def test_in_place_operators_become_functional(function: Callable[..., Any], functional: bool) -> None:
    model = Function(function)
    program = quiet_trace(model, torch.randn(3, 4))
    names = [op_name(node) for node in program.nodes if node.op == "call_function"]
    assert not any(name.split(".")[1].endswith("_") for name in names)
    x = torch.randn(5, 4)
    assert_equal(program(x), model(x.clone()))


def _write_through_views(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 0] = 0
    flat = y.view(-1)
    flat.mul_(3)
    half = y.half()
    half.add_(x)  # keeps its dtype, where `half + x` would not
    return y + half


def test_writes_seen_through_views() -> None:
    model = Function(_write_through_views)
    program = quiet_trace(model, torch.randn(3, 4))
    x = torch.randn(5, 4)
    assert_equal(program(x), model(x))


def test_autocast_and_no_grad_regions() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.linear(x)
            with torch.autocast("cpu", enabled=False), torch.no_grad():
                z = self.linear(x)
            return y, z

    model = Mixed()
    program = quiet_trace(model, torch.randn(3, 4))
    x = torch.randn(2, 4)
    assert program(x)[0].dtype == torch.bfloat16
    assert_equal(program(x), model(x))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, 5),
    )


def test_a_model_in_training_mode_is_traced_for_inference_and_left_as_it_was() -> None:
    model = convolutions()
    model[4].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    program = quiet_trace(model, torch.randn(1, 3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    x = torch.randn(4, 3, 8, 8)
    assert_equal(program(x), model.eval()(x))


def test_a_model_that_keeps_things_is_left_as_it_was() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.last = 0, torch.zeros(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x + 1

    model = Keeps()
    before = dict(vars(model))
    trace(model, torch.randn(2, 3))
    assert vars(model) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).to(dtype)
    program = quiet_trace(model, torch.randn(2, 4, dtype=dtype))
    x = torch.randn(5, 4, dtype=dtype)
    assert_equal(program(x), model(x))


def test_wrappers_are_taken_off() -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        program = quiet_trace(wrapped, x)
        assert set(program.state_dict()) == {"weight", "bias"}
        assert_equal(program(x), model(x))


def test_weights_made_by_parametrizations_and_lists() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.scales = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
            self.register_buffer("shift", torch.randn(4), persistent=False)
            self.plain = torch.randn(4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.normed(x) * self.scales[0] + self.scales[1] * self.shift + self.plain

    model = Lists()
    program = quiet_trace(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    assert_equal(program(x), model(x))


def test_random_numbers_are_drawn_alike() -> None:
    model = Function(lambda x: x + torch.rand_like(x))
    program = quiet_trace(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert_equal(program(x), expected)


def test_an_encoder_of_torchs_own() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    program = quiet_trace(model, torch.randn(1, 6, 16))
    assert list(program.dims) == ["batch", "sequence"]
    x = torch.randn(3, 9, 16)
    torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_recurrent_model_fixes_its_sequence() -> None:
    with pytest.warns(UserWarning, match="sequence = 5 only"):
        program = trace(nn.LSTM(4, 6, batch_first=True), torch.randn(2, 5, 4))
    assert list(program.dims) == ["batch"]


@pytest.mark.parametrize(
    ("function", "dims", "conditions"),
    [
        (lambda x: x + 1 if x.shape[0] > 9 else x + 2, {"rows": Dim("rows", 1, 9, 6)}, ()),
        (lambda x: x + 1 if x.shape[0] % 2 == 0 else x + 2, {"rows": Dim("rows", 2, None, 6)}, ("rows % 2 == 0",)),
        (lambda x: x + 1 if x.shape[0] == 1 else x + 2, {"rows": Dim("rows", 2, None, 6)}, ()),
        (lambda x: x + 1 if x.shape[0] != 7 else x + 2, {"rows": Dim("rows", 1, None, 6)}, ("rows != 7",)),
    ],
)
def test_a_path_taken_by_size_holds_for_its_sizes_only(
    function: Callable[..., Any], dims: dict[str, Dim], conditions: tuple[str, ...]
) -> None:
    model = Function(function)
    program = quiet_trace(model, torch.randn(6, 4), dynamic={"x": {0: "rows"}})
    assert program.dims == dims
    assert program.symbols.conditions == conditions
    for rows in range(1, 20):
        x = torch.randn(rows, 4)
        try:
            found = program(x)
        except InputError:
            assert rows in (1, 7) or rows % 2 or rows > 9
            continue
        assert_equal(found, model(x))


def test_a_size_that_cannot_vary_is_the_examples() -> None:
    model = Function(lambda x: x.reshape(1, 12) * 2)
    with pytest.warns(UserWarning, match="batch = 3 only"):
        program = trace(model, torch.randn(3, 4))
    assert not program.dims
    with pytest.raises(InputError, match="3, 4"):
        program(torch.randn(4, 4))
    single = nn.Conv1d(1, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = trace(single, torch.randn(1, 1, 8))  # channels and batch are 1, and only the batch may change
    x = torch.randn(5, 1, 8)
    assert_equal(program(x), single(x))
    wide = nn.Conv1d(4, 4, 9)
    program = trace(wide, torch.randn(3, 4, 20), dynamic={"input": {0: "batch", 2: "length"}})
    assert program.dims["batch"].min == 1  # though no length of 1 can be run
    assert program.dims["length"].min > 1
    x = torch.randn(1, 4, 33)
    torch.testing.assert_close(program(x), wide(x))
    double = nn.Conv1d(2, 4, 3)
    with pytest.warns(UserWarning, match="sequence = 2 only"):
        program = trace(double, torch.randn(1, 2, 9))
    x = torch.randn(5, 2, 9)
    assert_equal(program(x), double(x))


def test_fixed_sizes() -> None:
    program = quiet_trace(nn.Linear(4, 4), torch.randn(1, 4), dynamic=None)
    assert not program.dims
    with pytest.raises(InputError):
        program(torch.randn(2, 4))
