"""Options of single linears within one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw

X = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))


class Mlp(nn.Module):
    """Three linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(48, 64)
        self.mid = nn.Linear(64, 64)
        self.down = nn.Linear(64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(torch.relu(self.mid(torch.relu(self.up(x)))))
        return result


class Shared(nn.Module):
    """Two linears on one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(48, 48, bias=False)
        self.b = nn.Linear(48, 48, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.b(torch.relu(self.a(x)))
        return result


def bits(program: gw.Program) -> list[int | None]:
    """Bits of each linear, ``None`` where it is in floating point."""
    found: list[int | None] = []
    for node in program.nodes:
        if gw.op_name(node) == "graphwright.linear_nbits":
            found.append(node.args[5])
        elif gw.op_name(node) == "aten.linear":
            found.append(None)
    return found


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({"up": {"bits": 8}, "down": None}, [8, 4, None]),
        ({"re:.*o.*": {"bits": 8}}, [4, 4, 8]),
        ({"up.weight": {"bits": 8}}, [8, 4, 4]),
        ({"up": None, "*": {"bits": 8}}, [None, 8, 8]),
        ({"*": {"bits": 8}, "up": None}, [8, 8, 8]),
        ({}, [4, 4, 4]),
    ],
)
def test_the_first_key_that_fits_counts(overrides: dict[str, Any], wanted: list[int | None]) -> None:
    program = gw.trace(Mlp(), X)
    assert gw.QuantizeLinears(bits=4, group_size=16, overrides=overrides)(program)
    assert bits(program) == wanted
    exact = Mlp()(X)
    assert (program(X) - exact).norm() / exact.norm() < 0.25


def test_all_options_of_a_format() -> None:
    options = {"bits": 4, "group_size": None, "symmetric": False, "clip_search": False}
    mixed, alone = gw.trace(Mlp(), X), gw.trace(Mlp(), X)
    gw.QuantizeLinears(bits=8, group_size=16, overrides={"mid": options})(mixed)
    gw.QuantizeLinears(where="mid", **options)(alone)
    for name in ("mid.qweight", "mid.scales", "mid.zero_points"):
        assert torch.equal(mixed.tensors()[name], alone.tensors()[name])
    assert mixed.tensors()["up.scales"].shape == (64, 3)


def test_the_report_shows_the_mix_and_why_a_linear_is_left() -> None:
    item = gw.QuantizeLinears(bits=4, group_size=16, overrides={"up": {"bits": 8}, "down": None})
    small = gw.optimize(Mlp(), [item], example_inputs=X)
    notes = small.report.rows[0].notes
    assert sorted(notes["formats"].split(", ")) == ["1 × INT4 g16", "1 × INT8 g16", "1 × float"]
    assert notes["linears"] == 2
    assert small.report.rows[0].options["overrides"] == {"up": {"bits": 8}, "down": None}
    reasons = [refusal.reason for refusal in item.refusals(gw.trace(Mlp(), X))]
    assert reasons == ["it is left in floating point by overrides['down']"]


def test_every_linear_is_held_to_the_limit_of_its_own_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 4-bit error at an 8-bit linear is a bug, also where 4-bit linears stand beside it."""
    from graphwright.passes.quantization.formats import Format

    real = Format.values

    def wrong(form: Format, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return real(form, codes, scale, zero)

    def coarse(form: Format, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        codes = (weights / scale.unsqueeze(-1)).round_() + zero.unsqueeze(-1)
        if form.bits == 8:
            codes = (codes / 32).round_() * 32
        return codes.clamp_(0, 2**form.bits - 1)

    monkeypatch.setattr(Format, "values", wrong)
    monkeypatch.setattr(Format, "round", coarse)
    with pytest.raises(gw.ContractViolation, match="the contract allows 0.05"):
        gw.optimize(
            Mlp(), [gw.QuantizeLinears(bits=4, group_size=16, overrides={"mid": {"bits": 8}})], example_inputs=X
        )


def test_a_shared_weight_has_one_format() -> None:
    program = gw.trace(Shared(), X)
    with pytest.raises(gw.InputError, match="shared by linears with other overrides"):
        gw.QuantizeLinears(bits=4, group_size=16, overrides={"a": {"bits": 8}})(program)
    name = next(name for name in program.tensors() if name.endswith("weight"))
    assert gw.QuantizeLinears(bits=4, group_size=16, overrides={name: {"bits": 8}})(program)
    assert bits(program) == [8, 8]


def test_with_calibration_and_with_int8_activations() -> None:
    data = [torch.randn(2, 5, 48) for _ in range(3)]
    program = gw.trace(Mlp(), X)
    gw.QuantizeLinears(bits=4, group_size=16, calibration=data, overrides={"up": {"bits": 8}})(program)
    assert bits(program) == [8, 4, 4]
    program = gw.trace(Mlp(), X)
    gw.QuantizeLinears(activations="int8", overrides={"mid": None})(program)
    assert [gw.op_name(node) for node in program.nodes if "linear" in gw.op_name(node)] == [
        "graphwright.linear_int8_dynamic",
        "aten.linear",
        "graphwright.linear_int8_dynamic",
    ]


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"up": {"bits": 5}}, "must be .* not 5 .*overrides\\['up'\\]"),
        ({"up": {"group_size": 17}}, "multiple of 16"),
        ({"up": {"rounding": "gptq"}}, "'rounding' is no option that linears have of their own"),
        ({"up": 8}, "must be options such as"),
        ({"re:(": None}, "not a regular expression"),
        ({3: None}, "is no glob"),
        ([("up", None)], "must map linears to options"),
    ],
)
def test_bad_overrides_are_errors_at_once(overrides: Any, what: str) -> None:
    with pytest.raises(gw.InputError, match=what):
        gw.QuantizeLinears(overrides=overrides)


def test_an_override_that_selects_nothing_is_an_error() -> None:
    program = gw.trace(Mlp(), X)
    with pytest.raises(gw.SelectionError, match="selects nothing"):
        gw.QuantizeLinears(overrides={"upp": None})(program)
    with pytest.raises(gw.SelectionError, match="selects no linear"):
        gw.QuantizeLinears(overrides={"up.bias": None})(program)


def test_int8_activations_have_one_format() -> None:
    with pytest.raises(gw.InputError, match="symmetric INT8 weights"):
        gw.QuantizeLinears(activations="int8", overrides={"up": {"bits": 3}})


def test_a_recipe_holds_them(tmp_path: Path) -> None:
    overrides = {"up": {"bits": 8, "group_size": None}, "re:.*down": None}
    item = gw.QuantizeLinears(bits=4, group_size=16, overrides=overrides)
    gw.save_recipe([item], tmp_path / "r.toml")
    (found,) = gw.load_recipe(tmp_path / "r.toml").passes
    assert found == item
    assert isinstance(found, gw.QuantizeLinears)
    assert found.overrides == overrides
    hash(found)


def test_a_recipe_says_that_data_is_needed(tmp_path: Path) -> None:
    data = [X]
    gw.save_recipe([gw.QuantizeLinears(rounding="gptq", calibration=data)], tmp_path / "r.toml")
    with pytest.raises(gw.RecipeError, match="the recipe was made with calibration data .*line 1"):
        gw.load_recipe(tmp_path / "r.toml")
    (found,) = gw.load_recipe(tmp_path / "r.toml", calibration=data).passes
    small, same = gw.trace(Mlp(), X), gw.trace(Mlp(), X)
    found(small)
    gw.QuantizeLinears(rounding="gptq", calibration=data)(same)
    assert torch.equal(small(X), same(X))
    assert functional.mse_loss(small(X), Mlp()(X)) < 1e-3


def test_dtypes_of_single_linears() -> None:
    overrides: dict[str, dict[str, Any]] = {
        "up": {"dtype": "nf4", "group_size": 32},
        "mid": {"symmetric": False, "float_zero_points": True},
        "down": {"bits": 3, "clip_search": False, "even_range": True},
    }
    item = gw.QuantizeLinears(bits=4, group_size=16, overrides=overrides)
    small = gw.optimize(Mlp(), [item], example_inputs=X)
    assert sorted(small.report.rows[0].notes["formats"].split(", ")) == [
        "1 × INT3 g16 even range",
        "1 × INT4 g16 float zero points",
        "1 × NF4 g32",
    ]
    together = gw.trace(Mlp(), X)
    assert item(together)
    for name, options in overrides.items():
        alone = gw.trace(Mlp(), X)
        gw.QuantizeLinears(where=name, **{"bits": 4, "group_size": 16, **options})(alone)
        for part in ("qweight", "scales", "zero_points"):
            one, other = (each.tensors().get(f"{name}.{part}") for each in (together, alone))
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.equal(one, other)
    # An integer among tables, where the pass has a table.
    mixed = gw.trace(Mlp(), X)
    gw.QuantizeLinears(dtype="nf4", group_size=16, overrides={"up": {"dtype": "int", "bits": 8}})(mixed)
    assert [gw.op_name(node) for node in mixed.nodes if "linear" in gw.op_name(node)] == [
        "graphwright.linear_nbits",
        "graphwright.linear_codebook",
        "graphwright.linear_codebook",
    ]
    assert bits(mixed) == [8]


@pytest.mark.parametrize(
    ("dtype", "options", "words"),
    [
        ("nf4", {"bits": 8}, "codes of 'nf4' have 4 bits, not 8"),
        ("int", {"dtype": "fp8_e4m3", "bits": 4}, "codes of 'fp8_e4m3' have 8 bits, not 4"),
        ("int", {"dtype": "nf4", "symmetric": False}, "codes of 'nf4' have no zero points"),
        ("int", {"dtype": "int5"}, "'int5'"),
    ],
)
def test_bits_that_a_dtype_does_not_have(dtype: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(gw.InputError, match=words) as caught:
        gw.QuantizeLinears(dtype=dtype, group_size=16, overrides={"up": options})
    assert "overrides['up']" in str(caught.value)
