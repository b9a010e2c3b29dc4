"""``QuantizeLinears``: which linears, into what, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.ops.quantization import dequantize, quantize_activations
from graphwright.ir.provenance import add_tags

Listing = Callable[[gw.Program], list[str]]
X = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3))


class Mlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(48, 64, bias=bias)
        self.down = nn.Linear(64, 48, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


class Applied(nn.Module):
    """A function of ``x`` and this module's weights."""

    def __init__(self, function: Callable[[Any, torch.Tensor], torch.Tensor], **weights: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


class LanguageModel(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(1200, 48)
        self.mlp = Mlp()
        self.lm_head = nn.Linear(48, 1200, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.lm_head(self.mlp(self.embed(ids)))}


IDS = torch.arange(14).reshape(2, 7)


def operators(program: gw.Program) -> list[str]:
    return [gw.op_name(node) for node in program.nodes if node.op == "call_function"]


def reasons(program: gw.Program, item: gw.Pass) -> list[str]:
    return [refusal.reason for refusal in item.refusals(program)]


def quantised_weight(program: gw.Program, base: str, bits: int, columns: int) -> torch.Tensor:
    tensors = program.tensors()
    zeros = tensors.get(f"{base}.zero_points")
    return dequantize(tensors[f"{base}.qweight"], tensors[f"{base}.scales"], zeros, bits, columns, torch.float64)


# -- the rewrite -------------------------------------------------------------------------------------------------------


def test_before_and_after(listing: Listing) -> None:
    program = gw.trace(Mlp(), X)
    assert listing(program) == [
        "%linear = aten.linear(%x, %up_weight, %up_bias)",
        "%relu = aten.relu(%linear)",
        "%linear_1 = aten.linear(%relu, %down_weight, %down_bias)",
    ]
    item = gw.QuantizeLinears(bits=4, group_size=32)
    assert item(program) is True
    assert listing(program) == [
        "%linear_nbits = graphwright.linear_nbits(%x, %up_qweight, %up_scales, None, %up_bias, 4, 32)",
        "%relu = aten.relu(%linear_nbits)",
        "%linear_nbits_1 = graphwright.linear_nbits(%relu, %down_qweight, %down_scales, None, %down_bias, 4, 32)",
    ]
    assert set(program.tensors()) == {f"{m}.{t}" for m in ("up", "down") for t in ("qweight", "scales", "bias")}
    assert [gw.path_of(node) for node in program.nodes if "linear_nbits" in node.name] == ["up", "down"]
    assert all("quantized" in gw.tags_of(node) for node in program.nodes if "nbits" in node.name)
    gw.verify(program)
    assert item(program) is False


def test_zero_points_and_integer_products(listing: Listing) -> None:
    program = gw.trace(Mlp(bias=False), X)
    assert gw.QuantizeLinears(bits=8, group_size=16, symmetric=False, where="up")(program)
    assert gw.QuantizeLinears(activations="int8", where="down")(program)
    assert listing(program) == [
        "%linear_nbits = graphwright.linear_nbits(%x, %up_qweight, %up_scales, %up_zero_points, None, 8, 16)",
        "%relu = aten.relu(%linear_nbits)",
        "%linear_int8_dynamic = graphwright.linear_int8_dynamic(%relu, %down_qweight, %down_scales, None, 'per_token')",
    ]
    tensors = program.tensors()
    assert {name: tensors[name].dtype for name in tensors} == {
        "up.qweight": torch.uint8,
        "up.scales": torch.float16,
        "up.zero_points": torch.uint8,
        "down.qweight": torch.int8,
        "down.scales": torch.float32,
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_are_those_of_the_rounded_weights(bits: int, group: int | None, symmetric: bool) -> None:
    model = Mlp()
    program = gw.trace(model, X)
    gw.QuantizeLinears(bits=bits, group_size=group, symmetric=symmetric)(program)
    up, down = quantised_weight(program, "up", bits, 48), quantised_weight(program, "down", bits, 64)
    limit = {8: 0.01, 4: 0.15, 3: 0.25, 2: 0.45}[bits]
    assert (up - model.up.weight).norm() / model.up.weight.norm() < limit
    hidden = np.maximum(X.double().numpy() @ up.numpy().T + model.up.bias.detach().double().numpy(), 0)
    expected = hidden @ down.numpy().T + model.down.bias.detach().double().numpy()
    np.testing.assert_allclose(program(X).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranges", ["per_token", "per_tensor"])
def test_integer_activations(ranges: str) -> None:
    model = nn.Linear(48, 20)
    program = gw.trace(model, X)
    gw.QuantizeLinears(activations="int8", activation_ranges=ranges)(program)
    tensors = program.tensors()
    weight = tensors["qweight"].double() * tensors["scales"].double()[:, None]
    codes, scale, zero = quantize_activations(X, ranges)
    expected = ((codes - zero) * scale).double() @ weight.T + model.bias.double()
    torch.testing.assert_close(program(X).double(), expected, rtol=1e-4, atol=1e-5)


def test_optimize_reports_what_each_weight_lost() -> None:
    small = gw.optimize(Mlp(), [gw.QuantizeLinears(bits=4, group_size=16)], example_inputs=X)
    row = small.report.rows[0]
    assert row.notes["linears"] == 2
    assert set(row.notes["weights"]) == {"up.weight", "down.weight"}
    worst = min(row.notes["weights"].items(), key=lambda item: item[1]["sqnr_db"])
    assert row.notes["least_exact"].startswith(f"{worst[0]} {worst[1]['sqnr_db']:.1f} dB")
    assert 18 < worst[1]["sqnr_db"] < 26
    assert row.bytes_after < 0.2 * row.bytes_before
    assert small.report.to_json()
    assert worst[0] in str(small.report.to_html())


def test_the_model_stays_as_it_was() -> None:
    model = Mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(X)
    gw.optimize(model, [gw.QuantizeLinears(bits=4, group_size=32)], example_inputs=X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(X), expected)


def test_gradients_pass_through_quantised_linears() -> None:
    for item in (gw.QuantizeLinears(bits=4, group_size=32), gw.QuantizeLinears(activations="int8")):
        model = Mlp()
        program = gw.trace(model, X)
        item(program)
        x = X.clone().requires_grad_()
        program(x).square().sum().backward()
        exact = X.clone().requires_grad_()
        model(exact).square().sum().backward()
        assert functional.cosine_similarity(x.grad.flatten(), exact.grad.flatten(), dim=0) > 0.95
        assert all(value.grad is not None for name, value in program.named_parameters() if name.endswith("bias"))


def test_save_and_load(tmp_path: Any) -> None:
    program = gw.trace(Mlp(), X)
    gw.QuantizeLinears(bits=4, group_size=32, symmetric=False)(program)
    program.save(tmp_path / "small")
    loaded = gw.Program.load(tmp_path / "small")
    assert torch.equal(loaded(X), program(X))
    assert gw.structurally_equal(loaded, program)


# -- the spellings of a linear -----------------------------------------------------------------------------------------


SPELLINGS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "linear": (lambda m, x: functional.linear(x, m.w.t(), m.b), "aten.linear"),
    "addmm": (lambda m, x: torch.addmm(m.b, x.view(-1, 48), m.w), "aten.addmm"),
    "mm": (lambda m, x: torch.mm(x.view(-1, 48), m.w), "aten.mm"),
    "matmul": (lambda m, x: torch.matmul(x, m.w), "aten.matmul"),
    "at": (lambda m, x: x @ m.w + m.b, "aten.matmul"),
}


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name != "linear"])
@pytest.mark.parametrize("activations", ["none", "int8"])
def test_weights_stored_the_other_way_round(spelling: str, activations: str) -> None:
    function, name = SPELLINGS[spelling]
    model = Applied(function, w=torch.randn(48, 20), b=torch.randn(20))
    program = gw.trace(model, X)
    assert name in operators(program)
    assert gw.QuantizeLinears(bits=8, activations=activations)(program)
    assert name not in operators(program)
    exact = model(X)
    assert (program(X) - exact).norm() / exact.norm() < 0.02
    assert "w" not in program.tensors()
    assert {"w_qweight", "w_scales"} <= set(program.tensors())
    gw.verify(program)


def test_gpt2_as_transformers_spells_it() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=3, vocab_size=1100, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(12).reshape(1, 12)
    small = gw.optimize(model, [gw.QuantizeLinears(bits=8)], example_inputs={"input_ids": ids, "use_cache": False})
    assert operators(small).count("graphwright.linear_nbits") == 8
    assert small.report.rows[0].notes["linears"] == 8
    exact, found = model(ids).logits, small(input_ids=ids, use_cache=False).logits
    assert (found - exact).norm() / exact.norm() < 0.02
    assert operators(small)[-1] == "aten.linear"  # the head


def test_a_shared_weight_is_quantised_once_and_stays_shared() -> None:
    model = Applied(lambda m, x: functional.linear(functional.linear(x, m.w), m.w), w=torch.randn(48, 48))
    program = gw.trace(model, X)
    assert gw.QuantizeLinears(bits=4, group_size=16)(program)
    assert operators(program) == ["graphwright.linear_nbits"] * 2
    assert set(program.tensors()) == {"w_qweight", "w_scales"}
    first, second = (node for node in program.nodes if node.op == "call_function")
    assert first.args[1:] == second.args[1:]
    assert second.args[0] is first
    exact = model(X)
    assert (program(X) - exact).norm() / exact.norm() < 0.2


# -- selection ---------------------------------------------------------------------------------------------------------


def test_where_and_ignore() -> None:
    program = gw.trace(Mlp(), X)
    item = gw.QuantizeLinears(where="up")
    assert reasons(program, item) == ["not selected by where= / ignore="]
    assert item(program)
    assert set(program.tensors()) == {"up.qweight", "up.scales", "up.bias", "down.weight", "down.bias"}
    other = gw.trace(Mlp(), X)
    assert gw.QuantizeLinears(ignore="up")(other)
    assert "down.qweight" in other.tensors()
    assert "up.weight" in other.tensors()


@pytest.mark.parametrize("tag", ["adapter", "quantized"])
def test_protected_tags(tag: str) -> None:
    program = gw.trace(Mlp(), X)
    for node in program.nodes:
        if gw.op_name(node) == "aten.linear" and gw.path_of(node) == "down":
            add_tags(node, [tag])
    item = gw.QuantizeLinears()
    assert reasons(program, item) == [f"it is tagged {tag}, which this pass leaves alone"]
    assert item(program)
    assert operators(program) == ["graphwright.linear_nbits", "aten.relu", "aten.linear"]


def test_the_output_head_is_left_alone_unless_asked_for() -> None:
    program = gw.trace(LanguageModel(tied=False), IDS)
    item = gw.QuantizeLinears()
    assert reasons(program, item) == [
        "it is the output head, which is left in floating point (set lm_head=True to quantise it)"
    ]
    item(program)
    assert "lm_head.weight" in program.tensors()
    assert gw.QuantizeLinears(lm_head=True)(program)
    assert "lm_head.qweight" in program.tensors()
    assert "lm_head.weight" not in program.tensors()


def test_a_head_is_known_by_its_output_too() -> None:
    class Renamed(LanguageModel):
        def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = functional.linear(self.mlp(self.embed(ids)), self.lm_head.weight)
            return {"logits": logits[:, -1:, :]}

    program = gw.trace(Renamed(tied=False), IDS)
    assert "it is the output head" in reasons(program, gw.QuantizeLinears())[0]


def test_a_tied_head_is_never_stored_twice() -> None:
    program = gw.trace(LanguageModel(tied=True), IDS)
    item = gw.QuantizeLinears(lm_head=True)
    assert reasons(program, item) == [
        "its weight is also read by %embedding, which is not quantised, and would be stored twice "
        "(QuantizeEmbeddings(tied=True) quantises a table and the head tied to it)"
    ]
    item(program)
    assert not any("head" in name and "qweight" in name for name in program.tensors())


# -- refusals ----------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[nn.Module, torch.Tensor, str]] = {
    "computed": (
        Applied(lambda m, x: functional.linear(x, m.w * 2), w=torch.randn(20, 48)),
        X,
        "its weight is computed by %mul, not a constant",
    ),
    "vector": (
        Applied(lambda m, x: functional.linear(x, m.w), w=torch.randn(48)),
        X,
        "its weight has 1 dimensions",
    ),
    "double": (
        Applied(lambda m, x: functional.linear(x, m.w), w=torch.randn(20, 48).double()),
        X.double(),
        "its weight is torch.float64",
    ),
    "factors": (
        Applied(lambda m, x: torch.addmm(m.b, x.view(-1, 48), m.w, alpha=2), w=torch.randn(48, 20), b=torch.randn(20)),
        X,
        "addmm with factors other than 1",
    ),
    "matrix bias": (
        Applied(lambda m, x: torch.addmm(m.b, x.view(-1, 48), m.w), w=torch.randn(48, 20), b=torch.randn(10, 20)),
        X,
        "its bias is not a vector",
    ),
    "read elsewhere": (
        Applied(lambda m, x: functional.linear(x, m.w) + m.w.sum(), w=torch.randn(20, 48)),
        X,
        "its weight is also read by %sum_1, which is not quantised, and would be stored twice",
    ),
    "both ways round": (
        Applied(lambda m, x: torch.matmul(functional.linear(x, m.w), m.w), w=torch.randn(48, 48)),
        X,
        "its weight is also read by %matmul, which is not quantised, and would be stored twice",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_refusal_has_its_reason(case: str) -> None:
    model, x, reason = REFUSED[case]
    program = gw.trace(model, x, dynamic=None)
    before = str(program)
    item = gw.QuantizeLinears(bits=4, group_size=16)
    assert reason in reasons(program, item)
    assert item(program) is False
    assert str(program) == before


def test_products_of_values_are_no_linears() -> None:
    program = gw.trace(Applied(lambda m, x: torch.matmul(x, x.transpose(1, 2)) * m.w, w=torch.randn(1)), X)
    assert reasons(program, gw.QuantizeLinears()) == []


def test_a_weight_with_nan_is_named_and_nothing_is_changed() -> None:
    model = Mlp()
    with torch.no_grad():
        model.down.weight[3, 3] = float("nan")
    program = gw.trace(Mlp(), X)
    program.set_tensor("down.weight", model.down.weight)
    before = str(program)
    with pytest.raises(gw.InputError, match="NaN or infinity .*weight 'down.weight'"):
        gw.QuantizeLinears()(program)
    assert str(program) == before
    assert "up.weight" in program.tensors()


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where", "what"),
    [
        ({"bits": 5}, "quantize-linears: bits", "must be 2, 3, 4 or 8, not 5"),
        ({"bits": True}, "quantize-linears: bits", "must be 2, 3, 4 or 8, not True"),
        ({"bits": "4"}, "quantize-linears: bits", "must be 2, 3, 4 or 8, not '4'"),
        ({"group_size": 0}, "quantize-linears: group_size", "multiple of 16"),
        ({"group_size": -1}, "quantize-linears: group_size", "None for one scale per channel"),
        ({"group_size": 33}, "quantize-linears: group_size", "multiple of 16"),
        ({"group_size": 32.0}, "quantize-linears: group_size", "multiple of 16"),
        ({"activations": "int3"}, "quantize-linears: activations", "'none', 'int8', 'int4', 'fp8'"),
        ({"activations": "int4"}, "activations='int4'", "go with 4-bit integer weights"),
        (
            {"activations": "int4", "bits": 4, "activation_ranges": "per_tensor"},
            "='per_tensor'",
            "4-bit weights do not",
        ),
        ({"activations": "int8", "activation_ranges": "per_group"}, "='per_group'", "8-bit weights do not have it"),
        ({"activations": "int8", "block": (32, 32)}, "activations='int8'", "one scale per channel"),
        (
            {"activations": "int8", "group_size": 32, "activation_ranges": "per_token"},
            "='per_token'",
            "8-bit weights in groups do not have it",
        ),
        ({"activations": "fp8"}, "activations='fp8'", "use dtype='fp8_e4m3'"),
        ({"activations": "fp8", "dtype": "fp8_e5m2"}, "activations='fp8'", "FP8 activations go with FP8 weights"),
        (
            {"activations": "fp8", "dtype": "fp8_e4m3", "activation_ranges": "per_tensor"},
            "='per_tensor'",
            "FP8 weights do not have it",
        ),
        ({"activations": "int8", "symmetric": False}, "activations='int8'", "symmetric INT8 weights"),
        ({"activation_ranges": "per_row"}, "activation_ranges", "'per_token', 'per_tensor'"),
        ({"rounding": "up"}, "rounding", "must be one of 'awq-clip', 'autoround', 'gptq', "),
        ({"rounding": "gptq"}, "rounding='gptq'", "needs calibration data"),
        ({"max_error": -1}, "max_error", "positive number"),
        ({"where": 3}, "where", ""),
    ],
)
def test_bad_options_are_errors_at_once(options: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(gw.InputError) as caught:
        gw.QuantizeLinears(**options)
    assert where in str(caught.value)
    assert what in str(caught.value)


def test_a_budget_that_is_not_met_rolls_back() -> None:
    model = Mlp()
    with pytest.raises(gw.ContractViolation, match="budget 0.0001") as caught:
        gw.optimize(model, [gw.QuantizeLinears(bits=4, max_error=1e-4)], example_inputs=X)
    assert caught.value.pass_name == "quantize-linears"


def test_fusing_linears_after_quantising_them_is_an_error() -> None:
    with pytest.raises(gw.OrderError, match="fuse-qkv"):
        gw.optimize(Mlp(), [gw.QuantizeLinears(), gw.FuseQKV()], example_inputs=X)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_calibration_makes_outputs_better() -> None:
    model = Mlp()
    mixing = torch.randn(12, 48)
    data = [torch.randn(4, 9, 12) @ mixing for _ in range(6)]
    exact = model(data[-1]).detach()
    errors = []
    for calibration in (None, data[:5]):
        small = gw.optimize(
            model,
            [gw.QuantizeLinears(bits=4, group_size=16, calibration=calibration)],
            example_inputs=data[0],
        )
        errors.append(float((small(data[-1]).detach() - exact).norm() / exact.norm()))
        options = small.report.rows[0].options
        assert options.get("calibration") == ("5 batches" if calibration else None)
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no calibration data"),
        ([torch.randn(2, 5, 40)], "calibration batch 1 does not fit"),
        ([X, torch.full((2, 5, 48), float("nan"))], "NaN or infinity .*batch 2"),
        (["text"], "calibration batch 1"),
    ],
)
def test_bad_calibration_data(batches: list[Any], message: str) -> None:
    program = gw.trace(Mlp(), X)
    before = str(program)
    with pytest.raises(gw.InputError, match=message):
        gw.QuantizeLinears(bits=4, group_size=16, calibration=batches)(program)
    assert str(program) == before
