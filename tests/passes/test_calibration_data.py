"""Calibration data as people have it: lists, loaders, data sets, generators, transforms; and what is wrong with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import graphwright as gw
from graphwright.passes.calibration import Observed, Stream
from graphwright.passes.calibration.sufficiency import Sufficiency

X = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


class Numbers(Dataset[torch.Tensor]):
    """A data set without an end of its own, as many of torch's are."""

    def __init__(self, size: int = 5) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4, 32), float(index))


@pytest.fixture(scope="module")
def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Net(), {"x": X})


def inputs_of(program: gw.Program, given: Any) -> list[torch.Tensor]:
    with Stream(program, gw.CalibrationData.of(given)) as stream:
        return [stream.value(program.inputs[0], batch) for batch in range(stream.batches)]


def firsts(program: gw.Program, given: Any) -> list[float]:
    return [float(value[0, 0, 0]) for value in inputs_of(program, given)]


def batch_of(number: float) -> torch.Tensor:
    return torch.full((2, 4, 32), float(number))


def test_dicts_tuples_and_tensors(program: gw.Program) -> None:
    assert firsts(program, [{"x": batch_of(1)}, (batch_of(2),), batch_of(3), [batch_of(4)]]) == [1, 2, 3, 4]


def test_a_loader(program: gw.Program) -> None:
    loader = DataLoader(Numbers(), batch_size=2)
    assert firsts(program, loader) == [0, 2, 4]
    assert [len(value) for value in inputs_of(program, loader)] == [2, 2, 1]


def test_a_data_set_with_a_transform_and_a_limit(program: gw.Program) -> None:
    def transform(item: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": 10 * item.unsqueeze(0)}

    data = gw.CalibrationData(Numbers(), transform, limit=3)
    assert firsts(program, data) == [0, 10, 20]
    assert firsts(program, data) == [0, 10, 20]
    assert firsts(program, gw.CalibrationData(Numbers(2), transform)) == [0, 10]
    assert str(data) == "3 items of Numbers"


def test_a_generator_is_read_once_and_serves_twice(program: gw.Program) -> None:
    def endless() -> Iterator[torch.Tensor]:
        number = 0
        while True:
            yield batch_of(number)
            number += 1

    data = gw.CalibrationData(endless(), limit=2)
    assert firsts(program, data) == firsts(program, data) == [0, 1]
    assert str(gw.CalibrationData([batch_of(1)] * 3, limit=2)) == "2 batches"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("wikitext", "must be batches, not a str"),
        (7, "must be batches, not a int"),
        ({"x": X}, r"is one batch \(a dict\)"),
        (X, r"is one batch \(a Tensor\)"),
    ],
)
def test_what_is_no_calibration_data(given: Any, message: str) -> None:
    with pytest.raises(gw.InputError, match=message):
        gw.QuantizeLinears(bits=4, calibration=given)


@pytest.mark.parametrize("limit", [0, -1, True, 2.5])
def test_limits(limit: Any) -> None:
    with pytest.raises(gw.InputError, match="limit"):
        gw.CalibrationData([X], limit=limit)
    with pytest.raises(gw.InputError, match="must be a function"):
        gw.CalibrationData([X], transform=3)


def raising(item: int) -> torch.Tensor:
    if item == 2:
        raise ZeroDivisionError("no such thing")
    return batch_of(item)


def nothing(item: int) -> Any:
    return None


def broken() -> Iterator[torch.Tensor]:
    yield batch_of(0)
    raise OSError("disk gone")


def without_end(number: float) -> torch.Tensor:
    x = batch_of(0)
    x[1, 2, 3] = number
    return x


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there is no calibration data"),
        (gw.CalibrationData([0, 1, 2], raising), r"ZeroDivisionError: no such thing \(at calibration item 3\)"),
        (gw.CalibrationData([0], nothing), "calibration batch 1 does not fit: is a NoneType"),
        ([batch_of(0), {"y": batch_of(0)}], r"calibration batch 2 does not fit: is missing \(at argument 'x'\)"),
        ([{"x": batch_of(0), "labels": batch_of(0)}], "calibration batch 1 does not fit.*\n?.*labels"),
        ([batch_of(0), "text"], "calibration batch 2 does not fit: is a str"),
        ([batch_of(0)[..., :31]], "calibration batch 1 does not fit.*31"),
        ([batch_of(0).double()], "calibration batch 1 does not fit: has dtype torch.float64"),
        ([{"x": [1.0, 2.0]}], "calibration batch 1 does not fit"),
        ([without_end(float("nan"))], r"holds NaN or infinity \(at calibration batch 1, input 'x'\)"),
        ([batch_of(1), without_end(float("-inf"))], r"holds NaN or infinity \(at calibration batch 2, input 'x'\)"),
    ],
)
def test_errors_name_the_item(program: gw.Program, given: Any, message: str) -> None:
    with pytest.raises(gw.InputError, match=message):
        inputs_of(program, given)


def test_items_that_cannot_be_read(program: gw.Program) -> None:
    with pytest.raises(gw.InputError, match=r"cannot be read: OSError: disk gone \(at calibration item 2\)"):
        gw.CalibrationData(broken())
    Broken = type("Broken", (Numbers,), {"__getitem__": lambda self, index: 1 / (1 - index)})
    with pytest.raises(gw.InputError, match=r"ZeroDivisionError.*calibration item 2"):
        inputs_of(program, gw.CalibrationData(Broken(), batch_of))


# -- how much is enough ------------------------------------------------------------------------------------------------


def quantised(program: gw.Program, rows: int, **options: Any) -> gw.Program:
    x = torch.randn(rows, 1, 32)
    return gw.optimize(program, [gw.QuantizeLinears(bits=4, calibration=[x], **options)], example_inputs=X)


def test_too_few_rows_for_a_method_that_looks_at_moments(program: gw.Program) -> None:
    """The widest input, of ``down``, has 48 features: an error below 6 rows, a warning below 48."""
    with pytest.raises(gw.InputError, match=r"too short: 5 rows \(tokens\) for 48 features \(at .*'down.weight'"):
        quantised(program, 5)
    with pytest.warns(UserWarning, match="6 rows .* 32 input features of weight 'up.weight'") as caught:
        quantised(program, 6)
    assert sum("calibration data is short" in str(each.message) for each in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantised(program, 48)
        quantised(program, 2, rounding="nearest")


def test_inputs_that_overflow_or_are_all_padding() -> None:
    rows = torch.ones(20, 8)
    rows[3, 2] = float("inf")
    with pytest.raises(gw.InputError, match=r"is NaN or infinite .*weight 'w'"):
        Sufficiency(True).check(Observed.over([rows]), "w")
    with pytest.raises(gw.InputError, match="has no rows"):
        Sufficiency(False).check(Observed.over([torch.empty(0, 8)]), "w")


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [1, 7, 1024, 1100])
@pytest.mark.parametrize("exact", [True, False])
def test_moments_are_sums_of_products(features: int, exact: bool) -> None:
    """In panels and chunks, on the CPU's bfloat16 units where the values allow it."""
    batches = [torch.randn(size, features) for size in (3, 0, 900, 1200, 20, 4500)]
    batches = [batch.bfloat16().float() for batch in batches] if exact else batches
    rows = torch.cat(batches)
    found = Observed.over(iter(batches))
    wanted = rows.double().T @ rows.double()
    # Each entry is a sum of so many products, rounded once for each.
    bound = len(rows) * torch.finfo(torch.float32).eps * (rows.double().abs().T @ rows.double().abs())
    assert bool(((found.moment.double() - wanted).abs() <= bound).all())
    assert torch.equal(found.moment, found.moment.T)
    assert torch.equal(found.low, rows.amin(0))
    assert torch.equal(found.high, rows.amax(0))
    assert found.count == len(rows)
    assert torch.equal(found.rows, rows[:: found._stride])
    one_by_one = Observed.nothing(features)
    for batch in batches:
        one_by_one.add(batch)
    assert bool(((one_by_one.moment.double() - wanted).abs() <= bound).all())
    assert one_by_one.moment.equal(one_by_one.moment.T)
    assert one_by_one.count == len(rows)


def test_values_beyond_bfloat16_are_multiplied_in_float32() -> None:
    """Next to 1 bfloat16 has steps of 2⁻⁸: rounded to it, this sum would be 64 or 64.5."""
    rows = torch.full((64, 4), 1 + 2.0**-12)
    moment = Observed.over([rows]).moment
    torch.testing.assert_close(moment, torch.full((4, 4), 64 * (1 + 2.0**-12) ** 2), rtol=1e-6, atol=0)
    settings: Any = torch.backends.mkldnn
    assert settings.matmul.fp32_precision != "bf16"


def test_a_copy_keeps_the_moment() -> None:
    found = Observed.over([torch.randn(9, 5)])
    kept = found.moment.clone()
    found.copy().moment.zero_()
    assert torch.equal(found.moment, kept)
