"""Sparse linears in ONNX files: written densely, under their old names, and equal to the program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


class Sparse(nn.Module):
    """A linear of which most weights are zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(64, 48)
        with torch.no_grad():
            self.up.weight *= torch.rand(48, 64) < 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.up(x)
        return y


@pytest.mark.parametrize("mode", ["runtime", "portable"])
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_a_sparse_linear_is_written_densely(tmp_path: Path, bits: int, mode: str) -> None:
    passes = [gw.QuantizeLinears(bits=bits, group_size=32)] if bits else []
    small = gw.optimize(Sparse().eval(), [*passes, gw.CompressLinears()], example_inputs=(X,), target="reference")
    export = small.export_onnx(tmp_path / "model.onnx", mode=mode)
    assert export.error < 1e-4
    nodes = [node.op_type for node in onnx.load(export.path, load_external_data=False).graph.node]
    if bits:
        assert list(export.quantized.values()) == ["MatMulNBits"]
    else:
        assert "Gemm" in nodes
    names = {each.name for each in onnx.load(export.path, load_external_data=False).graph.initializer}
    assert not any("mask" in name for name in names)


@pytest.mark.parametrize("mode", ["runtime", "portable"])
def test_held_masks_are_written(tmp_path: Path, mode: str) -> None:
    """What an optimiser has left at a masked place is no part of what the file computes."""
    passes = [gw.PruneLinears(sparsity=0.5), gw.HoldMasks()]
    held = gw.optimize(Sparse().eval(), passes, example_inputs=(X,), target="reference")
    weight = next(value for name, value in held.named_parameters() if name.endswith("weight"))
    with torch.no_grad():
        weight[weight == 0] = 7.0
    export = held.export_onnx(tmp_path / "model.onnx", mode=mode)
    assert export.error < 1e-5
    (found,) = onnxruntime.InferenceSession(export.path).run(None, {"x": X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), held(X).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["runtime", "portable"])
@pytest.mark.parametrize("static", [False, True])
def test_rounded_activations_are_written_as_the_dense_linear_is(tmp_path: Path, static: bool, mode: str) -> None:
    passes = [gw.QuantizeLinears(bits=8, activations="int8", calibration=[torch.randn(80, 64)] if static else None)]
    files = []
    for more in ([], [gw.CompressLinears()]):
        small = gw.optimize(Sparse().eval(), [*passes, *more], example_inputs=(X,), target="reference")
        export = small.export_onnx(tmp_path / f"{len(more)}.onnx", mode=mode)
        assert export.error < 1e-4
        files.append(onnx.load(export.path, load_external_data=False).graph)
    dense, sparse = files
    assert [node.op_type for node in sparse.node] == [node.op_type for node in dense.node]
    assert {each.name: each.raw_data for each in sparse.initializer} == {
        each.name: each.raw_data for each in dense.initializer
    }


@pytest.mark.parametrize("compressed", [True, False])
def test_sparse_initialisers_make_the_file_smaller(tmp_path: Path, compressed: bool) -> None:
    passes = [gw.CompressLinears()] if compressed else []
    small = gw.optimize(Sparse().eval(), passes, example_inputs=(X,), target="reference")
    whole = small.export_onnx(tmp_path / "whole.onnx")
    sparse = small.export_onnx(tmp_path / "sparse.onnx", sparse=True)
    assert (whole.sparse, sparse.sparse) == ((), ("up.weight",))
    assert sparse.error < 1e-4
    assert sparse.bytes < 0.8 * whole.bytes
    assert "1 weight stored as sparse initialisers: onnxruntime makes them dense" in str(sparse)
    assert "sparse initialisers" not in str(whole)
    assert [each.values.name for each in onnx.load(sparse.path).graph.sparse_initializer] == ["up.weight"]


def test_weights_that_would_take_more_bytes_stay_dense(tmp_path: Path) -> None:
    model = Sparse().eval()
    with torch.no_grad():
        model.up.weight.copy_(torch.randn(48, 64) * (torch.rand(48, 64) < 0.5))
    small = gw.optimize(model, [], example_inputs=(X,), target="reference")
    assert small.export_onnx(tmp_path / "model.onnx", sparse=True).sparse == ()


def test_sparse_initialisers_do_not_go_beside_the_file(tmp_path: Path) -> None:
    small = gw.optimize(Sparse().eval(), [], example_inputs=(X,), target="reference")
    with pytest.raises(gw.ExportError, match="stored in the file itself"):
        small.export_onnx(tmp_path / "model.onnx", sparse=True, external_data=True)
    with pytest.raises(gw.InputError, match="standard operators take no sparse tensors"):
        small.export_onnx(tmp_path / "model.onnx", sparse=True, mode="portable")
    assert not list(tmp_path.iterdir())
