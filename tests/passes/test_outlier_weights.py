"""``SplitOutlierWeights``: the few weights that rounding would hurt most, exact in a sparse matrix of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.backends.cpu import CpuBackend, native_status
from graphwright.ir.provenance import add_tags
from graphwright.passes.quantization.outliers.weights import narrowest

Listing = Callable[[gw.Program], list[str]]
X = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(3))


class Mlp(nn.Module):
    """Two linears; the first has five large weights."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(40, 30), nn.Linear(30, 40, bias=False)
        with torch.no_grad():
            self.up.weight.view(-1)[::240] = 3.0 + torch.arange(5.0) / 3
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


def reasons(program: gw.Program, item: gw.Pass) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in item.refusals(program)}


def split_matrix(program: gw.Program, name: str) -> torch.Tensor:
    """What the sparse part of a weight means, of the size of the rest."""
    tensors = program.tensors()
    pointers, columns = (tensors[f"{name}.outliers.{each}"].long() for each in ("row_pointers", "columns"))
    matrix = torch.zeros_like(tensors[f"{name}.rest.weight"])
    for row in range(len(matrix)):
        here = slice(int(pointers[row]), int(pointers[row + 1]))
        matrix[row, columns[here]] = tensors[f"{name}.outliers.values"][here].to(matrix.dtype)
    return matrix


# -- the rewrite -------------------------------------------------------------------------------------------------------


def test_before_and_after(listing: Listing) -> None:
    model = Mlp()
    program = gw.trace(model, X)
    item = gw.SplitOutlierWeights(where="up")
    assert item(program) is True
    assert listing(program) == [
        "%linear_outliers = graphwright.linear_outliers(%x, %up_outliers_row_pointers, %up_outliers_columns,"
        " %up_outliers_values)",
        "%linear_2 = aten.linear(%x, %up_rest_weight, %up_bias)",
        "%add = aten.add.Tensor(%linear_2, %linear_outliers)",
        "%relu = aten.relu(%add)",
        "%linear_1 = aten.linear(%relu, %down_weight)",
    ]
    tensors = program.tensors()
    assert tensors["up.outliers.columns"].dtype == torch.int16
    assert tensors["up.outliers.row_pointers"].dtype == torch.int32
    assert len(tensors["up.outliers.values"]) == 6
    rest, sparse = tensors["up.rest.weight"], split_matrix(program, "up")
    assert torch.equal(rest + sparse, model.up.weight)
    assert ((rest == 0) | (sparse == 0)).all()
    assert sparse[sparse != 0].abs().min() >= rest.abs().max()
    gw.verify(program)
    assert item(program) is False
    assert reasons(program, item)["linear_2"] == "its outliers are split off already"


@given(st.sampled_from((1, 3, 8, 33)), st.sampled_from((16, 17, 100)), st.sampled_from((0.02, 0.1)), st.integers(0, 2))
@settings(max_examples=6, deadline=None)
def test_any_split_is_exact(outputs: int, features: int, fraction: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3, features)
    program = gw.trace(nn.Linear(features, outputs), x)
    item = gw.SplitOutlierWeights(fraction=fraction)
    taken = int(fraction * outputs * features)
    if taken == 0:
        assert item(program) is False
        return
    done = gw.optimize(program, [item], example_inputs=(x,))
    assert len(done.tensors()["outliers.values"]) == taken


def test_sensitivity_looks_at_the_inputs() -> None:
    x = X.clone()
    x[..., 7] *= 1000
    model = Mlp()
    program = gw.trace(model, x)
    gw.SplitOutlierWeights(criterion="sensitivity", calibration=[x], where="up")(program)
    sparse = split_matrix(program, "up")
    assert set(sparse.nonzero()[:, 1].tolist()) == {7}
    scores = (model.up.weight.abs() * x.flatten(0, 1).square().mean(0).sqrt()).detach().flatten()
    assert set(sparse.flatten().nonzero().flatten().tolist()) == set(scores.topk(6).indices.tolist())


# -- storage -----------------------------------------------------------------------------------------------------------


def test_values_are_stored_in_the_narrowest_format_that_holds_them_exactly() -> None:
    assert narrowest(torch.tensor([1.0, 70001.0])).dtype == torch.float32
    assert narrowest(torch.tensor([1.0, -2.5])).dtype == torch.bfloat16
    assert narrowest(torch.tensor([1.0, 1.0 + 2**-10])).dtype == torch.float16
    assert narrowest(torch.tensor([1.0, 1.0 + 2**-20])).dtype == torch.float32
    assert narrowest(torch.ones(2, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_every_dtype(dtype: torch.dtype) -> None:
    model, x = Mlp(dtype), X.to(dtype)
    done = gw.optimize(gw.trace(model, x), [gw.SplitOutlierWeights()], example_inputs=(x,))
    assert done.tensors()["up.outliers.values"].dtype == dtype
    assert torch.equal(done.tensors()["up.rest.weight"] + split_matrix(done, "up"), model.up.weight)


def test_narrower_ranges_after_the_split() -> None:
    model, rounding = Mlp(), gw.QuantizeLinears(bits=4, group_size=16, clip_search=False)

    def error(passes: list[gw.Pass]) -> float:
        done = gw.optimize(gw.trace(model, X), passes, example_inputs=(X,))
        assert {gw.op_name(node) for node in done.nodes if "linear" in gw.op_name(node)} >= {"graphwright.linear_nbits"}
        with torch.no_grad():
            return float((done(X) - model(X)).norm() / model(X).norm())

    assert error([gw.SplitOutlierWeights(), rounding]) < 0.6 * error([rounding])


def test_both_splits_and_a_round_trip(tmp_path: Path) -> None:
    program = gw.trace(Mlp(), X)
    gw.SplitOutlierColumns(count=4, calibration=[X])(program)
    assert gw.SplitOutlierWeights()(program) is True
    torch.testing.assert_close(program(X), Mlp()(X), rtol=1e-4, atol=1e-5)
    gw.QuantizeLinears(bits=4, group_size=16)(program)
    program.save(tmp_path / "model")
    loaded = gw.Program.load(tmp_path / "model")
    assert torch.equal(loaded(X), program(X))
    assert gw.QuantizeLinears()(loaded) is False


# -- backends ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not native_status().available, reason=native_status().message)
def test_four_bit_weights_with_eight_bit_activations_have_a_kernel() -> None:
    program = gw.trace(Mlp(), X)
    eight = gw.QuantizeLinears(bits=4, group_size=16, activations="int8")
    fast = gw.optimize(program, [eight], example_inputs=(X,), target=CpuBackend())
    slow = gw.optimize(program, [eight], example_inputs=(X,), target="reference")
    (first, second) = [use for use in fast.explain() if "linear" in use.op]
    assert "4-bit weights, activations rounded to int8 (symmetric)" in first.kernel
    assert "4-bit weights" in second.kernel
    # A code in the first linear may differ by one where a quotient lies on a half.
    torch.testing.assert_close(fast(X), slow(X), rtol=1e-4, atol=1e-5)
    for options, reason in (
        ({"activations": "int4"}, "there is no kernel for activations of 4 bits"),
        ({"activations": "int8", "activation_ranges": "per_token"}, "per token has no kernel"),
    ):
        small = gw.optimize(program, [gw.QuantizeLinears(bits=4, **options)], example_inputs=(X,), target=CpuBackend())
        uses = [use for use in small.explain() if "linear" in use.op]
        assert all(use.kernel == "reference" and reason in use.reason for use in uses)


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    program = gw.trace(Mlp(), X)
    passes = [gw.SplitOutlierColumns(count=4, calibration=[X]), gw.SplitOutlierWeights()]
    done = gw.optimize(program, passes, example_inputs=(X,))
    report = gw.export_onnx(done, tmp_path / "model.onnx", example_inputs=(X,))
    assert report.differences
    gw.QuantizeLinears(bits=4, activations="int4")(program)
    with pytest.raises(gw.ExportError, match="the operator graphwright.linear_nbits_dynamic has no ONNX translation"):
        gw.export_onnx(program, tmp_path / "other.onnx", example_inputs=(X,))


# -- what it leaves alone ----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(50, 40), nn.Linear(40, 50, bias=False)
        self.small = nn.Linear(40, 4)
        self.body = nn.Linear(40, 40)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.body(self.embed(ids))
        return self.lm_head(hidden), self.small(hidden)


def test_linears_that_stay_whole() -> None:
    program = gw.trace(Tied(), torch.arange(6).view(2, 3))
    found = reasons(program, gw.SplitOutlierWeights())
    head, small = (next(n.name for n in program.nodes if gw.path_of(n) == path) for path in ("lm_head", "small"))
    assert found[head].startswith("it is the output head")
    assert found[small] == "its weight has 160 entries, of which 0.005 is less than one"
    whole = reasons(program, gw.SplitOutlierWeights(lm_head=True))[head]
    assert whole == "its weight is also read by %embedding, which needs it whole"
    zeros = gw.trace(nn.utils.skip_init(nn.Linear, 40, 40), X)
    nn.init.zeros_(zeros.tensors()["weight"])
    assert reasons(zeros, gw.SplitOutlierWeights())["linear"].startswith("its weights count for nothing")


def test_protected_linears() -> None:
    program = gw.trace(Mlp(), X)
    add_tags(next(node for node in program.nodes if node.name == "linear"), ["masked"])
    found = reasons(program, gw.SplitOutlierWeights(ignore="down"))
    assert found["linear"] == "it is tagged masked, which this pass leaves alone"
    assert found["linear_1"] == "not selected by where= / ignore="


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fraction": 0}, "must be above 0 and at most 0.1, not 0"),
        ({"fraction": 0.5}, "must be above 0 and at most 0.1, not 0.5"),
        ({"fraction": "many"}, "must be a number, not 'many'"),
        ({"criterion": "hessian"}, "must be one of 'magnitude', 'sensitivity', not 'hessian'"),
        ({"criterion": "sensitivity"}, "needs calibration data"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], words: str) -> None:
    with pytest.raises(gw.InputError, match=words):
        gw.SplitOutlierWeights(**options)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    model = Mlp()
    nn.init.constant_(model.down.weight, bad)
    with pytest.raises(gw.InputError, match=r"holds NaN or infinity \(at weight 'down.weight'\)"):
        gw.SplitOutlierWeights()(gw.trace(model, X))


def test_order() -> None:
    with pytest.raises(gw.OrderError, match="'split-outlier-weights' must come before 'quantize-linears'"):
        gw.optimize(gw.trace(Mlp(), X), [gw.QuantizeLinears(), gw.SplitOutlierWeights()], example_inputs=(X,))
