"""Sparse linears: the dense kernels' results to the last bit, on every instruction set, for any number of threads."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.backends.cpu import CpuBackend, features, native_status
from graphwright.backends.cpu.features import ISA_VARIABLE
from graphwright.backends.cpu.kernels import sparse_linear
from graphwright.backends.cpu.kernels.byte_linear import ByteLinear
from graphwright.backends.cpu.kernels.byte_packing import pack_int8, pack_nbits
from graphwright.backends.cpu.kernels.float_linear import FloatLinear, NbitsLinear, pack_floats
from graphwright.backends.cpu.kernels.sparse_cost import _FEW_ROWS, _TABLE, least_sparsity
from graphwright.backends.cpu.kernels.sparse_linear import SparseLinear
from graphwright.backends.cpu.kernels.sparse_packing import PackedSparse, pack_sparse
from graphwright.frontends.huggingface import load_decoder
from graphwright.ir import ops
from graphwright.ir.errors import BackendError
from graphwright.ir.ops.quantization import pack
from graphwright.ir.ops.sparse import compress, pack_codes
from graphwright.ir.ops.sparse_int8 import stored_values

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)

UNIT = 2.0**-24
ROWS = (0, 1, 2, 3, 4, 5, 9)
# (outputs, columns): around panels of 64, steps of four columns and blocks of 128 steps.
SHAPES = [(1, 1), (3, 5), (33, 7), (64, 64), (65, 127), (130, 520)]
SHARES = (0.0, 0.2, 0.6, 1.0)
# Instruction sets that run the kernels of AVX512_VBMI2.
VBMI2 = ("avx512_vbmi2", "avx512_bf16", "amx")


def isas() -> list[str]:
    return [isa.name for isa in features().instruction_sets if isa.usable]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def stored_at(outputs: int, columns: int, share: float, block: int = 1) -> torch.Tensor:
    """Which weights are there, so many columns alike; one row has none."""
    drawn = torch.rand(outputs, -(-columns // block), generator=torch.Generator().manual_seed(outputs)) < share
    stored = drawn.repeat_interleave(block, 1)[:, :columns]
    stored[outputs // 2] = share == 1.0
    return stored


def sparse_floats(weight: torch.Tensor) -> PackedSparse:
    return pack_sparse(*compress(weight, weight != 0), None, None, "float", 0, weight.shape[1])


class Coded:
    """A weight of codes, packed for the sparse and for the dense kernels."""

    def __init__(
        self,
        bits: int,
        outputs: int,
        columns: int,
        group: int,
        share: float,
        *,
        zeros: bool,
        half: bool = False,
        block: int = 1,
    ) -> None:
        draw = torch.Generator().manual_seed(outputs + columns)
        groups = -(-columns // group)
        self.group, format = group, f"int{bits}"
        self.zeros = torch.randint(0, 2**bits, (outputs, groups), generator=draw, dtype=torch.uint8) if zeros else None
        self.scales = torch.rand(outputs, groups, generator=draw) + 0.1
        if half:
            self.scales = self.scales.half()
        middle = torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.uint8)
        wide = (middle if self.zeros is None else self.zeros).repeat_interleave(group, 1)[:, :columns]
        codes = torch.randint(0, 2**bits, (outputs, columns), generator=draw, dtype=torch.uint8)
        codes = torch.where(stored_at(outputs, columns, share, block), codes, wide)
        self.weight = (codes.double() - wide.double()) * self.scales.double().repeat_interleave(group, 1)[:, :columns]
        mask, values, offsets = compress(codes, codes != wide)
        values = pack_codes(values, format)
        self.sparse = pack_sparse(mask, values, offsets, self.scales, self.zeros, format, group, columns)
        whole = group if group * bits % 8 == 0 else None
        if whole is not None:
            self.dense = pack_nbits(pack(codes, bits, group, self.zeros), self.scales, self.zeros, bits, columns)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, NaN in the same places."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


# -- floats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", SHAPES)
def test_floats_are_the_dense_kernels(shape: tuple[int, int], share: float) -> None:
    outputs, columns = shape
    weight, bias = random(outputs, columns) * stored_at(outputs, columns, share), random(outputs)
    packed, dense = sparse_floats(weight), FloatLinear(pack_floats(weight), "scalar", bias)
    for rows in ROWS:
        x, residual = random(rows, columns), random(rows, outputs, seed=1)
        wanted = x.double() @ weight.double().t() + bias.double()
        # One rounding for each product's addition, and one for the bias (Higham 2002, lemma 3.1).
        error = (columns + 8) * UNIT
        bound = error * (x.double().abs() @ weight.double().abs().t() + bias.double().abs())
        for isa in isas():
            kernel = SparseLinear(packed, isa, "float32", bias)
            found = kernel(x)
            assert ((found.double() - wanted).abs() <= bound).all(), (isa, rows)
            if outputs > 32:  # narrower dense linears have another kernel
                assert same(found, dense(x)), (isa, rows)
            after = (found.double() + residual.double() - kernel(x, None, residual).double()).abs()
            assert (after <= UNIT * (found.double() + residual.double()).abs() * 1.01).all()


@pytest.mark.parametrize("rows", [31, 32, 33, 64, 129, 300])
def test_many_rows_skip_zeros_to_the_same_sums(rows: int) -> None:
    """Tiles of rows, columns in halves of blocks, and a weight so dense that nothing is skipped."""
    for outputs, columns, share in ((65, 127, 0.2), (64, 129, 0.0), (130, 320, 0.3), (70, 64, 0.9)):
        weight, bias = random(outputs, columns) * stored_at(outputs, columns, share), random(outputs)
        x, residual = random(rows, columns), random(rows, outputs, seed=1)
        dense, packed = FloatLinear(pack_floats(weight), "scalar", bias), sparse_floats(weight)
        dense.activation = "relu"
        wanted = dense(x, None, residual)
        for isa in isas():
            for gather in (False, True):
                kernel = SparseLinear(packed, isa, "float32", bias, gather=gather)
                kernel.activation = "relu"
                assert same(kernel(x, None, residual), wanted), (isa, gather)


@pytest.mark.parametrize("share", SHARES)
def test_bfloat16_weights_are_exact_in_float32(share: float) -> None:
    weight = (random(70, 133) * stored_at(70, 133, share)).bfloat16()
    for rows in (1, 3, 40):
        x = random(rows, 133)
        for isa in isas():
            wanted = SparseLinear(sparse_floats(weight.float()), isa, "float32")(x)
            for gather in (False, True):
                assert same(SparseLinear(sparse_floats(weight), isa, "float32", gather=gather)(x), wanted), isa


# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounded_activations_are_the_dense_kernels(shape: tuple[int, int], bits: int, zeros: bool) -> None:
    outputs, columns = shape
    bias = random(outputs)
    for share in SHARES:
        for group in (columns + -columns % 8, 32, 8):
            case = Coded(bits, outputs, columns, group, share, zeros=zeros, half=group == 32)
            dense = ByteLinear(case.dense, "scalar", "symmetric", bias)
            for rows in ROWS:
                x = random(rows, columns)
                wanted = dense(x)
                for isa in isas():
                    found = SparseLinear(case.sparse, isa, "int8", bias)(x)
                    assert same(found, wanted), (isa, rows, share, group)


def test_rounded_activations_are_within_their_step() -> None:
    """Against float64: each activation is off by half a step, of its row's largest value over 127."""
    for bits in (8, 4):
        case = Coded(bits, 70, 96, 96, 0.3, zeros=False)
        x = random(5, 96)
        step = x.abs().amax(1, keepdim=True).double() / 127
        bound = 0.5 * step * case.weight.abs().sum(1) * (1 + 1e-5)
        for isa in isas():
            found = SparseLinear(case.sparse, isa, "int8")(x)
            assert ((found.double() - x.double() @ case.weight.t()).abs() <= bound).all(), isa


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_float_activations(bits: int, zeros: bool, compute: str) -> None:
    for (outputs, columns), group in (((3, 5), 8), ((65, 127), 32), ((70, 130), 136), ((66, 96), 24)):
        case = Coded(bits, outputs, columns, group, 0.4, zeros=zeros)
        bias = random(outputs)
        for rows in (1, 3, 7, 40):
            x = random(rows, columns)
            wanted = x.double() @ case.weight.t() + bias.double()
            size = x.double().abs() @ case.weight.abs().t()
            for isa in isas():
                found = SparseLinear(case.sparse, isa, compute, bias)(x)
                dense = NbitsLinear(case.dense, group, isa, bias, bfloat16=compute == "bfloat16")(x)
                unit = 2.0**-8 if compute == "bfloat16" and rows > 8 else UNIT
                # Products of codes and of zero points are summed apart, and each is rounded as a float is.
                apart = x.double().abs() @ (2**bits * case.scales.double().repeat_interleave(group, 1)[:, :columns]).t()
                bound = (columns + 8) * UNIT * apart + 4 * unit * size + UNIT * (wanted.abs() + bias.double().abs())
                assert ((found.double() - wanted).abs() <= bound).all(), (isa, rows)
                if bits == 8:
                    assert same(found, dense), (isa, rows)


def gathering(case: Coded, isa: str, bias: torch.Tensor | None = None, **options: Any) -> SparseLinear:
    return SparseLinear(case.sparse, isa, "int8", bias, gather=True, **options)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (64, 63), (65, 64), (66, 65), (130, 127), (70, 1030)])
def test_gathered_columns_are_the_dense_kernels(shape: tuple[int, int], bits: int) -> None:
    """Windows of 64 columns and their ends, tiles of six rows, outputs of which some are far behind the others."""
    outputs, columns = shape
    bias = random(outputs)
    for share in (0.0, 0.02, 0.2, 0.6, 1.0):
        case = Coded(bits, outputs, columns, columns + -columns % 8, share, zeros=False, half=share == 0.2)
        dense = ByteLinear(case.dense, "scalar", "symmetric", bias)
        dense.activation = "relu"
        kernels = [gathering(case, isa, bias) for isa in isas()]
        for rows in (0, 1, 4, 5, 6, 7, 12, 13, 31, 200):
            x, residual = random(rows, columns), random(rows, outputs, seed=1)
            if rows == 13:
                x[3, columns // 2] = math.nan
            wanted = dense(x, None, residual)
            for kernel in kernels:
                kernel.activation = "relu"
                assert same(kernel(x, None, residual), wanted), (kernel.label, rows, share)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (64, 64), (65, 383), (70, 390), (130, 1030)])
def test_blocks_are_the_dense_kernels(shape: tuple[int, int], bits: int) -> None:
    """Blocks of four columns: ends of a chunk of 96 steps, of tiles of 64 rows and of vectors of 16."""
    outputs, columns = shape
    bias = random(outputs)
    for share in (0.1, 0.5):
        case = Coded(bits, outputs, columns, columns + -columns % 8, share, zeros=False, half=share == 0.5, block=4)
        dense = ByteLinear(case.dense, "scalar", "symmetric", bias)
        dense.activation = "relu"
        kernels = [gathering(case, isa, bias) for isa in isas()]
        if columns > 8:
            wanted_blocks = [blocks_of(case) if isa in VBMI2 else 0 for isa in isas()]
            assert [kernel._kernel.blocks for kernel in kernels] == wanted_blocks
        for rows in (0, 1, 4, 5, 15, 16, 17, 33, 63, 64, 65, 130):
            x, residual = random(rows, columns), random(rows, outputs, seed=1)
            if rows == 17:
                x[3, columns // 2] = math.nan
            wanted = dense(x, None, residual)
            for kernel in kernels:
                kernel.activation = "relu"
                assert same(kernel(x, None, residual), wanted), (kernel.label, rows, share)


def blocks_of(case: Coded) -> int:
    """Blocks of four columns of an output of which a weight is stored."""
    outputs, columns = case.weight.shape
    wide = nn.functional.pad(case.weight != 0, (0, -columns % 4)).view(outputs, -1, 4)
    return int(wide.any(2).sum())


def test_blocks_are_taken_where_zeros_come_in_blocks() -> None:
    """Random zeros leave something of most blocks: outputs have their own columns then, as is less work."""
    for isa in isas():
        for share, block in ((0.2, 4), (0.2, 1), (0.5, 2), (1.0, 1)):
            kernel = gathering(Coded(8, 128, 1024, 1024, share, zeros=False, block=block), isa)
            own = kernel._kernel
            assert (own.gathered_steps > 0, own.blocks > 0) == (
                (isa in VBMI2 and block < 4 and share < 1, isa in VBMI2 and (block == 4 or share == 1))
            ), (isa, share, block)
            assert ("by blocks of four columns" in kernel.label) == (own.blocks > 0)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("rounding", ["shifted", "fixed"])
def test_grids_with_a_zero_point_are_the_dense_kernels(rounding: str, block: int) -> None:
    """In registers with a few rows, gathered, in blocks or expanded with more; infinity and NaN in one of them."""
    for outputs, columns, share in ((1, 1, 1.0), (33, 7, 0.5), (65, 127, 0.2), (70, 260, 0.05)):
        draw = torch.Generator().manual_seed(columns)
        weight = torch.randint(-128, 128, (outputs, columns), generator=draw).to(torch.int8)
        weight *= stored_at(outputs, columns, share, block)
        scales, bias = torch.rand(outputs, generator=draw) + 0.1, random(outputs)
        steps, zero = (torch.rand(columns, generator=draw) * 0.02 + 0.01, 101) if rounding == "fixed" else (None, 0)
        mask, values, offsets = compress(stored_values(weight), weight != 0)
        packed = pack_sparse(mask, values, offsets, scales.unsqueeze(1), None, "int8", columns, columns)
        dense = ByteLinear(pack_int8(weight, scales), "scalar", rounding, bias, steps, zero)
        for isa in isas():
            for gather in (False, True):
                kernel = SparseLinear(packed, isa, "int8", bias, rounding, steps, zero, gather)
                for rows in (1, 3, 4, 5, 7, 13):
                    x = random(rows, columns)
                    if rows == 13:
                        x[2, 0], x[5, columns // 2] = math.inf, math.nan
                    assert same(kernel(x), dense(x)), (kernel.label, rows)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("static", [False, True])
def test_rounded_activations_in_a_program(
    static: bool, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Mlp().eval(), random(max(rows, 2), 64)
    quantise = gw.QuantizeLinears(bits=8, activations="int8", calibration=[random(99, 64)] if static else None)
    programs = []
    for more in ([], [gw.CompressLinears(min_sparsity=0.0)]):
        program = gw.trace(model, x)
        for item in (quantise, *more):
            item(program)
        programs.append(program)
    wanted = CpuBackend().lower(programs[0])(x)[0]
    for isa in isas():
        monkeypatch.setenv(ISA_VARIABLE, isa)
        small = CpuBackend().lower(programs[1])
        label = small.explain()[0].kernel
        if least_sparsity(isa, "int8", len(x), gathers=True) is None:
            assert label.startswith("byte_linear ")
            assert "; dense, as the dense kernel is faster" in label
        else:
            assert label.startswith("sparse_linear avx512_vbmi2, int8 weights of which 8")
            assert f"rounded to int8 ({'fixed' if static else 'shifted'})" in label
            assert ("more than a few rows" in label) == (len(x) > 4)
        assert torch.equal(small(x)[0], wanted), isa
    monkeypatch.delenv(ISA_VARIABLE)
    whole = gw.optimize(model, [quantise, gw.CompressLinears()], example_inputs=(x,), target="cpu")
    whole.save_packed(tmp_path / "model.packed")
    loaded = gw.load_packed(tmp_path / "model.packed")
    assert torch.equal(loaded(x), whole(x))
    assert whole.explain()[0].kernel.startswith(loaded.explain()[0].kernel)  # without its reason for being chosen


def test_ranges_of_the_whole_tensor_run_the_reference() -> None:
    model, x = Mlp().eval(), random(40, 64)
    passes = [gw.QuantizeLinears(bits=8, activations="int8", activation_ranges="per_tensor"), gw.CompressLinears()]
    use = gw.optimize(model, passes, example_inputs=(x,), target="cpu").explain()[0]
    assert (use.kernel, use.reason) == ("reference", "ranges of the whole tensor have no kernel; per token they have")


def test_codes_at_the_ends_of_their_range_are_summed_exactly() -> None:
    """Every product as large as it can be: the sums are those of integers, in float64."""
    codes = torch.where(torch.arange(512) % 2 == 0, 0, 255).to(torch.uint8).repeat(64, 1)
    mask, values, offsets = compress(codes, codes != 128)
    packed = pack_sparse(mask, values, offsets, torch.ones(64, 1), None, "int8", 512, 512)
    x = torch.where(torch.arange(512) % 2 == 0, -127.0, 127.0).repeat(8, 1)
    wanted = (x.double() @ (codes.double() - 128).t()).float()
    for isa in isas():
        assert same(SparseLinear(packed, isa, "int8", gather=True)(x), wanted), isa


def test_outputs_take_what_they_have_of_a_window() -> None:
    """Of 4096 columns with a fifth of them stored at random, hardly more products than the fullest output needs."""
    case = Coded(8, 64, 4096, 4096, 0.2, zeros=False)
    fullest = int((case.weight != 0).sum(1).max())
    for isa in isas():
        steps = gathering(case, isa)._kernel.gathered_steps
        if isa in VBMI2:
            assert -(-fullest // 4) <= steps <= 1.15 * fullest / 4
        else:
            assert steps == 0


def test_columns_are_gathered_where_that_is_faster() -> None:
    class Sparse(nn.Module):
        def __init__(self, share: float, block: int) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.up = nn.Linear(256, 128)
            with torch.no_grad():
                self.up.weight *= (torch.rand(128, 256 // block) < share).repeat_interleave(block, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.up(x)
            return y

    x, isa = random(128, 256), str(features().selected)
    for share, block in ((0.2, 1), (0.6, 1), (0.9, 1), (0.2, 4), (0.6, 4)):
        least = least_sparsity(isa, "int8", 128, gathers=True, blocks=block == 4)
        program = gw.trace(Sparse(share, block).eval(), x)
        for item in (gw.QuantizeLinears(bits=8), gw.CompressLinears(min_sparsity=0.0)):
            item(program)
        small = CpuBackend(compute="int8").lower(program)
        label = small.explain()[0].kernel
        if least is not None and 1 - share >= least:
            assert label.startswith("sparse_linear ")
            assert ("more than a few rows by blocks of four columns" in label) == (block == 4)
            assert ("of the dense kernel's products" in label) == (block == 1)
            assert label.endswith(f"; faster than dense from {least:.0%} zeros on")
        else:
            assert label.startswith("byte_linear ")
            assert "; dense, as " in label
    assert least_sparsity("scalar", "int8", 128, gathers=True) is None
    assert least_sparsity("avx512_bf16", "int8", 128) is None
    gained = least_sparsity("avx512_bf16", "int8", 128, gathers=True)
    assert gained is not None
    assert 0.25 < gained < 0.4
    by_blocks = least_sparsity("avx512_bf16", "int8", 128, gathers=True, blocks=True)
    assert by_blocks is not None
    assert gained < by_blocks < 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    weight = random(70, 40) * stored_at(70, 40, 0.3)
    for rows in (1, 6, 40):
        x = random(rows, 40)
        x[0, 7] = bad
        wanted = ops.get("linear_sparse").target(x, *compress(weight, weight != 0), None, None, None, "float", 0)
        case = Coded(8, 70, 40, 40, 0.3, zeros=False)
        for isa in isas():
            found = SparseLinear(sparse_floats(weight), isa, "float32")(x)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
            rounded = SparseLinear(case.sparse, isa, "int8")(x)
            assert rounded[0].isnan().all()
            assert rounded[1:].isfinite().all()
    weight[3, 5] = bad
    for isa in isas():
        found = SparseLinear(sparse_floats(weight), isa, "float32")(torch.ones(1, 40))
        assert not found[0, 3].isfinite()
        assert found.isfinite().sum() == 69


@pytest.mark.parametrize("rows", [1, 4, 70])
def test_the_number_of_threads_changes_nothing(rows: int) -> None:
    weight, x = random(700, 300) * stored_at(700, 300, 0.3), random(rows, 300)
    case = Coded(4, 700, 300, 304, 0.3, zeros=True)
    before = torch.get_num_threads()
    try:
        for isa in isas():
            kernels = (
                SparseLinear(sparse_floats(weight), isa, "float32"),
                SparseLinear(case.sparse, isa, "int8"),
                gathering(Coded(8, 700, 300, 304, 0.3, zeros=False), isa),
                gathering(Coded(8, 700, 300, 304, 0.3, zeros=False, block=4), isa),
                SparseLinear(case.sparse, isa, "float32"),
            )
            for kernel in kernels:
                found = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    found.append(kernel(x))
                assert all(torch.equal(each, found[0]) for each in found), isa
    finally:
        torch.set_num_threads(before)


def test_what_is_streamed_is_a_bit_for_each_weight_and_the_values() -> None:
    case = Coded(8, 128, 512, 512, 0.2, zeros=False)
    count = int((case.weight != 0).sum())
    assert case.sparse.count == count
    assert case.sparse.masks.nbytes == 128 * 512 // 8
    assert case.sparse.values.nbytes == count + 64
    weight = random(128, 64) * stored_at(128, 64, 0.2)
    packed = sparse_floats(weight)
    assert (packed.masks.nbytes, packed.values.nbytes) == (128 * 64 // 8, 4 * int((weight != 0).sum()) + 64)


# -- in programs -------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two sparse linears with an activation and a residual."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96, dtype=dtype), nn.Linear(96, 64, dtype=dtype)
        with torch.no_grad():
            for linear in (self.up, self.down):
                linear.weight *= torch.rand(linear.weight.shape) < 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return y


def test_it_runs_in_a_program_with_its_epilogues_and_from_a_file(tmp_path: Path) -> None:
    model, x = Mlp().eval(), random(3, 64)
    small = gw.optimize(model, [gw.CompressLinears()], example_inputs=(x,), target="cpu")
    kernels = [use.kernel for use in small.explain()]
    if least_sparsity(str(features().selected), "float32", 3) is None:
        assert "the dense kernel is faster with 3 rows, whatever the share of zeros" in kernels[0]
    else:
        assert kernels[0].startswith("sparse_linear ")
        assert "float32 weights of which 8" in kernels[0]
        assert kernels[1].startswith("epilogue of sparse_linear")
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    small.save_packed(tmp_path / "model.packed")
    assert torch.equal(gw.load_packed(tmp_path / "model.packed")(x), small(x))


@pytest.mark.parametrize("compute", ["float32", "int8"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_run_as_the_dense_ones(bits: int, compute: str) -> None:
    model, x = Mlp().eval(), random(2, 64)
    passes = [gw.QuantizeLinears(bits=bits, group_size=32)]
    dense, sparse = (
        gw.optimize(model, [*passes, *more], example_inputs=(x,), target=CpuBackend(compute=compute))
        for more in ([], [gw.CompressLinears()])
    )
    label = sparse.explain()[0].kernel
    if compute == "float32":
        assert label.startswith("nbits_linear ")
        assert "dense, as zeros of codes save time only where activations are rounded" in label
    elif features().selected in VBMI2:
        assert label.startswith("sparse_linear avx512_vbmi2")
        assert "faster than dense from" in label
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8, 128])
def test_the_dense_kernel_runs_where_it_is_faster_and_says_from_where_on_zeros_pay(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Mlp().eval(), random(rows, 64)
    with torch.no_grad():
        model.down.weight.copy_(random(64, 96) * (random(64, 96).abs() > 0.02))
    program = gw.trace(model, x)
    gw.CompressLinears(min_sparsity=0.0)(program)
    for isa in isas():
        monkeypatch.setenv(ISA_VARIABLE, isa)
        small = CpuBackend().lower(program)
        labels = [use.kernel for use in small.explain() if use.op == "graphwright.linear_sparse"]
        seen = max(rows, 2)  # a size that varies is never traced as 1
        least = least_sparsity(isa, "float32", seen, gathers=True)
        for label, zeros in zip(labels, (0.8, 0.02), strict=True):
            if least is None:
                assert label.startswith("float_linear ")
                assert f"the dense kernel is faster with {seen} rows, whatever the share of zeros" in label
            elif zeros < least:
                assert label.startswith("float_linear ")
                assert f"with {seen} rows {least:.0%} would pay" in label
            else:
                assert label.startswith("sparse_linear ")
                assert label.endswith(f"faster than dense from {least:.0%} zeros on")
        torch.testing.assert_close(small(x)[0], model(x), rtol=1e-5, atol=1e-5)


def test_more_zeros_never_make_a_sparse_linear_slower() -> None:
    for (isa, kind), costs in _TABLE.items():
        few = _FEW_ROWS[isa]
        for rows in (1, 4, 8, 32, 128, 512):
            for gathers in (False, "int" in kind):
                costing = partial(costs.sparse, rows, few=few, skips=kind == "float32", gathers=gathers)
                times = [costing(share / 20) for share in range(9)]
                assert times == sorted(times), (isa, kind, rows)


def test_what_has_no_kernel_runs_the_reference_and_says_why() -> None:
    double, x = Mlp(torch.float64).eval(), random(2, 64).double()
    small = gw.optimize(double, [gw.CompressLinears()], example_inputs=(x,), target="cpu")
    use = small.explain()[0]
    assert (use.kernel, use.reason) == ("reference", "the kernels compute in float32")
    torch.testing.assert_close(small(x), double(x))


def test_operands_that_do_not_fit_are_refused() -> None:
    weight = random(70, 40) * stored_at(70, 40, 0.3)
    kernel = SparseLinear(sparse_floats(weight), isas()[-1], "float32")
    with pytest.raises(BackendError, match="40 features"):
        kernel(torch.zeros(2, 39))
    with pytest.raises(ValueError, match="number of columns"):
        kernel._kernel.run(np.zeros((2, 39), np.float32), np.zeros((2, 70), np.float32), 1)
    with pytest.raises(ValueError, match="wrong shape"):
        kernel._kernel.run(np.zeros((2, 40), np.float32), np.zeros((2, 69), np.float32), 1)
    with pytest.raises(ValueError, match="multiplied as floats"):
        SparseLinear(sparse_floats(weight), isas()[-1], "int8")
    for options in ({"rounding": "shifted"}, {"gather": True}):
        grouped = Coded(8, 70, 40, 8, 0.3, zeros=False)
        with pytest.raises(ValueError, match="one group without zero points is needed"):
            SparseLinear(grouped.sparse, isas()[-1], "int8", None, **options)
        with pytest.raises(ValueError, match="only"):
            SparseLinear(grouped.sparse, isas()[-1], "float32", None, **options)
    with pytest.raises(ValueError, match="only rounded activations have a grid"):
        SparseLinear(sparse_floats(weight), isas()[-1], "float32", None, "shifted")
    mask, values, offsets = compress(weight, weight != 0)
    with pytest.raises(ValueError, match="as many values"):
        pack_sparse(mask, values[:-1], offsets, None, None, "float", 0, 40)
    with pytest.raises(ValueError, match="other values than its offsets"):
        pack_sparse(mask ^ 1, values, offsets, None, None, "float", 0, 40)


def test_decoders_run_them_without_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v are merged before they are compressed; merging afterwards is refused."""
    pytest.importorskip("transformers")
    decoders = pytest.importorskip("tests.frontends.decoders")
    monkeypatch.setattr(sparse_linear, "least_sparsity", lambda *_, **__: 0.5)  # whatever this CPU has
    model = decoders.make("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight *= random(*weight.shape).abs() > 1.2
    program = load_decoder(model)
    for item in (gw.Cleanup(), gw.FuseAll(), gw.QuantizeLinears(bits=8, group_size=32)):
        item(program)
    sparse, backend = program.clone(), CpuBackend(compute="int8")
    assert gw.CompressLinears()(sparse)
    dense, small = (backend.lower(each) for each in (program, sparse))
    kernels = [use.kernel for use in small.explain() if use.op == "graphwright.linear_sparse"]
    assert len(kernels) >= 4
    assert all(kernel.startswith("sparse_linear ") for kernel in kernels)
    tokens = [[5, 17, 30, 44, 3]]
    found, wanted = (decoders.greedy(each.session(slots=1, capacity=20), tokens, [0], 6) for each in (small, dense))
    assert found == wanted


def test_linears_are_merged_before_they_are_compressed() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8, bias=False) for _ in range(3))
            for linear in (self.query, self.key, self.value):
                nn.init.zeros_(linear.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.query, self.key, self.value))
            return nn.functional.scaled_dot_product_attention(*parts)

    program = gw.trace(Attention(), random(2, 3, 8))
    assert gw.CompressLinears()(program)
    assert any("merge linears before that" in refusal.reason for refusal in gw.FuseQKV().refusals(program))
