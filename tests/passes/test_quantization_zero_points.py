"""Zero points that lie between codes, and even ranges: grids as other libraries have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.ops.quantization import dequantize
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding.descent import dense
from graphwright.passes.quantization.rounding.gptq import gptq
from graphwright.passes.quantization.rounding.hqq import Hqq
from graphwright.passes.quantization.weights import pack_codes, quantize_weight

GENERATOR = torch.Generator().manual_seed(5)
# The last group is shorter; a few rows lie to one side.
WEIGHT = torch.randn(24, 80, generator=GENERATOR) + torch.linspace(-2, 2, 24).unsqueeze(1)
X = torch.randn(3, 80, generator=GENERATOR)
FLOATS: dict[str, Any] = {"group_size": 32, "symmetric": False, "float_zero_points": True}


def form(bits: int, *, clip_search: bool = False, floats: bool = True) -> Format:
    return Format(bits, 32, False, clip_search, float_zeros=floats)


def linear() -> gw.Program:
    module = nn.Linear(80, 24)
    with torch.no_grad():
        module.weight.copy_(WEIGHT)
    return gw.trace(module, X)


def published(weight: torch.Tensor, bits: int, group: int, *, whole_start: bool) -> torch.Tensor:
    """The solver of Badri and Shaji 2023 as its authors wrote it (hqq 0.2.8, optimize_weights_proximal_legacy)."""
    values = weight.reshape(-1, group)
    most, beta = float(2**bits - 1), 10.0
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scale = most / (high - low)
    zero = (-low * scale).round() if whole_start else -low * scale
    least = float("inf")
    for _ in range(20):
        codes = (values * scale + zero).round().clamp(0, most)
        error = values - (codes - zero) / scale
        mean = float(error.abs().mean())
        error = error.sign() * (error.abs() - error.abs().pow(-0.3) / beta).clamp_min(0)
        zero, beta = (codes - (values - error) * scale).mean(1, keepdim=True), beta * 1.01
        if mean >= least:
            break
        least = mean
    codes = (values * scale + zero).round().clamp(0, most)
    return ((codes - zero) / scale).reshape(weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip_search", [False, True])
def test_what_is_packed_is_what_was_fitted(bits: int, clip_search: bool) -> None:
    own = form(bits, clip_search=clip_search)
    packed = quantize_weight(WEIGHT, own)
    zeros = packed.zero_points
    assert zeros is not None
    assert zeros.dtype == torch.float16
    assert bool((zeros != zeros.round()).any())
    found = dequantize(packed.qweight, packed.scales, zeros, bits, 80, torch.float32)
    for index, piece in enumerate(WEIGHT.split(32, dim=1)):
        columns = slice(32 * index, 32 * index + piece.shape[1])
        scale, zero = packed.scales[:, index].float(), zeros[:, index].float()
        assert torch.equal(found[:, columns], own.values(own.round(piece, scale, zero), scale, zero))
        if not clip_search:  # the range is the full one, so nothing is further off than half a step
            error = (found[:, columns] - piece).abs()
            assert bool((error <= 0.51 * scale.abs().unsqueeze(1)).all())
    error = float((found - WEIGHT).norm() / WEIGHT.norm())
    assert packed.loss.relative == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("whole_start", [False, True])
def test_hqq_is_the_published_solver(bits: int, whole_start: bool) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) / 20
    own = Format(bits, 64, False, True, float_zeros=True)
    found = dense(Hqq(fit_scale=False, whole_start=whole_start).codes(weight, own), own)
    theirs, otherwise = (published(weight, bits, 64, whole_start=start) for start in (whole_start, not whole_start))
    half_step = (weight.reshape(-1, 64).amax(1) - weight.reshape(-1, 64).amin(1)).min() / (2**bits - 1) / 2
    # Ours are stored in half precision, so that a weight moves by 2⁻¹¹ of the codes for the scale, and as much for the
    # zero point, in steps: so many fall to the other side of the middle between two codes.
    moved = 2 * 2**bits / 2**11
    assert float(((found - theirs).abs() > half_step).float().mean()) < moved
    assert float(((found - otherwise).abs() > half_step).float().mean()) > 2 * moved
    errors = [float((each - weight).norm()) for each in (found, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=4e-3)  # it may end a step sooner or later


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_is_closer_with_zero_points_between_codes(bits: int) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) / 20
    floats, whole = (
        Hqq(fit_scale=False).codes(weight, form(bits, floats=between)).loss.relative for between in (True, False)
    )
    assert floats < 0.97 * whole


def test_gptq_keeps_them() -> None:
    moment = X.T @ X + 0.1 * torch.eye(80)
    own = form(3, clip_search=True)
    found = gptq(WEIGHT, moment, own)
    packed = pack_codes(found, own)
    assert torch.equal(packed.dense(), dense(found, own))
    assert found.loss.relative < 0.2


def test_groups_of_zeros_and_equal_weights() -> None:
    for weight in (torch.zeros(4, 32), torch.full((4, 32), 0.37), torch.full((4, 32), -1e-3)):
        for clip_search in (False, True):
            found = quantize_weight(weight, form(3, clip_search=clip_search)).dense()
            assert torch.allclose(found, weight, rtol=2e-3, atol=0)


@pytest.mark.parametrize("rounding", ["nearest", "hqq", "gptq"])
def test_the_pass(rounding: str, tmp_path: Path) -> None:
    program = linear()
    data = {"calibration": [(torch.randn(64, 80),), (torch.randn(64, 80),)]} if rounding == "gptq" else {}
    assert gw.QuantizeLinears(bits=3, rounding=rounding, **FLOATS, **data)(program)
    gw.verify(program)
    assert program.tensors()["zero_points"].dtype == torch.float16
    program.save(tmp_path / "program")
    assert torch.equal(gw.Program.load(tmp_path / "program")(X), program(X))


def test_backends_say_why_they_have_no_kernel(tmp_path: Path) -> None:
    program = linear()
    assert gw.QuantizeLinears(bits=4, **FLOATS)(program)
    lowered = gw.CpuBackend().lower(program)
    assert "its zero points are floats" in str(lowered.explain())
    torch.testing.assert_close(lowered(X)[0], program(X))
    with pytest.raises(gw.ExportError, match="zero points between codes"):
        gw.export_onnx(program, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"symmetric": True}, "no zero points to choose"),
        ({"symmetric": True, "dtype": "nf4"}, "no zero points to choose"),
        ({"bits": 4, "activations": "int8"}, "whole zero points"),
        ({"rounding": "autoround", "calibration": [(X,)]}, "tunes whole zero points"),
    ],
)
def test_what_they_do_not_go_with(options: dict[str, Any], words: str) -> None:
    with pytest.raises(gw.InputError, match=words) as caught:
        gw.QuantizeLinears(**{"bits": 3, **FLOATS, **options})
    assert "float_zero_points" in str(caught.value)


# -- even ranges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_even_ranges_are_those_of_other_libraries(bits: int) -> None:
    program = linear()
    options: dict[str, Any] = {"bits": bits, "group_size": 80, "clip_search": False}
    assert gw.QuantizeLinears(**options, even_range=True)(program)
    half = 2 ** (bits - 1)
    # torchao's choose_qparams_affine and GPTQModel's find_params: (max - min) / (qmax - qmin) of ±|w|.
    largest = WEIGHT.abs().amax(1, keepdim=True)
    scale = 2 * largest / (2**bits - 1)
    steps = WEIGHT.double() / scale
    # The largest are ties, up to the rounding of the quotient; they go to the even code, which is the outer one.
    theirs = torch.where(WEIGHT.abs() == largest, WEIGHT.sign() * half, steps.round()).clamp(-half, half - 1) * scale
    x = torch.eye(80)
    found = (program(x) - program.tensors()["bias"]).T
    # Scales of half precision that are a step less: codes next to the middle between two may be others.
    same = (found - theirs).abs() <= 2e-3 * theirs.abs() + 1e-6
    near = ((steps - steps.floor()) - 0.5).abs() <= 2e-3 * steps.abs()
    assert bool((same | (near & (WEIGHT.abs() < largest))).all())
    assert float(same.float().mean()) > (0.95 if bits < 8 else 0.5)


@pytest.mark.parametrize(
    "options",
    [{"clip_search": True}, {"symmetric": False}, {"dtype": "fp4"}, {"activations": "int8", "group_size": None}],
)
def test_even_ranges_are_of_symmetric_integers(options: dict[str, Any]) -> None:
    with pytest.raises(gw.InputError, match="even_range"):
        gw.QuantizeLinears(**{"bits": 8, "group_size": 32, "clip_search": False, "even_range": True, **options})
