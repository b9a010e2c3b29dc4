"""INT8 activations on grids from calibration data: what is observed, which grid is chosen, where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.passes.calibration import Observed, Stream
from graphwright.passes.quantization.activations import per_token_error, static_grid


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def observed(values: torch.Tensor) -> Observed:
    found = Observed.nothing(values.shape[1])
    found.add(values)
    return found


class Embedded(nn.Module):
    """Two linears behind a table, with a padding mask among the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 16)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(self.up(self.table(ids))) * attention_mask.unsqueeze(-1)
        result: torch.Tensor = self.down(hidden)
        return result


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics_do_not_depend_on_how_rows_are_cut_into_batches() -> None:
    values = rows(5000, 6)
    whole, parts = observed(values), Observed.nothing(6)
    for piece in values.split([1, 700, 0, 1999, 2300]):
        parts.add(piece)
    assert torch.equal(whole.low, values.amin(0))
    assert torch.equal(whole.high, values.amax(0))
    torch.testing.assert_close(whole.moment, values.T @ values, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(parts.moment, whole.moment, rtol=1e-4, atol=1e-2)
    assert torch.equal(parts.low, whole.low)
    assert torch.equal(parts.high, whole.high)
    assert torch.equal(parts.rows, whole.rows)
    assert torch.equal(whole.rows, values[::8]), "rows kept must be spread over the data"


def test_padding_is_left_out() -> None:
    program = gw.trace(Embedded(), (torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)))
    (node,) = [node for node in program.nodes if gw.op_name(node) == "aten.embedding"]
    ids = torch.arange(10).reshape(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with Stream(program, [{"ids": ids, "attention_mask": mask}]) as stream:
        stream.advance(next(iter(node.users)))
        found = Observed.over(stream.rows(node))
    seen = program.tensor(node.args[0]).detach()[ids[mask.bool()]]
    assert torch.equal(found.high, seen.amax(0))
    assert len(found.rows) == 8


# -- the grid ----------------------------------------------------------------------------------------------------------


def quantised(x: torch.Tensor, grid: Any) -> torch.Tensor:
    codes = (x / grid.scales).round().clamp(-grid.zero_point, 255 - grid.zero_point)
    result: torch.Tensor = codes * grid.scales
    return result


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_the_grid_holds_what_was_seen(shift: float) -> None:
    values, weight = rows(800, 32) + shift, rows(24, 32, 1)
    grid = static_grid(observed(values), weight)
    assert 0 <= grid.zero_point <= 255
    assert (grid.scales > 0).all()
    error = (quantised(values, grid) - values).norm() / values.norm()
    assert error < 0.02
    assert grid.error < 0.03


def test_a_large_feature_is_tamed_by_a_scale_of_its_own() -> None:
    values, weight = rows(800, 64), rows(24, 64, 1)
    values[:, 5] *= 200
    weight[:, 5] /= 200
    grid = static_grid(observed(values), weight)
    assert grid.scales[5] > 10 * grid.scales[6]
    # One scale for all features rounds the others away: steps of 800/255.
    step = (values.max() - values.min()) / 255
    plain = (values / step).round() * step
    wanted = values @ weight.T
    assert ((plain @ weight.T) - wanted).norm() / wanted.norm() > 5 * grid.error
    assert grid.error < per_token_error(observed(values), weight) / 5


def test_rows_of_different_size_want_grids_of_their_own() -> None:
    values = rows(800, 64) * torch.logspace(-3, 1, 800)[:, None]
    assert per_token_error(observed(values), rows(24, 64, 1)) < 0.02
    small = observed(values)
    small.rows = values[:400]  # judged by the small ones, on the range of all
    assert static_grid(small, rows(24, 64, 1)).error > 0.05


@pytest.mark.parametrize("values", [torch.zeros(10, 8), torch.full((10, 8), 2.0), -torch.ones(10, 8)])
def test_constant_inputs(values: torch.Tensor) -> None:
    grid = static_grid(observed(values), rows(4, 8))
    assert torch.isfinite(grid.scales).all()
    torch.testing.assert_close(quantised(values, grid), values, rtol=1e-2, atol=1e-6)


def test_features_and_columns_of_zeros() -> None:
    values, weight = rows(100, 16), rows(4, 16, 1)
    values[:, 3] = 0
    weight[:, 4] = 0
    grid = static_grid(observed(values), weight)
    assert torch.isfinite(grid.scales).all()
    assert (grid.scales > 0).all()
    assert grid.error < 0.03


# -- the pass ----------------------------------------------------------------------------------------------------------


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(0, 50, (4, 9), generator=generator) for _ in range(6)]
    return [{"ids": value, "attention_mask": torch.ones_like(value)} for value in ids]


def test_static_ranges_are_stored_and_used(listing: Any) -> None:
    model, data = Embedded(), batches()
    program = gw.trace(model, data[0])
    item = gw.QuantizeLinears(activations="int8", activation_ranges="static", rounding="nearest", calibration=data)
    assert item(program)
    lines = [line for line in listing(program) if "= graphwright.linear_int8" in line]
    assert len(lines) == 2
    assert all("graphwright.linear_int8_static" in line for line in lines)
    tensors = program.tensors()
    for name, width in (("up", 32), ("down", 64)):
        assert tensors[f"{name}.input_scales"].shape == (width,)
        weight = tensors[f"{name}.qweight"] * tensors[f"{name}.scales"][:, None] / tensors[f"{name}.input_scales"]
        exact = model.get_parameter(f"{name}.weight").detach()
        assert (weight - exact).norm() / exact.norm() < 0.02, "the weight stands for the old one"
    found, wanted = program(**data[1]), model(data[1]["ids"], data[1]["attention_mask"])
    assert (found - wanted).norm() / wanted.norm() < 0.03
    gw.verify(program)


def test_each_linear_gets_what_suits_it() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.uneven = nn.Linear(48, 32), nn.Linear(48, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # A few tokens are far larger: no fixed grid serves both.
            large = torch.where(torch.arange(x.shape[0]) % 30 == 0, 30.0, 1.0)
            y = self.uneven(x * large.unsqueeze(-1)) / large.unsqueeze(-1)
            result: torch.Tensor = self.even(x) + y
            return result

    data = [rows(60, 48, seed) for seed in range(4)]
    small = gw.optimize(Mixed(), [gw.QuantizeLinears(activations="int8", calibration=data)], example_inputs=data[0])
    found = {gw.path_of(node): gw.op_name(node) for node in small.nodes if "int8" in gw.op_name(node)}
    assert found == {"even": "graphwright.linear_int8_static", "uneven": "graphwright.linear_int8_dynamic"}
    assert small.report.rows[-1].notes["static_ranges"] == 1


def test_without_calibration_ranges_come_from_the_data() -> None:
    program = gw.trace(nn.Linear(48, 16), rows(4, 48))
    assert gw.QuantizeLinears(activations="int8")(program)
    assert "linear_int8_dynamic" in str(program)


def test_a_weight_with_two_inputs_keeps_no_scales_of_either() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.linear(torch.tanh(self.linear(x)))
            return result

    program = gw.trace(Twice(), rows(4, 32))
    item = gw.QuantizeLinears(activations="int8", activation_ranges="static", calibration=[rows(64, 32)])
    assert item(program)
    assert str(program).count("linear_int8_dynamic(") == 2
    assert set(program.tensors()) == {"linear.qweight", "linear.scales", "linear.bias"}


def test_static_ranges_need_calibration_data() -> None:
    with pytest.raises(gw.InputError, match="needs calibration data.*activation_ranges='static'"):
        gw.QuantizeLinears(activations="int8", activation_ranges="static")


def test_data_that_overflow_are_named() -> None:
    class Grown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.linear(x * 1e30 * 1e30)
            return result

    program = gw.trace(Grown(), torch.zeros(2, 8))
    before = str(program)
    with pytest.raises(gw.InputError, match="NaN or infinite on the calibration data .*'linear.weight'"):
        gw.QuantizeLinears(activations="int8", calibration=[rows(4, 8)])(program)
    assert str(program) == before
