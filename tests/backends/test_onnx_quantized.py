"""Quantised linears and embeddings: right in every layout, and proven to run on quantised weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import graphwright as gw
from graphwright.backends.cpu.features import features
from graphwright.backends.onnx import encodings, explain
from graphwright.backends.onnx.kernels import kernels_of
from graphwright.backends.onnx.proof import prove_quantized
from graphwright.backends.onnx.runtime import open_session
from graphwright.ir import ops
from graphwright.ir.ops import quantization


def codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def whole(columns: int, bits: int) -> int:
    """Columns of a group that has them all: even, and whole bytes."""
    return columns + -columns % max(2, quantization.codes_per_unit(bits))


class Packed(nn.Module):
    """A weight-only quantised linear with random codes."""

    def __init__(
        self, out: int, columns: int, bits: int, group: int | None, *, points: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.bits = bits
        self.group = whole(columns, bits) if group is None else group
        groups = -(-columns // self.group)
        zero = codes(out, groups, bits, 1) if points else None
        self.register_buffer("qweight", quantization.pack(codes(out, columns, bits, 2), bits, self.group, zero))
        self.register_buffer("scales", torch.rand(out, groups) * 0.1 / 2 ** (bits - 4) + 0.01)
        self.register_buffer("zero_points", zero)
        self.register_buffer("bias", torch.randn(out) if bias else None)

    def forward(self, x: torch.Tensor) -> Any:
        operands = (x, self.qweight, self.scales, self.zero_points, self.bias, self.bits, self.group)
        return ops.get("linear_nbits").target(*operands)


# (columns, group): the group divides, does not divide, is no block size, is one per row, is longer than the row.
LAYOUTS = [
    (64, 32),
    (64, 16),
    (100, 32),
    (96, 48),
    (130, 64),
    (288, 96),
    (512, 512),
    (40, None),
    (41, None),
    (384, None),
    (20, 32),
]


class Layouts(nn.Module):
    """A linear for every layout; inputs are cut from one long row."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            Packed(7, columns, bits, group, points=bool(index % 2), bias=index % 3 == 0)
            for index, (columns, group) in enumerate(LAYOUTS)
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        pairs = zip(LAYOUTS, self.linears, strict=True)
        return {f"k{columns}_g{group}": linear(x[..., :columns]) for (columns, group), linear in pairs}


ROUTES = [{}, {"mode": "portable"}]
IDS = ["runtime", "portable"]


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_layout_agrees_and_runs_quantised(tmp_path: Path, bits: int, options: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 512)
    program = gw.trace(Layouts(bits), x, dynamic={"x": {0: "batch", 1: "sequence"}})
    report = gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=[x], **options)
    assert Counter(report.quantized.values()) == {"MatMulNBits": len(LAYOUTS)}
    assert report.kernels is not None
    blocks = [
        encodings.block_size(whole(columns, bits) if group is None else group, columns) for columns, group in LAYOUTS
    ]
    # There is no kernel for 3 bits, and no DequantizeLinear of 2 is fused: such codes are written in 4.
    stored = 4 if bits == 3 or (bits == 2 and options) else bits
    wanted = Counter(f"MatMulNBits bits={stored} block={block} accuracy_level=1" for block in blocks)
    found = {row.kernel: row.count for row in report.kernels if "MatMulNBits" in row.kernel}
    assert found == wanted
    assert all(row.note == "float activations" for row in report.kernels if "MatMulNBits" in row.kernel)


class Ranks(nn.Module):
    """Linears traced from inputs of one to four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_only = nn.ModuleList(Packed(6, 32, 4, 16, bias=True) for _ in range(4))
        self.dynamic = nn.ModuleList(Dynamic(6, 32, "per_token", bias=True) for _ in range(4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        shapes = (x, x[0], x[0, 0], x[:, None] * 2)
        return [
            linear(value)
            for linears in (self.weight_only, self.dynamic)
            for linear, value in zip(linears, shapes, strict=True)
        ]


class Twice(nn.Module):
    """Two linears with one weight, as layers that share parameters have."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = Packed(32, 32, 4, 16, bias=True)
        self.dynamic = Dynamic(32, 32, "per_token", bias=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.dynamic(self.dynamic(self.packed(self.packed(x))))


class Dynamic(nn.Module):
    """A linear on int8 weights with activations rounded as they come."""

    def __init__(self, out: int, columns: int, activation: str, *, bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("qweight", torch.randint(-127, 128, (out, columns), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(out) * 0.01 + 0.001)
        self.register_buffer("bias", torch.randn(out) if bias else None)

    def forward(self, x: torch.Tensor) -> Any:
        operands = (x, self.qweight, self.scales, self.bias, self.activation)
        return ops.get("linear_int8_dynamic").target(*operands)


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_inputs_of_every_rank(tmp_path: Path, options: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 32)
    program = gw.trace(Ranks(), x, dynamic={"x": {0: "batch", 1: "sequence"}})
    report = gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=[x], **options)
    assert len(report.quantized) == 8


def test_shared_weights_are_stored_once(tmp_path: Path) -> None:
    x = torch.randn(2, 32)
    program = gw.trace(Twice(), x)
    report = gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=[x])
    assert len(report.quantized) == 4
    model = onnx.load(tmp_path / "model.onnx")
    assert sum(32 * 32 in (np.prod(each.dims), 2 * np.prod(each.dims)) for each in model.graph.initializer) == 2


def test_shared_weights_in_a_portable_file_would_run_in_float(tmp_path: Path) -> None:
    program = gw.trace(Twice(), torch.randn(2, 32))
    with pytest.raises(gw.ExportError, match="2 quantised linears would not run") as caught:
        gw.export_onnx(program, tmp_path / "model.onnx", mode="portable")
    assert "use mode='runtime'" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class DynamicLinears(nn.Module):
    """Both kinds of ranges, with and without bias, alone and sharing an input; rows of zeros and of one sign."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = Dynamic(5, 48, "per_token", bias=True)
        self.without_bias = Dynamic(9, 48, "per_token")
        self.tensor = Dynamic(5, 48, "per_tensor", bias=True)
        self.tensor_without_bias = Dynamic(9, 48, "per_tensor")

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        signs = torch.cat((x, x.abs(), -x.abs(), x * 0), 1)
        linears = dict(self.named_children())
        shared = {f"{name}_shared": linear(signs) for name, linear in linears.items()}
        return {**shared, **{name: linear(signs * (2 + index)) for index, (name, linear) in enumerate(linears.items())}}


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_dynamic_activations_agree_and_run_in_integers(tmp_path: Path, options: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 48)
    program = gw.trace(DynamicLinears(), x, dynamic={"x": {0: "batch", 1: "sequence"}})
    report = gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=[x], **options)
    assert len(report.quantized) == 8
    assert set(report.quantized.values()) <= {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
    assert "INT8 weights are unsigned: right everywhere" in str(report)
    model = onnx.load(tmp_path / "model.onnx")
    rounded = [node for node in model.graph.node if node.op_type == "QuantizeLinear" and len(node.input) == 3]
    assert len(rounded) == 3, "one rounding for the two linears that share an input, one for each of the others"


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_weights_are_unsigned_but_for_processors_with_vnni(tmp_path: Path, options: dict[str, Any]) -> None:
    """Signed ones overflow elsewhere: onnxruntime adds pairs of products up in 16 bits."""
    x = torch.randn(2, 3, 48)
    program = gw.trace(DynamicLinears(), x, dynamic={"x": {0: "batch", 1: "sequence"}})
    stored: dict[bool, list[np.ndarray]] = {}
    for vnni in (False, True):
        path = tmp_path / f"{vnni}.onnx"
        gw.export_onnx(program, path, check=False, vnni=vnni, **options)
        tensors = [numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
        stored[vnni] = [each for each in tensors if each.ndim == 2 and each.dtype in (np.int8, np.uint8)]
    assert len(stored[False]) == len(stored[True]) == 4
    for unsigned, signed in zip(stored[False], stored[True], strict=True):
        assert unsigned.dtype == np.uint8
        assert signed.dtype == np.int8
        np.testing.assert_array_equal(unsigned.astype(int) - 128, signed)


def test_signed_weights_pass_the_check_where_products_do_not_overflow(tmp_path: Path) -> None:
    program = gw.trace(Dynamic(5, 48, "per_token"), torch.randn(3, 48))
    with pytest.raises(gw.InputError, match="option 'vnni'"):
        gw.export_onnx(program, tmp_path / "model.onnx", vnni="yes")
    known = [each.usable for each in features().instruction_sets if each.name in ("avx_vnni", "avx512_vnni", "neon")]
    if any(known):
        report = gw.export_onnx(program, tmp_path / "model.onnx", vnni=True)
        assert "signed: right on processors with VNNI" in str(report)
        assert report.to_json()["vnni"]
        return
    with pytest.raises(gw.ExportError, match="leave vnni out") as caught:
        gw.export_onnx(program, tmp_path / "model.onnx", vnni=True)
    assert "from the program" in caught.value.what
    assert not (tmp_path / "model.onnx").exists()


class StaticLinears(nn.Module):
    """Scales for each feature and one for all, sharing an input or not, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ModuleList(Dynamic(5 + index, 48, "", bias=index % 2 == 0) for index in range(4))
        even, uneven = torch.full((48,), 0.02), torch.rand(48) * 0.02 + 0.01
        self.register_buffer("even", even)
        self.register_buffer("uneven", uneven)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        inputs = ((x, self.even, 128), (x, self.even, 128), (x, self.uneven, 3), (x[0, 0], self.uneven, 255))
        return [
            ops.get("linear_int8_static").target(value, w.qweight, w.scales, w.bias, scales, zero)
            for w, (value, scales, zero) in zip(self.weights, inputs, strict=True)
        ]


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_static_activations_agree_and_run_in_integers(tmp_path: Path, options: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 48) * 2
    program = gw.trace(StaticLinears(), x, dynamic={"x": {0: "batch", 1: "sequence"}})
    report = gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=[x], **options)
    assert len(report.quantized) == 4
    assert set(report.quantized.values()) <= {"MatMulInteger", "MatMulIntegerToFloat"}
    model = onnx.load(tmp_path / "model.onnx")
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == 3, "the two on one grid share it"


def test_a_single_linear_agrees_to_the_rounding_of_floats(tmp_path: Path) -> None:
    """Without a second rounding behind it, the integer product is exact: nothing is hidden in a wide tolerance."""
    x = torch.randn(4, 48)
    program = gw.trace(Dynamic(5, 48, "per_token", bias=True), x, dynamic={"x": {0: "batch"}})
    report = gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=[x])
    assert report.error < 1e-5


class Tables(nn.Module):
    """Quantised embeddings in several layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts = [
            (4, 32, 64, True),
            (8, 16, 64, False),
            (4, 64, 64, False),
            (8, 64, 64, True),
            (4, 32, 50, True),
            (8, 24, 48, True),
            (2, 32, 64, True),
            (3, 32, 64, False),
            (3, 24, 50, True),
            (2, 24, 48, False),
        ]
        for index, (bits, group, width, points) in enumerate(self.layouts):
            groups = -(-width // group)
            zero = codes(30, groups, bits, 3) if points else None
            self.register_buffer(
                f"qweight_{index}", quantization.pack(codes(30, width, bits, index), bits, group, zero)
            )
            self.register_buffer(f"scales_{index}", torch.rand(30, groups) + 0.1)
            if zero is not None:
                self.register_buffer(f"zero_points_{index}", zero)

    def forward(self, ids: torch.Tensor) -> list[torch.Tensor]:
        results = []
        for index, (bits, group, width, _) in enumerate(self.layouts):
            stored = [getattr(self, f"{name}_{index}", None) for name in ("qweight", "scales", "zero_points")]
            results.append(ops.get("embedding_nbits").target(ids, *stored, bits, group, width))
        return results


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_embeddings_agree(tmp_path: Path, options: dict[str, Any]) -> None:
    ids = torch.randint(0, 30, (2, 5))
    program = gw.trace(Tables(), ids, dynamic={"ids": {0: "batch", 1: "sequence"}})
    report = gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=[ids], **options)
    assert report.error < 1e-5
    gathers = sum(node.op_type == "GatherBlockQuantized" for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert gathers == (0 if options else 6)


class Tied(nn.Module):
    """A table and a head on the same 2-bit codes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Packed(30, 64, 2, 32)

    def forward(self, ids: torch.Tensor) -> Any:
        stored = self.table.qweight, self.table.scales, self.table.zero_points
        return self.table(torch.tanh(ops.get("embedding_nbits").target(ids, *stored, 2, 32, 64)))


def test_codes_that_a_table_shares_are_written_once(tmp_path: Path) -> None:
    ids = torch.randint(0, 30, (2, 5))
    report = gw.export_onnx(gw.trace(Tied(), ids), tmp_path / "model.onnx", example_inputs=[ids])
    assert set(report.quantized.values()) == {"MatMulNBits"}
    codes = [
        each for each in onnx.load(tmp_path / "model.onnx").graph.initializer if each.data_type == TensorProto.UINT8
    ]
    assert [list(each.dims) for each in codes] == [[30, 2, 16]]


# -- accuracy levels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_int8_activations_are_a_choice_and_reported(tmp_path: Path, options: dict[str, Any]) -> None:
    x = torch.randn(3, 64)
    program = gw.trace(Packed(32, 64, 4, 32), x, dynamic={"x": {0: "batch"}})
    exact = gw.export_onnx(program, tmp_path / "exact.onnx", example_inputs=[x], **options)
    fast = gw.export_onnx(program, tmp_path / "fast.onnx", example_inputs=[x], accuracy_level=4, **options)
    assert "accuracy level 1: float activations" in str(exact)
    assert "accuracy level 4: int8 activations" in str(fast)
    assert exact.error < 1e-4 < fast.error
    assert ("session.qdq_matmulnbits_accuracy_level" in str(fast)) == bool(options)


# -- refusals and proof ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["nf4", "fp4", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("options", ROUTES, ids=IDS)
def test_codebooks_are_refused_because_they_would_run_in_float(
    tmp_path: Path, dtype: str, options: dict[str, Any]
) -> None:
    program = gw.trace(nn.Sequential(nn.Identity(), nn.Linear(64, 32)), torch.randn(2, 64))
    gw.QuantizeLinears(dtype=dtype, group_size=32)(program)
    with pytest.raises(
        gw.ExportError, match=f"no kernel for {dtype} weights: it would run this linear in float"
    ) as caught:
        gw.export_onnx(program, tmp_path / "model.onnx", **options)
    assert "quantise to integers for ONNX" in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


def test_a_group_size_without_kernel_is_refused_with_its_module(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity(), Packed(6, 72, 4, 24))
    with pytest.raises(gw.ExportError, match="no kernel for groups of 24") as caught:
        gw.export_onnx(gw.trace(model, torch.randn(2, 72)), tmp_path / "model.onnx")
    assert "in 1)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Linear:
    """What the proof is told of a linear."""

    node = "linear"
    path = "model.layers.0.down_proj"
    value_names = frozenset({"y"})


def hand_written(tmp_path: Path, spelling: str) -> onnx.ModelProto:
    """A 4-bit linear in one of the spellings exporters use, as the runtime's optimised graph."""
    rows, columns, block = 32, 64, 48 if spelling == "odd block" else 32
    first = spelling in ("columns first", "odd block")
    axis, shape = (0, (columns, rows)) if first else (1, (rows, columns))
    scales = (-(-columns // block), rows) if first else (rows, columns // block)
    weight = helper.make_tensor("q", TensorProto.INT4, shape, np.random.default_rng(0).integers(-8, 8, shape).flatten())
    nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=axis, block_size=block)]
    if spelling == "transposed":
        nodes += [
            helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "wt"], ["y"]),
        ]
    elif spelling == "gemm":
        nodes += [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    else:
        nodes += [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", rows])],
        [weight, numpy_helper.from_array(np.full(scales, 0.1, np.float32), "s")],
    )
    path = tmp_path / "linear.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    optimized = open_session(path, keep_optimized=True).optimized
    assert optimized is not None
    return optimized


@pytest.mark.parametrize("spelling", ["transposed", "gemm", "odd block"])
def test_spellings_that_the_runtime_does_not_fuse_are_caught(tmp_path: Path, spelling: str) -> None:
    optimized = hand_written(tmp_path, spelling)
    with pytest.raises(gw.ExportError, match="1 quantised linear would not run on quantised weights") as caught:
        prove_quantized(optimized, [Linear()])
    assert "model.layers.0.down_proj: runs in float, as " in str(caught.value)
    assert any("unpacked to float on every call" in row.note for row in kernels_of(optimized))


def test_the_fused_spelling_is_accepted(tmp_path: Path) -> None:
    optimized = hand_written(tmp_path, "columns first")
    assert prove_quantized(optimized, [Linear()]) == {"linear": "MatMulNBits"}
    assert any(row.kernel == "MatMulNBits bits=4 block=32 accuracy_level=4" for row in kernels_of(optimized))


def test_a_linear_that_vanished_is_no_proof(tmp_path: Path) -> None:
    optimized = hand_written(tmp_path, "columns first")

    class Gone(Linear):
        value_names = frozenset({"z"})

    with pytest.raises(gw.ExportError, match="not to be found"):
        prove_quantized(optimized, [Gone()])


def test_an_export_in_an_unfused_encoding_fails_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: a translation that writes a spelling which runs in float is stopped by the proof."""
    from graphwright.backends.onnx.translations import weight_only

    def transposed(lower: Any, node: Any, x: Any, weights: Any, bias: Any) -> list[Any]:
        graph, name = lower.graph, weights.names[0]
        shape = (weights.rows, weights.columns)
        packed = graph.derived(
            f"{name}.rows", torch.uint8, shape, lambda: quantization.unpack(weights.qweight, 4).flatten(1)
        )
        middle = graph.constant(torch.full((weights.rows, weights.blocks), 8, dtype=torch.uint8), torch.uint8)
        scales = graph.weight(weights.names[1], weights.scales)
        weight = graph.call("DequantizeLinear", packed, scales, middle, axis=1, block_size=weights.block)
        return [graph.call("MatMul", lower.rows(x), graph.call("Transpose", weight, perm=[1, 0]))]

    monkeypatch.setattr(weight_only, "_dequantize_matmul", transposed)
    model = nn.Sequential(nn.Identity(), Packed(16, 64, 4, 32))
    with pytest.raises(gw.ExportError, match="would not run on quantised weights") as caught:
        gw.export_onnx(gw.trace(model, torch.randn(2, 64)), tmp_path / "model.onnx", mode="portable")
    assert "1: runs in float" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_explain_reads_any_file(tmp_path: Path) -> None:
    x = torch.randn(2, 64)
    program = gw.trace(Packed(32, 64, 4, 32), x)
    gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=[x], accuracy_level=4)
    table = explain(tmp_path / "model.onnx")
    assert [(row.kernel, row.count, row.note) for row in table] == [
        ("MatMulNBits bits=4 block=32 accuracy_level=4", 1, "int8 activations")
    ]
    assert str(table).splitlines()[1].split() == [
        "1",
        "MatMulNBits",
        "bits=4",
        "block=32",
        "accuracy_level=4",
        "int8",
        "activations",
    ]
    with pytest.raises(gw.ExportError, match="no such file"):
        explain(tmp_path / "missing.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(gw.ExportError, match="does not open"):
        explain(tmp_path / "broken.onnx")


# -- layouts, without the runtime --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "columns", "block"),
    [
        (32, 64, 32),
        (256, 512, 256),
        (512, 512, 256),
        (48, 96, 16),
        (96, 288, 32),
        (24, 72, None),
        (100, 100, 16),
        (40, 40, 16),
        (384, 384, 128),
        (16, 10, 16),
        (1000, 768, 256),
    ],
)
def test_block_sizes(group: int, columns: int, block: int | None) -> None:
    assert encodings.block_size(group, columns) == block


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("columns", "group"), [(64, 32), (100, 32), (96, 48), (41, 44), (384, 384), (512, 512)])
def test_reblocking_changes_no_weight(bits: int, columns: int, group: int) -> None:
    block = encodings.block_size(group, columns)
    assert block is not None
    groups = -(-columns // group)
    zero = codes(5, groups, bits, 4)
    stored = quantization.pack(codes(5, columns, bits, 5), bits, group, zero)
    scales = torch.rand(5, groups)
    wanted = quantization.dequantize(stored, scales, zero, bits, columns, torch.float32)
    found = quantization.dequantize(
        encodings.blocked(stored, bits, group, columns, block),
        encodings.per_block(scales, group, columns, block),
        encodings.per_block(zero, group, columns, block),
        bits,
        columns,
        torch.float32,
    )
    assert torch.equal(wanted, found)
