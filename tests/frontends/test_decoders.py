"""Decoding steps of every family: the tokens that transformers generates, however the text is cut into steps."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frontends.decoders import FAMILIES, generate, greedy, make

from graphwright.backends.reference.session import ReferenceSession
from graphwright.frontends.huggingface import load_decoder
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of

pytest.importorskip("transformers")

PROMPTS = [[5, 17, 30, 44, 3, 61, 80, 12, 9], [22, 71, 8, 90], [33, 2, 64, 19, 77, 50]]
COUNT = 9


@functools.cache
def traced(name: str) -> tuple[Any, Program]:
    model = make(name)
    return model, load_decoder(model)


@functools.cache
def expected(name: str) -> list[list[int]]:
    return generate(traced(name)[0], PROMPTS, COUNT)


@pytest.mark.parametrize("name", FAMILIES)
def test_decodes_like_transformers(name: str) -> None:
    """Prompts of different lengths, each in a slot of its own, against a batch padded to the left."""
    session = ReferenceSession(traced(name)[1], slots=5, capacity=20)
    assert greedy(session, PROMPTS, [3, 0, 4], COUNT) == expected(name)
    assert len({tuple(row) for row in expected(name)}) == len(PROMPTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_takes_text_in_any_pieces(name: str) -> None:
    """A prompt in chunks, tokens taken back, and several new tokens at once."""
    session = ReferenceSession(traced(name)[1], slots=2, capacity=20)
    prompt, wanted = PROMPTS[0], expected(name)[0]
    slot = torch.tensor([1])

    def step(tokens: list[int], start: int, rows: list[int]) -> list[int]:
        logits = session.step(torch.tensor([tokens]), slot, torch.tensor([start]), torch.tensor([rows]))
        result: list[int] = logits.argmax(2)[0].tolist()
        return result

    assert step(prompt[:4], 0, []) == []
    step(prompt[4:7], 4, [0, 2])
    assert step(prompt[7:], 7, [1]) == wanted[:1]
    step([1, 2, 3, 4], 9, [3])  # a guess that turns out wrong
    assert step(wanted[:5], 9, [0, 1, 2, 3, 4]) == wanted[1:6]
    assert step(wanted[2:4], 11, [1, 0]) == [wanted[4], wanted[3]]
    session.copy(1, 0, 13)
    slot = torch.tensor([0])
    assert step(wanted[4:8], 13, [3]) == wanted[8:9]


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-grouped", "bloom"])
def test_keeps_names_and_paths(name: str) -> None:
    model, program = traced(name)
    names = set(model.state_dict()) | {key for key, _ in model.named_buffers()} | {"alibi_slopes"}
    assert set(program.tensors()) <= names
    modules = {path for path, _ in model.named_modules()}
    assert {path_of(node) for node in program.nodes if node.op == "call_function"} <= modules
    heads = [node for node in program.nodes if op_name(node) == "aten.linear" and path_of(node) == "lm_head"]
    assert len(heads) == 1
    assert program.title == type(model).__name__


def test_leaves_the_model_as_it_was() -> None:
    model = make("falcon-alibi").train()
    before = model.config.to_dict(), dict(vars(model)), [dict(vars(module)) for module in model.modules()]
    load_decoder(model)
    assert before == (model.config.to_dict(), dict(vars(model)), [dict(vars(module)) for module in model.modules()])
    assert model.config._attn_implementation != "graphwright_step"
    assert "alibi_slopes" not in dict(model.named_buffers())


def test_layout_and_open_sizes() -> None:
    program = traced("gemma2")[1]
    layout = DecoderLayout.of(program)
    assert (layout.keys, layout.values, layout.vocabulary) == (((2, 8),) * 2, ((2, 8),) * 2, 97)
    assert {name: (dim.min, dim.max) for name, dim in program.dims.items()} == dict.fromkeys(
        ("batch", "tokens", "selected", "slots", "capacity"), (1, None)
    )
    assert program.symbols.conditions == ()


def test_windows_and_softcap_reach_the_operator() -> None:
    program = traced("gemma2")[1]
    found = [node.args for node in program.nodes if op_name(node) == "graphwright.cached_attention"]
    assert [(args[7], args[8]) for args in found] == [(5, 5.0), (0, 5.0)]


def test_a_program_of_steps_is_saved_and_loaded(tmp_path: Path) -> None:
    program = traced("falcon-alibi")[1]
    program.save(tmp_path / "step")
    loaded = Program.load(tmp_path / "step")
    assert DecoderLayout.of(loaded) == DecoderLayout.of(program)
    session = ReferenceSession(loaded, slots=3, capacity=20)
    assert greedy(session, PROMPTS, [0, 1, 2], COUNT) == expected("falcon-alibi")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_model_from_its_folder(tinylm_dir: Path, dtype: str) -> None:
    program = load_decoder(tinylm_dir, dtype=dtype)
    if dtype == "float32":
        from graphwright.frontends.huggingface import load_model

        model = load_model(tinylm_dir, task="text-generation", dtype=dtype)
        model.generation_config.eos_token_id = None
        prompts = [[11, 250, 31, 7, 90], [42, 5]]
        session = ReferenceSession(program, slots=2, capacity=40)
        assert greedy(session, prompts, [1, 0], 12) == generate(model, prompts, 12)
