"""What cannot be traced says which module and which line, and leaves the model as it was."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from graphwright.frontends.torch import trace
from graphwright.ir.errors import InputError, TraceError


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


class Item(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[: int(x.abs().sum().item())]


class WritesInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2


class WritesThroughView(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x[0] = 0
        return x * 2


class Counts(nn.Module):
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + self.count


class Conditional(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,))


class Opaque:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class ReturnsOpaque(nn.Module):
    def forward(self, x: torch.Tensor) -> Opaque:
        return Opaque(x)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), inner])

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def line_of(kind: type, text: str) -> str:
    """``file:line`` of a line in a class of this file."""
    lines, first = inspect.getsourcelines(kind)
    return f"test_tracing_errors.py:{first + next(i for i, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize(
    ("inner", "text", "words"),
    [
        (Branch, "if x.sum()", "depends on the values of tensors"),
        (Item, "item()", "depends on the values of tensors"),
        (Conditional, "torch.cond", "operator cond has no place"),
        (Counts, "self.count += 1", "writes into 'layers.1.count'"),
    ],
)
def test_the_module_and_the_line_are_named(inner: type[nn.Module], text: str, words: str) -> None:
    with pytest.raises(TraceError) as caught:
        trace(Wrapped(inner()), torch.randn(3, 4))
    assert words in caught.value.what
    assert "layers.1" in str(caught.value)
    assert line_of(inner, text) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("kind", [WritesInput, WritesThroughView])
def test_a_model_that_writes_into_its_inputs(kind: type[nn.Module]) -> None:
    x = torch.randn(3, 4)
    before = x.clone()
    with pytest.raises(TraceError, match="writes into 'x'"):
        trace(kind(), x)
    assert torch.equal(x, before)


def test_outputs_torch_cannot_take_apart() -> None:
    with pytest.raises(TraceError, match="Opaque"):
        trace(ReturnsOpaque(), torch.randn(2, 3))


def test_the_model_fails_on_its_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(9, 4)))
    with pytest.raises(InputError) as caught:
        trace(model, torch.randn(2, 4))
    assert "'1.1'" in str(caught.value)
    assert "linear.py" in str(caught.value)


def test_a_model_is_as_it_was_after_an_error() -> None:
    model = Wrapped(Counts()).train()
    with pytest.raises(TraceError):
        trace(model, torch.randn(2, 4))
    assert model.training
    assert all(module.training for module in model.modules())
    assert float(model.layers[1].count) == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ({"y": torch.randn(2, 4)}, "missing a required argument: 'input'"),
        ({"input": torch.randn(2, 4), "mask": torch.ones(2)}, "unexpected keyword argument 'mask'"),
        ((torch.randn(2, 4), torch.randn(2, 4)), "too many positional"),
        ((), "missing a required"),
        ("text", "not str"),
        (3, "not int"),
        ({1: torch.randn(2, 4)}, "argument names"),
        ({"input": [1.0, 2.0]}, "hold no tensor"),
        (torch.randn(0, 4), "is empty in dimension 0"),
        (torch.randn(2, 4, device="meta"), "device meta"),
    ],
)
def test_example_inputs_that_do_not_fit(examples: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        trace(nn.Linear(4, 4), examples)
    assert words in str(caught.value)


def inference_model() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (torch.nn.functional.relu, "expected an nn.Module"),
        (nn.Linear(4, 4, device="meta"), "load its weights first"),
        (inference_model(), "torch.inference_mode()"),
        (torch.jit.script(nn.Linear(4, 4)), "TorchScript"),
    ],
)
def test_models_that_are_none(model: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        trace(model, torch.randn(2, 4))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        ("all", "must be 'auto'"),
        ({"y": {0: "batch"}}, "not among the example inputs"),
        ({"input": {2: "batch"}}, "no such axis"),
        ({"input": {0: "2x"}}, "not a name"),
        ({"input": {0: "n", 1: "n"}}, "is 2 in 'input' and 4"),
        ({"input": 0}, "must be a mapping"),
    ],
)
def test_dynamic_that_does_not_fit(dynamic: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        trace(nn.Linear(4, 4), torch.randn(2, 4), dynamic=dynamic)
    assert words in str(caught.value)


def test_a_size_asked_for_that_cannot_vary() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(3, 8)

    with pytest.raises(TraceError, match="features"):
        trace(nn.Linear(4, 4), torch.randn(2, 4), dynamic={"input": {1: "features"}})
    with pytest.raises(TraceError):
        trace(Fixed(), torch.randn(6, 4), dynamic={"x": {0: "batch"}})


def test_a_trace_that_differs_from_the_model_is_refused() -> None:
    class Moody(nn.Module):
        """Its result depends on something no trace can see."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    class BurnsIn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + len(str(x.tolist() if not torch.compiler.is_exporting() else [0]))

    for model in (Moody(), BurnsIn()):
        with pytest.raises(TraceError, match="off by"):
            trace(model, torch.randn(3, 4))
        trace(model, torch.randn(3, 4), check=False)


def test_nan_is_compared() -> None:
    class Nan(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(x) if not torch.compiler.is_exporting() else torch.log(x.abs())

    class SameNan(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(x)

    with pytest.raises(TraceError, match="NaN"):
        trace(Nan(), torch.randn(3, 4))
    trace(SameNan(), torch.randn(3, 4))
