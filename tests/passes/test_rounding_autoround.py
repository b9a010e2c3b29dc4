"""AutoRound: blocks whose rounding is trained, against the paper's formulas and against rounding to nearest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.names import op_name
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding.gptq import gptq
from graphwright.passes.quantization.rounding.offsets import TrainedRounding
from graphwright.passes.quantization.targets import LinearTarget, linear_target

MIXING = torch.randn(8, 32, generator=torch.Generator().manual_seed(5)) / 3


def correlated(*shape: int, seed: int = 5) -> torch.Tensor:
    """Inputs ``[..., 32]`` whose features move together, in the same way whatever the seed, as those of a layer do."""
    generator = torch.Generator().manual_seed(seed)
    found: torch.Tensor = torch.randn(*shape, 8, generator=generator) @ MIXING
    return found + 0.1 * torch.randn(*shape, 32, generator=generator)


class Layer(nn.Module):
    """A block with two outputs: the stream, and a gate for the next block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.gate = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + self.down(torch.relu(self.up(x))) * gate, torch.sigmoid(self.gate(x))


class Layers(nn.Module):
    def __init__(self, width: int = 32, count: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width) for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.ones_like(x)
        for layer in self.layers:
            x, gate = layer(x, gate)
        return x * gate


class Conv1d(nn.Module):
    """A linear as GPT-2 writes it: ``addmm`` with the weight ``[in, out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)
        self.bias = nn.Parameter(torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, 32), self.weight)
        return flat.reshape(x.shape)


class Stored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Conv1d(), Conv1d()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


class Shared(nn.Module):
    """One linear in both layers."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Linear(32, 32)
        self.layers = nn.ModuleList([nn.Sequential(inner, nn.ReLU()), nn.Sequential(inner, nn.Tanh())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


BATCHES = [correlated(8, 16, seed=seed) for seed in range(4)]
QUICK: dict[str, Any] = {"steps": 40, "tokens": 128}


def quantized(model: nn.Module, rounding: Any, **options: Any) -> gw.OptimizedModel:
    settings: dict[str, Any] = {"bits": 4, "group_size": 16, **options}
    passes = [gw.QuantizeLinears(rounding=rounding, calibration=BATCHES, **settings)]
    return gw.optimize(model, passes, example_inputs=BATCHES[0])


def error(model: nn.Module, program: Any, inputs: list[torch.Tensor] | None = None) -> float:
    """Squared error of the outputs, relative to their size; on data that calibration has not seen by default."""
    given = inputs if inputs is not None else [correlated(8, 16, seed=seed) for seed in range(10, 14)]
    with torch.no_grad():
        pairs = [(program(x), model(x)) for x in given]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


# -- the trained weight ------------------------------------------------------------------------------------------------

FORMS = [
    Format(bits, group, symmetric, search)
    for bits, group, symmetric, search in [
        (2, 16, True, True),
        (3, 16, False, True),
        (4, None, True, False),
        (4, 16, False, False),
        (8, 16, True, True),
        (8, None, False, True),
    ]
] + [Format(8, None, True, True, integer_products=True)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_starts_from_rounding_to_the_nearest(form: Format) -> None:
    weight = torch.randn(6, 40)
    found = TrainedRounding(weight, form).found()
    group = form.columns_per_group(40)
    groups = functional.pad(weight, (0, -40 % group)).reshape(6, -1, group)
    scale, zero = form.fit(groups)
    codes = form.round(groups, scale, zero).flatten(1)[:, :40]
    assert torch.equal(found.codes, codes.to(torch.uint8))
    torch.testing.assert_close(found.scales, scale, rtol=1e-3, atol=0)
    assert torch.equal(found.zeros, zero)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_are_the_formulas(form: Format) -> None:
    """By hand: ``s`` for an offset inside the codes' range and 0 outside; for a range by its scale and zero point."""
    weight, wanted = torch.randn(6, 40), torch.randn(6, 40)
    trained = TrainedRounding(weight, form)
    trained.offsets.uniform_(-0.4, 0.4)
    trained.high.uniform_(0.6, 0.9)
    if not form.symmetric:
        trained.low.uniform_(0.6, 0.9)
    parameters = [*trained.parameters()[0], *trained.parameters()[1]]
    for each in parameters:
        each.requires_grad_()
    (trained.dense() * wanted).sum().backward()
    with torch.no_grad():
        fitted = TrainedRounding(weight, form)
        scale0, zero0 = fitted.grid()
        top, least = float(2**form.bits - 1), 1.0 if form.integer_products else 0.0
        high, low = (top - zero0) * scale0, zero0 * scale0
        scale = scale0 * trained.high if form.symmetric else (high * trained.high + low * trained.low) / top
        zero = zero0 if form.symmetric else (low * trained.low / scale).round().clamp(0, top)
        s, z = scale.unsqueeze(-1), zero.unsqueeze(-1)
        raw = (trained.latent / s + trained.offsets).round() + z
        inside = ((raw >= least) & (raw <= top)).float()
        code = raw.clamp(least, top)
        grad = functional.pad(wanted, (0, code.shape[1] * code.shape[2] - 40)).reshape(code.shape)
        torch.testing.assert_close(trained.offsets.grad, grad * s * inside)
        by_scale = (grad * (code - z - inside * trained.latent / s)).sum(-1)
        if form.symmetric:
            torch.testing.assert_close(trained.high.grad, by_scale * scale0, rtol=1e-4, atol=1e-4)
            return
        by_zero = (grad * s * (inside - 1)).sum(-1)
        free = ((low * trained.low / scale).round() >= 0) & ((low * trained.low / scale).round() <= top)
        by_scale = by_scale - by_zero * free * low * trained.low / scale.square()
        torch.testing.assert_close(trained.high.grad, by_scale * high / top, rtol=1e-3, atol=1e-3)
        by_low = by_scale * low / top + by_zero * free * low / scale
        torch.testing.assert_close(trained.low.grad, by_low, rtol=1e-3, atol=1e-3)


def test_it_starts_from_the_codes_of_another_method() -> None:
    x, weight = correlated(200), torch.randn(6, 32)
    for form in FORMS:
        start = gptq(weight, x.T @ x, form)
        trained = TrainedRounding(weight, form)
        trained.start_from(start)
        found = trained.found()
        assert torch.equal(found.codes, start.codes)
        torch.testing.assert_close(found.scales, start.scales, rtol=1e-3, atol=0)


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": False},
        {"group_size": None},
        {"bits": 8},
        {"activations": "int8", "bits": 8, "group_size": None},
    ],
)
def test_every_format_trains(options: dict[str, Any]) -> None:
    model = Layers().eval()
    nearest = error(model, quantized(model, "nearest", **options))
    found = quantized(model, gw.AutoRound(**QUICK), **options)
    assert error(model, found) < (1.0 if options.get("bits") != 8 else 1.1) * nearest


@pytest.mark.parametrize("model", [Layers, Stored, Shared])
@pytest.mark.parametrize("start", ["nearest", "weighted", "gptq"])
def test_outputs_come_nearer_than_with_the_nearest_codes(model: type[nn.Module], start: str) -> None:
    made = model().eval()
    nearest = error(made, quantized(made, "nearest"), BATCHES)
    found = quantized(made, gw.AutoRound(start=start, **QUICK))
    assert error(made, found, BATCHES) < 0.8 * nearest


def test_exact_inputs_train_every_block_by_itself() -> None:
    """The first block is the same either way, the second is not."""
    model = Layers().eval()
    rounded = quantized(model, gw.AutoRound(**QUICK), bits=4).tensors()
    exact = quantized(model, gw.AutoRound(rounded_inputs=False, **QUICK), bits=4).tensors()
    first = [name for name in rounded if name.startswith("layers.0") and name.endswith("qweight")]
    assert all(torch.equal(rounded[name], exact[name]) for name in first)
    assert any(not torch.equal(rounded[name], exact[name]) for name in rounded if name not in first)


def test_a_shared_weight_is_trained_once() -> None:
    found = quantized(Shared().eval(), gw.AutoRound(**QUICK))
    nodes = [node for node in found.nodes if op_name(node) == "graphwright.linear_nbits"]
    assert len(nodes) == 2
    assert nodes[0].args[1] is nodes[1].args[1]


def test_no_steps_leave_the_start() -> None:
    model = Layers().eval()
    nearest, found = quantized(model, "nearest"), quantized(model, gw.AutoRound(steps=0))
    for name, tensor in nearest.tensors().items():
        assert torch.equal(tensor, found.tensors()[name]), name


def test_the_seed_decides() -> None:
    model = Layers().eval()
    first, again = (quantized(model, gw.AutoRound(**QUICK)).tensors() for _ in range(2))
    other = quantized(model, gw.AutoRound(seed=7, **QUICK)).tensors()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


class Masked(nn.Module):
    """A model over token ids with the usual mask."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(input_ids, attention_mask)["hidden"]
        return found


def test_what_stands_at_padding_has_no_say(stack: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Batches of two lengths; the same codes, whatever is at padding."""
    ids, mask = batch["ids"], batch["mask"]
    longer = {"input_ids": ids.repeat(2, 2), "attention_mask": torch.ones(4, 12, dtype=torch.int64)}
    program = gw.trace(Masked(stack).eval(), longer)
    found = []
    for given in (ids, torch.where(mask == 0, 49, ids)):
        data = [longer, {"input_ids": given, "attention_mask": mask}]
        quantize = gw.QuantizeLinears(
            bits=4, group_size=16, rounding=gw.AutoRound(steps=8, tokens=20), calibration=data
        )
        found.append(gw.optimize(program, [quantize], example_inputs=longer, verify=False).tensors())
    codes = [name for name in found[0] if ".layers." in name and name.endswith("qweight")]
    assert len(codes) == 4
    assert all(torch.equal(found[0][name], found[1][name]) for name in codes)


def test_nothing_of_the_model_is_written_to() -> None:
    model = Layers().eval()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    quantized(model, gw.AutoRound(**QUICK))
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None
        assert value.requires_grad


def test_a_half_precision_program() -> None:
    model = Layers().eval().to(torch.bfloat16)
    batches = [batch.to(torch.bfloat16) for batch in BATCHES]
    quantize = gw.QuantizeLinears(bits=4, group_size=16, rounding=gw.AutoRound(**QUICK), calibration=batches)
    found = gw.optimize(model, [quantize], example_inputs=batches[0])
    assert sum(op_name(node) == "graphwright.linear_nbits" for node in found.nodes) == 6


def test_blocks_that_overflow_are_named() -> None:
    model = Layers().eval()
    with torch.no_grad():
        model.get_parameter("layers.0.down.weight").mul_(1e30)
    with pytest.raises(gw.InputError, match="NaN or infinite on the calibration data"):
        quantized(model, gw.AutoRound(**QUICK))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "autoround: steps"),
        ({"tokens": 0}, "autoround: tokens"),
        ({"learning_rate": 0.0}, "autoround: learning_rate"),
        ({"optimizer": "sgd"}, "'sign', 'adam'"),
        ({"start": "awq"}, "'nearest', 'weighted', 'gptq'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gw.InputError, match=message):
        gw.AutoRound(**options)


def test_it_needs_calibration_data() -> None:
    with pytest.raises(gw.InputError, match="needs calibration data"):
        gw.QuantizeLinears(rounding="autoround")


def test_targets_of_these_models_are_of_both_kinds() -> None:
    program = gw.trace(Stored().eval(), BATCHES[0])
    found = [linear_target(program, node) for node in program.nodes if node.op == "call_function"]
    assert [item.transposed for item in found if isinstance(item, LinearTarget)] == [True, True]
