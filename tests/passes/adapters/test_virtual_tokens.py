"""Prompt tuning, DePT and prefix tuning, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.adapters.cases import stirred
from tests.passes.adapters.families import BATCH, FAMILIES, IDS, MASK, traced
from torch import nn

import graphwright as gw

TOKENS = 3
TASKS = {"bert": "FEATURE_EXTRACTION", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 2e-5 * wanted.abs().max())


def with_tensors(program: gw.Program, tensors: dict[str, torch.Tensor]) -> gw.Program:
    mine = gw.adapter_tensors(program, "default")
    assert set(mine) == set(tensors)
    with torch.no_grad():
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
    return program


def lookup(family: str) -> str:
    return {"bert": "embeddings.word_embeddings", "gpt2": "transformer.wte", "llama": "model.embed_tokens"}[family]


@pytest.mark.parametrize("family", sorted(TASKS))
def test_a_prompt_does_what_pefts_does(family: str) -> None:
    peft = pytest.importorskip("peft")
    program = traced(family)
    assert gw.InsertAdapters(gw.PromptTuning(tokens=TOKENS))(program)
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type=TASKS[family], num_virtual_tokens=TOKENS)
    theirs = peft.get_peft_model(FAMILIES[family](), config).eval()
    prompt = theirs.get_prompt_embedding_to_save("default").detach()
    with_tensors(program, {f"{lookup(family)}.prompt.default": prompt})
    with torch.no_grad():
        wanted = theirs(**BATCH)[0]
        found = program(**BATCH)[0]
    assert close(found, wanted[:, TOKENS:])
    assert not close(found, traced(family)(**BATCH)[0])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prefix_does_what_pefts_does(family: str) -> None:
    peft = pytest.importorskip("peft")
    program = traced(family)
    assert gw.InsertAdapters(gw.PrefixTuning(tokens=TOKENS))(program)
    torch.manual_seed(1)
    model: Any = FAMILIES[family]()
    model.config.use_cache = True  # PEFT gives the prefix as a cache
    theirs = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    theirs.eval()
    flat = theirs.get_prompt_embedding_to_save("default").detach()
    heads = 2 if family == "llama" else 4
    # [n, layers · (key, value) · heads · 8] -> [layers, (key, value), heads, n, 8]
    parts = flat.view(TOKENS, 2, 2, heads, 8).permute(1, 2, 3, 0, 4)
    path = "model.layers.{}.self_attn" if family == "llama" else "transformer.h.{}.attn"
    with_tensors(
        program,
        {
            f"{path.format(layer)}.prefix_{name}.default": parts[layer][which]
            for layer in range(2)
            for which, name in enumerate(("keys", "values"))
        },
    )
    with torch.no_grad():
        wanted = theirs(**BATCH)[0]
        found = program(**BATCH)[0]
    assert found.shape == wanted.shape
    assert close(found, wanted)
    assert not close(found, traced(family)(**BATCH)[0])


def test_dept_adds_its_update_to_the_text_and_not_to_the_prompt() -> None:
    program = traced("llama")
    gw.InsertAdapters(gw.DePT(tokens=TOKENS, rank=2, max_length=9))(program)
    stirred(program)
    tensors = {name.split(".")[-2]: value for name, value in gw.adapter_tensors(program, "default").items()}
    assert {name: list(value.shape) for name, value in tensors.items()} == {
        "prompt": [TOKENS, 32],
        "dept_A": [9, 2],
        "dept_B": [2, 32],
    }
    model: Any = FAMILIES["llama"]()
    with torch.no_grad():
        text = model.get_input_embeddings()(IDS) + (tensors["dept_A"] @ tensors["dept_B"])[: IDS.shape[1]]
        whole = torch.cat([tensors["prompt"].expand(2, -1, -1), text], 1)
        mask = torch.cat([torch.ones(2, TOKENS, dtype=torch.long), MASK], 1)
        wanted = model(inputs_embeds=whole, attention_mask=mask)[0][:, TOKENS:]
        assert close(program(**BATCH)[0], wanted)
    with pytest.raises(gw.InputError, match="has 10 for 'sequence', the program takes 1..9"):
        program(input_ids=torch.ones(1, 10, dtype=torch.long), attention_mask=torch.ones(1, 10, dtype=torch.long))


@pytest.mark.parametrize(
    ("kind", "trained"),
    [
        (gw.PromptTuning(tokens=TOKENS), TOKENS * 32),
        (gw.DePT(tokens=TOKENS, rank=2, max_length=9), TOKENS * 32 + 2 * (9 + 32)),
        (gw.PrefixTuning(tokens=TOKENS), 2 * 2 * TOKENS * 32),
    ],
)
def test_trained_saved_put_in_again_and_taken_out(kind: gw.AdapterKind, trained: int, tmp_path: Path) -> None:
    program = gw.optimize(traced("bert"), [gw.InsertAdapters(kind)], example_inputs=BATCH)
    assert program.report.rows[0].contract == "retrain"
    parameters = [p for p in program.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == trained
    target = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2))
    optimizer, losses = torch.optim.Adam(parameters, 0.1), []
    for _ in range(8):
        loss = (program(**BATCH)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 2e-3  # a prompt moves an untrained model little
    gw.save_adapter(program, tmp_path / "adapter")
    again = traced("bert")
    assert gw.InsertAdapters(tmp_path / "adapter")(again)
    program.save(tmp_path / "program")
    loaded = gw.Program.load(tmp_path / "program")
    with torch.no_grad():
        assert torch.equal(again(**BATCH)[0], program(**BATCH)[0])
        assert close(loaded(**BATCH)[0], program(**BATCH)[0])
    with pytest.raises(gw.InputError, match="cannot be merged: it is more"):
        gw.MergeAdapters()(again)
    assert gw.RemoveAdapters()(loaded)
    with torch.no_grad():
        assert close(loaded(**BATCH)[0], traced("bert")(**BATCH)[0])
    assert traced("bert").dims["sequence"].max == 32  # other programs of the model keep theirs


@pytest.mark.parametrize(
    ("family", "kind"),  # with a longest sequence and without
    [("bert", gw.PromptTuning(tokens=TOKENS)), ("bert", gw.PrefixTuning(tokens=4)), ("llama", gw.DePT(max_length=9))],
)
def test_taken_out_the_sequence_is_as_long_as_before(family: str, kind: gw.AdapterKind, tmp_path: Path) -> None:
    program, before = traced(family), traced(family)
    gw.InsertAdapters(kind)(program)
    program.save(tmp_path / "program")
    program = gw.Program.load(tmp_path / "program")
    assert program.dims != before.dims
    gw.RemoveAdapters()(program)
    assert program.dims == before.dims
    assert [str(program.type_of(node)) for node in program.inputs] == [str(before.type_of(n)) for n in before.inputs]
    assert not program.records
    longest = torch.ones(1, 32, dtype=torch.long)
    with torch.no_grad():
        found, wanted = (each(input_ids=longest, attention_mask=longest)[0] for each in (program, before))
    assert close(found, wanted)


def test_a_limit_that_something_else_set_since_stays() -> None:
    program = traced("bert")
    gw.InsertAdapters(gw.PromptTuning(tokens=TOKENS))(program)
    with program.edit() as rewriter:
        rewriter.limit("sequence", 20)
        rewriter.retype()
    gw.RemoveAdapters()(program)
    assert program.dims["sequence"].max == 20


def refused(program: gw.Program, words: str, kind: gw.AdapterKind | None = None) -> None:
    before = str(program)
    with pytest.raises(gw.SelectionError, match="there is no place for") as caught:
        gw.InsertAdapters(kind or gw.PromptTuning())(program)
    assert words in str(caught.value)
    assert str(program) == before


def test_programs_that_have_no_place_for_it_say_why() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            pooled: torch.Tensor = self.table(input_ids).mean(1)
            return pooled

    ids = torch.zeros(2, 5, dtype=torch.long)
    refused(gw.trace(Pooled(), ids, dynamic=None), "the sequence has a fixed length")
    refused(gw.trace(nn.Linear(4, 4), torch.zeros(2, 4)), "no inputs are looked up in a table")
    refused(gw.trace(Pooled(), ids), "there is no attention as one operator", gw.PrefixTuning())


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: gw.PromptTuning(tokens=0), r"not 0 \(at prompt: tokens"),
        (lambda: gw.PromptTuning(init="zeros"), "must be 'vocabulary' or 'normal'"),
        (lambda: gw.DePT(rank=0), r"not 0 \(at dept: rank"),
        (lambda: gw.PrefixTuning(std=0.0), r"positive number, not 0.0 \(at prefix: std"),
    ],
)
def test_options_that_are_wrong(made: Any, words: str) -> None:
    with pytest.raises(gw.InputError, match=words):
        made()
