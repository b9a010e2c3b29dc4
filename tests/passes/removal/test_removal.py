"""Programs made smaller compute what they would with zeros in the removed places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.adapters.families import BATCH, FAMILIES, traced
from tests.passes.adapters.models import MODELS, batch_for
from tests.passes.removal.oracle import reduced
from torch import nn

import graphwright as gw
from graphwright.passes.removal.cutting import cut
from graphwright.passes.removal.following import follow
from graphwright.passes.removal.scores import unit_scores
from graphwright.passes.removal.units import Axis

pytest.importorskip("transformers")

KINDS = {
    "heads": gw.RemoveHeads(fraction=0.5),
    "channels": gw.RemoveChannels(fraction=0.3),
    "hidden": gw.RemoveHiddenDims(fraction=0.25),
}
# family -> what is not reached, and why
LEAVES = {"bert": "leaves the program", "t5": "leaves the program"}


def stirred(program: gw.Program) -> gw.Program:
    """The program with biases and norms that matter."""
    made = program.clone(copy_weights=True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for each in made.parameters():
            each.add_(0.1 * torch.randn(each.shape, generator=generator))
    return made


def prepared(family: str, *, fused: bool = True) -> tuple[gw.Program, dict[str, Any]]:
    """A program of a family, or the classifier, with its batch."""
    if family == "classifier":
        batch = batch_for(MODELS["bert"]())
        program = stirred(gw.trace(MODELS["bert"](), batch))
    else:
        program, batch = stirred(traced(family)), BATCH
    if fused:
        for item in (gw.Cleanup(), gw.FuseAll()):
            item(program)
    return program, batch


def logits(program: gw.Program, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found = program(**batch)
    value: torch.Tensor = found.logits if "logits" in found else found[0]
    return value.double()


@pytest.mark.parametrize("fused", [False, True], ids=["traced", "fused"])
@pytest.mark.parametrize("family", ["bert", "classifier", "gpt2", "llama", "t5"])
def test_every_kind_equals_zeros(family: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    program, batch = prepared(family, fused=fused)
    before = {name: tensor.clone() for name, tensor in program.tensors().items()}
    whole = logits(program, batch)
    for kind, item in KINDS.items():
        if kind == "hidden" and family in LEAVES:
            continue
        if kind == "hidden" and family == "llama" and not fused:
            with pytest.raises(gw.SelectionError, match=r"%mean\w* in .*norm \(aten.mean.dim\).*FuseRMSNorm"):
                item(program.clone())
            continue
        small, zeroed = reduced(program, item, monkeypatch)
        found, wanted = logits(small, batch), logits(zeroed, batch)
        assert (found - wanted).norm() <= 1e-6 * wanted.norm(), kind
        assert (whole - wanted).norm() > 1e-2 * wanted.norm(), kind
        fewer, most = small.notes["parameters"][::-1]
        assert fewer == sum(tensor.numel() for tensor in small.tensors().values()) < most
        assert small.notes["macs"][1] < small.notes["macs"][0]
        assert small.aliases == program.aliases
        assert {str(node.target) for node in small.nodes if node.op == "get_attr"} <= set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.tensors().items())


def test_all_kinds_together_saved_lowered_exported_trained(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    program, batch = prepared("llama")
    passes = [*KINDS.values(), gw.FuseQKV(), gw.FuseGateUp()]
    small = gw.optimize(program, passes, example_inputs=batch)
    assert [row.contract for row in small.report.rows[:3]] == ["retrain"] * 3
    assert small.report.rows[2].macs_after < 0.6 * small.report.rows[0].macs_before
    wanted = logits(small, batch)
    small.save(tmp_path / "small")
    again = gw.Program.load(tmp_path / "small")
    assert torch.equal(logits(again, batch), wanted)
    on_cpu = gw.optimize(again, [], example_inputs=batch, target="cpu")
    assert (logits(on_cpu, batch) - wanted).norm() <= 1e-5 * wanted.norm()
    small.export_onnx(tmp_path / "small.onnx")  # compared with the program in onnxruntime
    longer = {name: torch.cat((value, value), 1) for name, value in batch.items()}
    assert logits(again, longer).shape == (2, 12, 50)
    found = gw.distill(again, None, [{**batch}], loss=gw.CrossEntropy(causal=True), steps=5, learning_rate=0.01)
    assert found.losses[-1]["loss"] < found.losses[0]["loss"]


def test_layer_norms_over_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    program, batch = prepared("classifier")
    small, zeroed = reduced(program, gw.RemoveHiddenDims(exact_norms=False), monkeypatch)
    assert {gw.op_name(node) for node in small.nodes} == {gw.op_name(node) for node in program.nodes}
    assert logits(small, batch).shape == logits(zeroed, batch).shape
    exact, _ = reduced(program, gw.RemoveHiddenDims(), monkeypatch)
    assert "aten.layer_norm" not in {gw.op_name(node) for node in exact.nodes}


def test_the_heads_of_bert_by_hand() -> None:
    """The columns of the output projection at removed heads are zero: what a mask of heads does."""
    program, batch = prepared("bert", fused=False)
    names = {node.target: program.tensor(node) for node in program.nodes if node.op == "get_attr"}
    small = program.clone()
    gw.RemoveHeads(fraction=0.25, where="encoder.layer.0")(small)
    query = "encoder.layer.0.attention.self.query.weight"
    left = small.tensor(query)
    assert left.shape == (24, 32)
    heads = names[query].reshape(4, 8, 32)
    gone = [head for head in range(4) if not any(torch.equal(heads[head], each) for each in left.reshape(3, 8, 32))]
    assert len(gone) == 1
    by_hand = program.clone(copy_weights=True)
    with torch.no_grad():
        by_hand.tensor("encoder.layer.0.attention.output.dense.weight").reshape(32, 4, 8)[:, gone[0]] = 0
    wanted = logits(by_hand, batch)
    assert (logits(small, batch) - wanted).norm() <= 1e-6 * wanted.norm()
    assert small.tensor("encoder.layer.1.attention.self.query.weight").shape == (32, 32)


def test_grouped_queries_go_together() -> None:
    program, _ = prepared("llama", fused=False)
    small = program.clone()
    gw.RemoveHeads(fraction=0.5)(small)
    assert small.notes["removed"] == {f"model.layers.{i}.self_attn": "1 of 2" for i in (0, 1)}
    shapes = [small.tensor(f"model.layers.0.self_attn.{name}_proj.weight").shape for name in "qkvo"]
    assert [tuple(shape) for shape in shapes] == [(16, 32), (8, 32), (8, 32), (32, 16)]


# -- scores ------------------------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """One block with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return result


def test_scores_by_their_formulas() -> None:
    torch.manual_seed(3)
    model, batches = FeedForward().double(), [torch.randn(5, 4).double() for _ in range(2)]
    program = gw.trace(model, batches[0])
    relu = next(node for node in program.nodes if gw.op_name(node) == "aten.relu")
    axis = Axis(relu, 1)
    units = follow(program, [axis], frozenset())
    up, down, bias = model.up.weight, model.down.weight, model.up.bias

    def of(score: Any, **options: Any) -> list[float]:
        scores = unit_scores(units, score, batches, **options)
        return [scores(unit) for unit in units.of(axis).tolist()]

    with torch.no_grad():
        lengths = (up.square().sum(1) + bias.square() + down.square().sum(0)).sqrt()
        hidden = torch.relu(model.up(torch.cat(batches)))
        read = (hidden.square().sum(0) * down.square().sum(0)).sqrt()
    assert of("magnitude") == pytest.approx(lengths.tolist(), rel=1e-6)
    # `up` reads features that stay, so its own columns say nothing; its rows are those of the channel
    inputs = torch.cat(batches).square().sum(0)
    assert of("activation") == pytest.approx(
        (read.square() + (up.detach().square() * inputs).sum(1)).sqrt().tolist(), rel=1e-9
    )
    loss = sum(model(each).square().mean() for each in batches) / 2
    grads = torch.autograd.grad(loss, (up, bias, down))
    first = (grads[0] * up).sum(1) + grads[1] * bias + (grads[2] * down).sum(0)
    found = of("taylor", loss=lambda outputs, batch: outputs.square().mean())
    assert found == pytest.approx(first.abs().tolist(), rel=1e-9)
    assert not any(each.requires_grad and each.grad is not None for each in program.parameters())


@pytest.mark.parametrize("score", ["magnitude", "activation", "taylor"])
def test_the_lowest_scores_go(score: Any) -> None:
    program, batch = prepared("llama")
    batches = [batch]
    item = gw.RemoveChannels(fraction=0.5, score=score, calibration=batches)
    (axis, *_) = item.places(program, lambda node: True)
    assert isinstance(axis, Axis)
    units = follow(program, [axis], frozenset())
    scores = unit_scores(units, score, batches)
    values = torch.tensor([scores(unit) for unit in units.of(axis).tolist()])
    small = program.clone()
    item(small)
    name = "model.layers.0.mlp.down_proj.weight"
    kept = values.argsort(descending=True)[:24].sort().values
    assert torch.equal(small.tensor(name), program.tensor(name)[:, kept])


def test_a_multiple_stays() -> None:
    program, _ = prepared("llama", fused=False)
    small = program.clone()
    gw.RemoveChannels(fraction=0.3, multiple=16)(small)
    assert small.tensor("model.layers.1.mlp.up_proj.weight").shape == (48, 32)  # 34 would stay
    gw.RemoveChannels(fraction=0.5, multiple=16)(small)
    assert small.tensor("model.layers.1.mlp.up_proj.weight").shape == (32, 32)
    assert gw.RemoveChannels(fraction=0.0)(small) is False


# -- what cannot be followed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(LEAVES))
def test_hidden_states_that_leave_the_program(family: str) -> None:
    program, _ = prepared(family)
    with pytest.raises(gw.SelectionError, match=r"nothing can be removed: %\w+ leaves the program \(at %embedding"):
        gw.RemoveHiddenDims()(program)


def test_packed_weights_are_refused_with_the_node() -> None:
    program, batch = prepared("llama")
    packed = gw.optimize(program, [gw.QuantizeLinears(bits=4, group_size=16)], example_inputs=batch)
    with pytest.raises(gw.OrderError, match="remove structure first"):
        gw.optimize(packed, [gw.RemoveChannels()], example_inputs=batch)
    with pytest.raises(gw.SelectionError, match=r"%\w+ in .* \(graphwright.linear_nbits\) does not let them"):
        gw.RemoveHeads()(packed.clone())


def test_what_makes_something_of_zeros_before_a_norm_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(self.norm(torch.sigmoid(self.table(ids))))
            return result

    program = gw.trace(Model(), torch.tensor([[1, 2]]))
    with pytest.raises(gw.SelectionError, match="makes something of zeros, and a norm reads it"):
        gw.RemoveHiddenDims()(program)


def test_adapters_are_left_alone() -> None:
    program, batch = prepared("llama")
    adapted = gw.optimize(program, [gw.InsertAdapters(gw.LoRA(rank=2))], example_inputs=batch)
    with pytest.raises(gw.SelectionError, match="is tagged adapter"):
        gw.RemoveHeads()(adapted)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gw.RemoveHeads(fraction=1.0), "below 1"),
        (lambda: gw.RemoveHeads(fraction=float("nan")), "below 1"),
        (lambda: gw.RemoveHeads(score="size"), "one of magnitude"),
        (lambda: gw.RemoveHeads(multiple=0), "from 1"),
        (lambda: gw.RemoveHeads(score="taylor")(traced("llama")), "needs calibration data"),
        (lambda: gw.RemoveHeads(fraction=0.5, score="taylor", calibration=[])(traced("llama")), "no calibration data"),
        (lambda: gw.RemoveChannels(score="activation", calibration=[])(traced("llama")), "no calibration data"),
        (lambda: gw.RemoveChannels()(gw.trace(nn.Linear(3, 3), torch.ones(1, 3))), "no feed-forward block"),
        (lambda: gw.RemoveHeads()(gw.trace(nn.Linear(3, 3), torch.ones(1, 3))), "no attention"),
        (lambda: gw.RemoveHiddenDims()(gw.trace(nn.Linear(3, 3), torch.ones(1, 3))), "no embedding"),
    ],
)
def test_what_does_not_fit(make: Any, words: str) -> None:
    with pytest.raises(gw.InputError, match=words):
        make()


def test_a_failed_cut_leaves_the_program_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    program, batch = prepared("llama")
    text, wanted = str(program), logits(program, batch)
    item = gw.RemoveChannels()
    (axis, *_) = item.places(program, lambda node: True)
    assert isinstance(axis, Axis)
    units = follow(program, [axis], frozenset())
    broken = next(each for each in units.labels if each.node.op == "get_attr")
    del units.labels[broken]  # one weight is forgotten: types no longer fit
    with pytest.raises(gw.GraphwrightError):
        cut(program, units, set(units.of(axis).tolist()[:3]), exact_norms=True)
    assert str(program) == text
    assert torch.equal(logits(program, batch), wanted)


def test_every_family_is_tried() -> None:
    assert set(FAMILIES) == {"bert", "gpt2", "llama", "t5"}
