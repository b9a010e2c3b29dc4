"""Wrong rewrites of real programs: every one is caught, named and rolled back; right ones of the same kind pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.planted import RIGHT, WRONG, Entry, SentenceEmbedder
from torch import nn

import graphwright as gw

transformers = pytest.importorskip("transformers")

Case = tuple[gw.Program, dict[str, Any]]


def shaken(model: nn.Module) -> nn.Module:
    """No weight at the value it is created with: a bias of 0 or a norm's weight of 1 would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def batch(vocabulary: int, sequence: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, vocabulary, (2, sequence), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, sequence - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These tensors are small: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> dict[str, Case]:
    """The programs by name, each traced when it is first asked for."""
    known: dict[str, Case] = {}

    class Lazy(dict[str, Case]):
        def __missing__(self, name: str) -> Case:
            known[name] = self[name] = _trace(name, request)
            return self[name]

    return Lazy()


def _trace(name: str, request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 97}
    if name == "minilm":
        folder: Path = request.getfixturevalue("minilm_dir")
        encoder = transformers.AutoModel.from_pretrained(folder).eval()
        encoder.encoder.layer = encoder.encoder.layer[:3]  # the same mistakes, in half the time
        sentences = batch(encoder.config.vocab_size, 16)
        return gw.trace(SentenceEmbedder(encoder), sentences), sentences
    inputs: dict[str, Any] = {**batch(97, 7), "use_cache": False}
    if name == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            attn_implementation="eager",
            **small,
        )
        return gw.trace(shaken(transformers.LlamaForCausalLM(config)), inputs), inputs
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **small)
    return gw.trace(shaken(transformers.GPT2LMHeadModel(config)), inputs), inputs


def run(entry: Entry, program: gw.Program, inputs: dict[str, Any]) -> gw.Report:
    flat = program.signature.flatten((), inputs)
    return gw.run_passes(program, [entry.make()], [gw.Verifier(flat)])


def outputs(program: gw.Program, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(program.body(*program.signature.flatten((), inputs)))


@pytest.mark.parametrize("entry", WRONG.values(), ids=WRONG)
def test_a_wrong_rewrite_is_caught(entry: Entry, models: dict[str, Case]) -> None:
    traced, inputs = models[entry.model]
    in_place = entry.name == "weight-written-in-place"
    program = traced.clone(copy_weights=in_place)
    text, expected = str(program), outputs(program, inputs)
    with pytest.raises(gw.ContractViolation) as caught:
        run(entry, program, inputs)
    assert caught.value.pass_name == entry.name
    assert entry.name in str(caught.value)
    assert str(program) == text
    assert program.journal == []
    if not in_place:  # what was written into a tensor cannot be brought back, so it is said instead
        for found, wanted in zip(outputs(program, inputs), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("entry", RIGHT.values(), ids=RIGHT)
def test_a_right_rewrite_passes(entry: Entry, models: dict[str, Case]) -> None:
    traced, inputs = models[entry.model]
    program = traced.clone()
    report = run(entry, program, inputs)
    assert report.rows[0].changed
    assert [item.pass_name for item in program.journal] == [entry.name]


def test_the_catalogue_is_large_and_each_entry_different() -> None:
    assert len(WRONG) >= 40
    assert len(RIGHT) >= 12
    assert (
        len({entry.edit.__code__.co_code + repr(entry.edit.__code__.co_consts).encode() for entry in WRONG.values()})
        >= 40
    )
