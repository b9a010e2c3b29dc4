"""Pruning linears: which weights go, how many, what is written down, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.passes.calibration import Observed, Stream
from graphwright.passes.sparsity.methods import Norms

from .models import WIDTH, batches, decoder, ids, names, pruned, sparse_gpt

Listing = Callable[[gw.Program], list[str]]
METHODS = ["magnitude", "wanda", "sparsegpt"]


def zeros(program: gw.Program, name: str) -> float:
    weight = program.tensor(name)
    return float((weight == 0).sum()) / weight.numel()


def test_text_before_and_after(listing: Listing) -> None:
    program = decoder()
    before = listing(program)
    item = gw.PruneLinears(sparsity=0.6)
    assert item(program)
    assert listing(program) == before  # the graph stays; values and tags change
    tagged = [node for node in program.nodes if "masked" in gw.tags_of(node)]
    assert len(tagged) == 12
    assert {gw.op_name(node) for node in tagged} == {"aten.linear"}
    assert not item(program)
    assert names(program)[0] == "layers.0.attn.q_proj.weight"
    for name, entry in gw.pruned_weights(program).items():
        assert entry.pattern == "unstructured"
        assert entry.sparsity == pytest.approx(zeros(program, name))
        assert zeros(program, name) == pytest.approx(0.6, abs=1e-3)
        original = decoder().tensor(name)
        kept = program.tensor(name) != 0
        assert torch.equal(program.tensor(name)[kept], original[kept])
        assert original[~kept].abs().max() < original[kept].abs().min()
    assert zeros(program, "lm_head.weight") == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4", "4x1", "1x4", "16x1", "32x32"])
def test_every_method_has_every_pattern(method: str, pattern: str) -> None:
    data = None if method == "magnitude" else batches(6)
    program = pruned(method=method, pattern=pattern, calibration=data)
    kind = gw.SparsityPattern.of(pattern, where="test")
    for name in names(program):
        mask = program.tensor(name) != 0
        assert kind.holds(mask)
        compared = mask.shape[1] if method == "wanda" else mask.numel() // 32  # blocks of a row, or of all
        alone = pattern == "32x32" and compared == 32  # half of one block
        wanted = 0.75 if pattern == "1:4" else 0.0 if alone else 0.5
        assert zeros(program, name) == pytest.approx(wanted, abs=1e-6)
    assert all(row.intact for row in gw.describe_sparsity(program).linears if row.pattern)


def test_wanda_scores_are_those_published() -> None:
    program = pruned(method="wanda", calibration=batches(), where="layers.0.up")
    source = decoder()
    node = next(node for node in source.nodes if gw.path_of(node) == "layers.0.up")
    rows = [_value(source, node.args[0], batch) for batch in batches()]
    norms = torch.cat(rows).double().norm(dim=0)
    weight = source.tensor("layers.0.up.weight")
    scores = weight.double().abs() * norms
    order = scores.argsort(dim=1)
    wanted = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, : WIDTH // 2], False)
    assert torch.equal(program.tensor("layers.0.up.weight") != 0, wanted)


def _value(program: gw.Program, node: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rows of a node's value."""
    with Stream(program, [batch]) as stream:
        stream.advance(next(iter(node.users)))
        return torch.cat(list(stream.rows(node)))


@pytest.mark.parametrize(
    ("pattern", "sparsity", "among", "block"),
    [
        ("unstructured", 0.5, 0, 128),
        ("unstructured", 0.7, 0, 16),
        ("2:4", 0.5, 4, 32),
        ("4:8", 0.5, 8, 48),
        ("1:4", 0.75, 4, 128),
    ],
)
def test_sparsegpt_is_the_published_algorithm(pattern: str, sparsity: float, among: int, block: int) -> None:
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(20, 96, generator=generator)
    x = torch.randn(400, 20, generator=generator) @ mixing + torch.randn(400, 96, generator=generator)
    weight = torch.randn(40, 96, generator=generator)
    observed = Observed.over([x])
    oracle = sparse_gpt(weight, observed.moment, sparsity, block=block, among=among)
    method = gw.SparseGpt(block=block)
    kind = gw.SparsityPattern.of(pattern, where="test")
    found = method.prune(weight, kind, sparsity, observed.copy(), fixed=False)
    assert torch.equal(found.weight != 0, oracle != 0)
    assert float((found.weight - oracle).norm() / oracle.norm()) < 1e-4
    error = float((x.double() @ (weight - found.weight).double().T).norm() / (x.double() @ weight.double().T).norm())
    assert found.loss.relative == pytest.approx(error, rel=1e-3)
    plain = gw.Magnitude().prune(weight, kind, sparsity, None, fixed=False)
    worse = float((x.double() @ (weight - plain.weight).double().T).norm() / (x.double() @ weight.double().T).norm())
    assert error < 0.8 * worse


def test_sparsegpt_of_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphwright.passes.sparsity import sparsegpt

    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(24, 32, generator=generator), torch.randn(200, 32, generator=generator)
    kind, observed = gw.SparsityPattern.of("2:4", where="test"), Observed.over([x])
    whole = gw.SparseGpt().prune(weight, kind, 0.5, observed.copy(), fixed=False)
    monkeypatch.setattr(sparsegpt, "_CARRIED_ELEMENTS", 7 * 32)
    parts = gw.SparseGpt().prune(weight, kind, 0.5, observed.copy(), fixed=False)
    assert float((whole.weight - parts.weight).abs().max()) < 1e-5
    assert torch.equal(whole.weight == 0, parts.weight == 0)


def test_zeros_of_before_stay_with_every_method() -> None:
    first = pruned(sparsity=0.4)
    for method in METHODS:
        program = first.clone()
        data = None if method == "magnitude" else batches()
        assert gw.PruneLinears(sparsity=0.7, method=method, calibration=data)(program)
        for name in names(first):
            gone = first.tensor(name) == 0
            assert bool((program.tensor(name)[gone] == 0).all())
            assert zeros(program, name) == pytest.approx(0.7, abs=0.02)
        assert not gw.PruneLinears(sparsity=0.7, method=method, calibration=data)(program)


def test_weights_stored_the_other_way_round() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(16, 12)), nn.Parameter(torch.randn(12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight)

    torch.manual_seed(0)
    x = torch.randn(3, 16)
    program = gw.trace(Products(), x)
    gw.PruneLinears(pattern="2:4")(program)
    weight = program.tensor("weight")
    assert weight.shape == (16, 12)
    assert gw.SparsityPattern.of("2:4", where="test").holds((weight != 0).T)
    assert gw.TransposeLinears()(program)
    assert names(program) == ["weight_transposed"]
    (row,) = gw.describe_sparsity(program).linears
    assert row.intact
    assert torch.allclose(program(x), torch.addmm(program.tensor("bias"), x, weight), atol=1e-6)


def test_the_pipeline_reports_and_checks() -> None:
    small = gw.optimize(decoder(), [gw.PruneLinears(sparsity=0.3)], example_inputs=ids())
    row = small.report.rows[0]
    assert row.contract == "approximate"
    assert row.notes["linears"] == 12
    assert row.notes["sparsity"] == pytest.approx(0.3, abs=1e-3)
    assert row.notes["weights"]["layers.0.up.weight"]["pattern"] == "unstructured"
    assert 0 < row.notes["weights"]["layers.0.up.weight"]["relative"] < 0.3
    with pytest.raises(gw.ContractViolation, match="the budget 0.001"):
        gw.optimize(decoder(), [gw.PruneLinears(sparsity=0.5, max_error=0.001)], example_inputs=ids())


def test_overrides_and_selection() -> None:
    overrides = {
        "layers.0.attn": {"pattern": "2:4"},
        "re:.*down": {"sparsity": 0.8},
        "layers.1.attn.q_proj.weight": None,
    }
    program = pruned(sparsity=0.3, overrides=overrides)
    found = gw.pruned_weights(program)
    assert found["layers.0.attn.q_proj.weight"].pattern == "2:4"
    assert found["layers.0.attn.q_proj.weight"].sparsity == 0.5
    assert found["layers.1.down.weight"].sparsity == pytest.approx(0.8, abs=1e-3)
    assert found["layers.1.up.weight"].sparsity == pytest.approx(0.3, abs=1e-3)
    assert "layers.1.attn.q_proj.weight" not in found
    assert names(pruned(where="layers.1.up")) == ["layers.1.up.weight"]
    assert "lm_head.weight" in names(pruned(lm_head=True))


def reasons(program: gw.Program, item: gw.Pass) -> set[str]:
    return {refusal.reason for refusal in item.refusals(program)}


def test_when_it_does_not_fire() -> None:
    item = gw.PruneLinears(where="layers", overrides={"layers.0.up": None})
    assert reasons(decoder(), item) >= {
        "not selected by where= / ignore=",
        "it is left whole by overrides['layers.0.up']",
    }
    assert "it is the output head, which is left whole (set lm_head=True to prune it)" in reasons(
        decoder(), gw.PruneLinears()
    )

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.out(self.embed(tokens))
            return found

    program = gw.trace(Tied(), torch.arange(6).view(2, 3))
    item = gw.PruneLinears()
    assert reasons(program, item) == {"its weight is also read by %embedding, which would change too"}
    assert not item(program)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, "must be at least 0 and below 1, not 1.0"),
        ({"sparsity": -0.1}, "must be at least 0 and below 1"),
        ({"sparsity": float("nan")}, "must be at least 0 and below 1"),
        ({"sparsity": True}, "must be at least 0 and below 1"),
        ({"pattern": "2;4"}, "is no pattern of zeros"),
        ({"pattern": "2:4", "sparsity": 0.6}, "2:4 has a sparsity of 0.5, not 0.6"),
        ({"pattern": "2:4", "allocation": "erk"}, "2:4 has one sparsity for every linear"),
        ({"method": "wandas"}, "did you mean 'wanda'"),
        ({"method": "wanda"}, "needs calibration data"),
        ({"allocation": "loss"}, "needs calibration data"),
        ({"allocation": "global", "method": "wanda", "calibration": [1]}, "compares magnitudes"),
        ({"allocation": "even"}, "must be one of 'uniform', 'erk', 'global', 'loss'"),
        ({"overrides": {"layers": {"bits": 4}}}, "must be a sparsity and a pattern"),
        ({"overrides": {"layers": {"sparsity": 2}}}, "must be at least 0 and below 1, not 2"),
    ],
)
def test_options_that_do_not_serve(options: dict[str, Any], words: str) -> None:
    with pytest.raises(gw.InputError, match=words):
        gw.PruneLinears(**options)


def test_programs_that_cannot_be_pruned() -> None:
    with pytest.raises(gw.InputError, match="pruned to 3:5: 32 columns are no multiple of 5"):
        gw.PruneLinears(pattern="3:5")(decoder())
    with pytest.raises(gw.InputError, match="32 rows|does not divide into blocks of 48 by 1"):
        gw.PruneLinears(pattern="48x1")(decoder())
    with pytest.raises(gw.InputError, match="is pruned to 0.5 already, and 0.2 is less"):
        gw.PruneLinears(sparsity=0.2)(pruned(sparsity=0.5))
    with pytest.raises(gw.InputError, match="blocks of 30 columns are no multiple of 4"):
        gw.PruneLinears(pattern="2:4", method=gw.SparseGpt(block=30), calibration=batches())(decoder())
    with pytest.raises(gw.SelectionError, match="selects nothing"):
        gw.PruneLinears(where="nowhere")(decoder())
    bad = decoder()
    with torch.no_grad():
        weight = bad.tensor("layers.0.up.weight").clone()
        weight[0, 0] = torch.nan
        bad.set_tensor("layers.0.up.weight", nn.Parameter(weight))
    for method in METHODS:
        data = None if method == "magnitude" else batches(6)
        with pytest.raises(gw.InputError, match="layers.0.up.weight|calibration"):
            gw.PruneLinears(method=method, calibration=data)(bad.clone())
    with pytest.raises(gw.InputError, match="the calibration data is too short"):
        gw.PruneLinears(calibration=[{"input_ids": torch.zeros(1, 1, dtype=torch.int64)}])(decoder())


def test_packed_weights_are_not_pruned() -> None:
    program = decoder()
    gw.QuantizeLinears(bits=4, group_size=16, where="layers.0.up")(program)
    with pytest.raises(gw.InputError, match="layers.0.up.qweight' is packed already"):
        gw.PruneLinears()(program)
    assert gw.PruneLinears(ignore="layers.0.up")(program)
    with pytest.raises(gw.OrderError) as error:
        gw.optimize(decoder(), [gw.QuantizeLinears(), gw.PruneLinears()], example_inputs=ids())
    assert "'prune-linears' cannot run after 'quantize-linears'" in str(error.value)
    assert "an order that works: prune-linears, quantize-linears" in str(error.value)


def test_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pruned(method="sparsegpt", calibration=batches())
    calls = []
    original = gw.SparseGpt.prune

    def counted(self: gw.SparseGpt, weight: torch.Tensor, *rest: Any, **options: Any) -> Any:
        calls.append(weight.shape)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(self, weight, *rest, **options)

    monkeypatch.setattr(gw.SparseGpt, "prune", counted)
    item = gw.PruneLinears(method="sparsegpt", calibration=batches(), checkpoint=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        item(decoder())
    program = decoder()
    assert item(program)
    assert len(calls) == 7 + 6
    for name in names(whole):
        assert torch.equal(program.tensor(name), whole.tensor(name))
    with pytest.raises(gw.InputError, match="holds the weights of another run: its options differ"):
        gw.PruneLinears(sparsity=0.6, calibration=batches(), checkpoint=tmp_path / "run")(decoder())


def test_masks_of_ones_own() -> None:
    name = "layers.1.up.weight"
    mask = torch.rand(2 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) > 0.5
    program = decoder()
    assert gw.PruneByMasks(masks={name: mask})(program)
    assert torch.equal(program.tensor(name) != 0, mask)
    assert names(program) == [name]
    for masks, words in [
        ({name: mask[:4]}, r"is \[4, 32\], the weight \[64, 32\]"),
        ({"embed.weight": mask}, "is the mask of no linear's weight"),
    ]:
        with pytest.raises(gw.InputError, match=words):
            gw.PruneByMasks(masks=masks)(decoder())
    with pytest.raises(gw.InputError, match="does not keep to 2:4"):
        gw.PruneByMasks(masks={name: mask}, pattern="2:4")(decoder())
    with pytest.raises(gw.InputError, match="must be a bool tensor, not torch.float32"):
        gw.PruneByMasks(masks={name: mask.float()})


def test_norms_are_those_of_all_rows() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    found = Norms.over([x[:20], x[20:]])
    assert found.count == 50
    assert torch.allclose(found.squares.double(), x.double().square().sum(0), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    program = gw.trace(nn.Linear(32, 16).to(dtype), torch.randn(2, 32).to(dtype))
    data = None if method == "magnitude" else [torch.randn(64, 32).to(dtype)]
    small = gw.optimize(
        program,
        [gw.PruneLinears(pattern="2:4", method=method, calibration=data)],
        example_inputs=(torch.randn(2, 32).to(dtype),),
    )
    weight = small.tensor("weight")
    assert weight.dtype == dtype
    assert isinstance(weight, nn.Parameter)
    assert float((weight == 0).float().mean()) == 0.5
    assert gw.SparsityPattern.of("2:4", where="test").holds(weight != 0)
    assert float((program.tensor("weight") == 0).float().mean()) == 0  # not written into


def test_linears_of_a_layer_are_pruned_together_or_one_after_another() -> None:
    data = batches(6)
    together, after = (pruned(method="sparsegpt", calibration=data, sequential=each) for each in (False, True))
    first = "layers.0.attn.q_proj.weight"
    assert torch.allclose(together.tensor(first), after.tensor(first), atol=1e-5)
    assert not torch.equal(together.tensor("layers.0.down.weight"), after.tensor("layers.0.down.weight"))
    source = decoder()  # together: for what the layer gives while it is whole
    node = next(node for node in source.nodes if gw.path_of(node) == "layers.0.down")
    observed = Observed.over([_value(source, node.args[0], batch) for batch in data])
    kind = gw.SparsityPattern.of("unstructured", where="test")
    weight = source.tensor("layers.0.down.weight").detach()
    found = gw.SparseGpt().prune(weight, kind, 0.5, observed, fixed=False)
    assert torch.allclose(together.tensor("layers.0.down.weight"), found.weight, atol=1e-5)
