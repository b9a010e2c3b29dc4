"""What adapters compute from their own tensors, computed beforehand."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frontends.decoders import traced as traced_decoder
from tests.passes.adapters.cases import CASES, Case, Net, X, stirred

import graphwright as gw
from graphwright.backends.reference.session import ReferenceSession

# kinds of which nothing can be computed before the input is there
NOTHING = {
    "bitfit",
    "bitfit-missing",
    "houlsby",
    "ia3",
    "ia3-input",
    "krona",
    "krona-a",
    "krona-block",
    "krona-block-a",
    "krona-block-residual",
    "loda",
    "lokr-whole",
    "lora-fa",
}


@lru_cache
def decoder() -> gw.Program:
    return traced_decoder("llama")[1]


@lru_cache
def traced() -> gw.Program:
    return gw.trace(Net(), X)


def adapted(kind: gw.AdapterKind, where: Any = "blocks.0.q", **options: Any) -> gw.Program:
    program = traced().clone()
    gw.InsertAdapters(kind, where=where, **options)(program)
    return stirred(program)


def folded(program: gw.Program, **options: Any) -> gw.OptimizedModel:
    """Verified as it was folded."""
    return gw.optimize(program, [gw.FoldAdapters(**options)], example_inputs=X)


def calls(program: gw.Program) -> list[str]:
    """The adapter's nodes, one a line."""
    found = []
    for node in program.nodes:
        if node.op == "call_function" and "adapter" in gw.tags_of(node):
            operands = ", ".join(f"%{item.name}" if hasattr(item, "name") else str(item) for item in node.args)
            found.append(f"%{node.name} = {gw.op_name(node)}({operands})")
    return found


def close(found: torch.Tensor, wanted: torch.Tensor, eps: float = 2e-6) -> bool:
    return bool((found - wanted).norm() <= eps * wanted.norm())


def test_text_of_lora() -> None:
    program = adapted(gw.LoRA(rank=2, alpha=6))
    assert calls(program) == [
        "%linear_7 = aten.linear(%x, %blocks_0_q_lora_A_default)",
        "%mul = aten.mul.Tensor(%linear_7, 3.0)",
        "%linear_8 = aten.linear(%mul, %blocks_0_q_lora_B_default)",
        "%add_4 = aten.add.Tensor(%linear, %linear_8)",
    ]
    small = folded(program)
    assert calls(small) == [
        "%linear_7 = aten.linear(%x, %blocks_0_q_lora_A_default)",
        "%linear_8 = aten.linear(%linear_7, %blocks_0_q_folded_default)",
        "%add_4 = aten.add.Tensor(%linear, %linear_8)",
    ]
    b = program.tensor("blocks.0.q.lora_B.default").detach()
    assert torch.equal(small.tensor("blocks.0.q.folded.default"), 3 * b)
    assert "blocks.0.q.lora_B.default" not in small.tensors()
    assert not any(p.requires_grad for p in small.parameters())


def test_text_of_vera() -> None:
    program = adapted(gw.VeRA(rank=5), "blocks.0.*")
    linears = {node.name: node for node in program.nodes if gw.path_of(node) == "blocks.0.q"}
    assert [gw.op_name(node) for node in linears.values() if node.op == "call_function"] == [
        "aten.slice.Tensor",
        "aten.linear",
        "aten.mul.Tensor",
        "aten.slice.Tensor",
        "aten.linear",
        "aten.mul.Tensor",
        "aten.linear",
        "aten.add.Tensor",
    ]
    small = folded(program)
    assert [line for line in calls(small) if "(%x," in line or "%linear_7," in line or "%linear," in line] == [
        "%linear_7 = aten.linear(%x, %blocks_0_q_folded_default)",
        "%linear_13 = aten.linear(%linear_7, %blocks_0_q_folded_default_1)",
        "%add_4 = aten.add.Tensor(%linear, %linear_13)",
    ]
    tensor = {name.removesuffix(".default"): t.detach().double() for name, t in program.tensors().items()}
    wanted = tensor["blocks.0.q.vera_lambda_b"][:, None] * tensor["adapters.vera_B"][:24]
    wanted = (wanted * tensor["blocks.0.q.vera_lambda_d"]).float()
    assert torch.equal(small.tensor("blocks.0.q.folded.default_1"), wanted)
    # up reads as many features as q, so the two share the part of A
    assert sum(name.endswith("vera_A.default") for name in small.tensors()) == 1
    assert "%linear_9 = aten.linear(%add, %blocks_0_q_folded_default)" in calls(small)


def test_text_of_dora() -> None:
    program = adapted(gw.DoRA(rank=3, alpha=6))
    assert len(calls(program)) == 15
    small = folded(program)
    assert calls(small) == [
        "%linear_7 = aten.linear(%x, %blocks_0_q_lora_A_default)",
        "%linear_9 = aten.linear(%linear_7, %blocks_0_q_folded_default)",
        "%sub = aten.sub.Tensor(%linear, %blocks_0_q_bias)",
        "%mul_1 = aten.mul.Tensor(%sub, %blocks_0_q_folded_default_1)",
        "%add_5 = aten.add.Tensor(%linear, %mul_1)",
        "%add_6 = aten.add.Tensor(%add_5, %linear_9)",
    ]


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_kind_is_the_same_function(name: str) -> None:
    case: Case = CASES[name]
    program = adapted(case.kind, case.where, **case.options)
    small = folded(program)
    assert close(small(X), program(X))
    before, after = (sum(node.op == "call_function" for node in each.nodes) for each in (program, small))
    if name in NOTHING:
        assert after == before
        assert set(small.records) == {"adapters"}
        assert not small.report.rows[0].changed
        return
    assert after < before
    assert set(small.records) == {"folded_adapters"}
    assert not gw.FoldAdapters()(small)
    assert not any(p.requires_grad for p in small.parameters())
    for base, tensor in traced().tensors().items():
        assert torch.equal(small.tensor(base), tensor)


def test_two_linears_become_one_where_that_is_smaller() -> None:
    for rank, count in ((11, 2), (12, 1)):  # r (24 + 24) and 24 · 24
        small = folded(adapted(gw.LoRA(rank=rank)))
        assert sum("aten.linear" in line for line in calls(small)) == count
    small = folded(adapted(gw.LoRAXS(rank=4, alpha=8, std=1.0)))
    assert sum("aten.linear" in line for line in calls(small)) == 2


def test_weights_of_several_places_are_copied_within_bounds() -> None:
    program = adapted(gw.VeRA(rank=5), "blocks.*")
    small = program.clone()
    assert gw.FoldAdapters(max_growth=100)(small)
    said = [each.reason for each in small.notes["refusals"]]
    assert any("would be copied: it grows by 480 bytes; max_growth is 100" in reason for reason in said)
    assert sum("aten.mul" in line for line in calls(small)) == 12
    assert not any("slice" in line for line in calls(small))
    assert close(small(X), program(X))


@pytest.mark.parametrize("side", ["output", "input"])
def test_factors_of_the_base_are_left_to_merging(side: str) -> None:
    program = adapted(gw.IA3(side=side))
    before = str(program)
    assert not gw.FoldAdapters()(program)
    assert str(program) == before
    assert "MergeAdapters, in place of folding, takes it in" in program.notes["refusals"][-1].reason


def test_chosen_by_name_and_place() -> None:
    program = adapted(gw.LoRA(rank=2, alpha=4), "blocks.*")
    gw.InsertAdapters(gw.LoRA(rank=3, alpha=6), where="blocks.*", adapter_name="other")(program)
    stirred(program)
    small = folded(program, adapters=["other"], where="blocks.1")
    assert [name for name in small.tensors() if "folded" in name] == [
        f"blocks.1.{leaf}.folded.other" for leaf in ("q", "up", "down")
    ]
    assert list(gw.adapters_of(small)) == ["default"]
    assert close(small(X), program(X))
    rest = folded(small, adapters=["other"])
    assert sum("folded" in name for name in rest.tensors()) == 6
    assert not gw.FoldAdapters(adapters=["other"])(rest)
    merged = gw.optimize(small, [gw.MergeAdapters()], example_inputs=X)
    assert close(merged(X), program(X), 5e-6)
    with pytest.raises(gw.InputError, match="there is no adapter 'third'"):
        gw.FoldAdapters(adapters=["third"])(program)


def test_casts_and_half_precision() -> None:
    program = gw.trace(Net().bfloat16(), X.bfloat16())
    gw.InsertAdapters(gw.LoRA(rank=2, alpha=4), where="blocks.*", dtype="float32")(program)
    stirred(program)
    small = gw.optimize(program, [gw.FoldAdapters()], example_inputs=X.bfloat16())
    assert not any("to.dtype" in line or "mul" in line for line in calls(small))
    b = program.tensor("blocks.0.q.lora_B.default").detach()
    assert torch.equal(small.tensor("blocks.0.q.folded.default_1"), (2 * b).bfloat16())


def test_switched_adapters_are_still_switched() -> None:
    program = adapted(gw.LoRA(rank=2, alpha=6), "blocks.*")
    gw.GateAdapters()(program)
    small = program.clone()
    assert gw.FoldAdapters()(small)
    assert sum("aten.mul" in line for line in calls(small)) == 6  # the gates
    weights = gw.adapter_weights(small, ["default", None, {"default": 0.5}, *["default"] * 4])
    assert close(small(X, adapter_weights=weights), program(X, adapter_weights=weights))


def test_what_cannot_be_done_any_more(tmp_path: Path) -> None:
    program: gw.Program = folded(adapted(gw.LoRA(rank=2, alpha=4)))
    for attempt in (
        lambda: gw.save_adapter(program, tmp_path),
        lambda: gw.adapter_tensors(program, "default"),
        lambda: gw.adapter_parameters(program),
        lambda: gw.MergeAdapters()(program),
        lambda: gw.RemoveAdapters(adapters=["default"])(program),
        lambda: gw.AdaptersAsInputs(adapters=["default"])(program),
    ):
        with pytest.raises(gw.InputError, match="adapter 'default' has been folded") as caught:
            attempt()
        assert "the program from before FoldAdapters" in str(caught.value)
    with pytest.raises(gw.InputError, match="there is, folded, an adapter 'default' already"):
        gw.InsertAdapters("lora")(program)
    program.save(tmp_path)
    assert gw.Program.load(tmp_path).records == program.records
    for wrong in ({"adapters": "default"}, {"max_growth": -1}):
        with pytest.raises(gw.InputError, match="must be"):
            gw.FoldAdapters(**wrong)


@pytest.mark.parametrize("kind", [gw.VeRA(rank=4), gw.DoRA(rank=3, alpha=6)], ids=["vera", "dora"])
def test_a_decoding_step_stays_in_the_executor(kind: gw.AdapterKind) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("graphwright.backends.cpu._native")
    program = decoder().clone()
    gw.InsertAdapters(kind, where=["*.q_proj", "*.v_proj"])(program)
    stirred(program)
    passes = [gw.PrepareDecoder(length=32), gw.FoldAdapters()]
    small: Any = gw.optimize(program, passes, target="cpu", verify=False)
    assert not [use for use in small.explain() if use.kernel in ("torch", "reference")]
    tokens = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(5))
    rows, zero = torch.arange(9).unsqueeze(0), torch.zeros(1, dtype=torch.int64)
    sessions = small.session(slots=1, capacity=16), ReferenceSession(program, slots=1, capacity=16)
    found, wanted = (each.step(tokens, zero, zero, rows) for each in sessions)
    assert close(found, wanted, 2e-5)


def test_a_factor_that_is_only_seen_otherwise_stays_what_it_is() -> None:
    """IA3 on a convolution: its factors are viewed as ``[channels, 1, 1]``, of which nothing can be saved."""
    model, x = torch.nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    model.eval()
    insert = gw.InsertAdapters(gw.IA3(ops=("conv",)))
    program = stirred(gw.optimize(torch.nn.Sequential(model), [insert], example_inputs=x, verify=False))
    assert not gw.FoldAdapters()(program)
    assert set(program.records["adapters"]) == {"default"}
    assert "folded_adapters" not in program.records
