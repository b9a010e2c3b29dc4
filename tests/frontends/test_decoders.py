"""Decoding steps of every family: the tokens that transformers generates, however the text is cut into steps."""

from __future__ import annotations

import collections
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frontends.decoders import FAMILIES, generate, greedy, make

import graphwright as gw
from graphwright.backends.reference.session import ReferenceSession
from graphwright.frontends.huggingface import load_decoder
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.passes.decoding import PrepareDecoder
from graphwright.passes.pipeline import run_passes

pytest.importorskip("transformers")

PROMPTS = [[5, 17, 30, 44, 3, 61, 80, 12, 9], [22, 71, 8, 90], [33, 2, 64, 19, 77, 50]]
COUNT = 9

# Families without values of positions, and those with learned ones.
NO_POSITIONS, LEARNED = {"falcon-alibi", "mpt", "bloom"}, {"gpt2", "opt"}

# What a prepared step consists of; the last line is Gemma's scale of embeddings and cap of logits, OPT's of queries.
PREPARED = {
    *("aten.sym_size.int", "aten.unsqueeze", "aten.arange", "aten.add.Tensor", "aten.embedding", "py.getitem"),
    *("aten.split_with_sizes", "aten.split.Tensor", "aten.chunk", "aten.slice.Tensor"),
    *("aten.reshape", "aten.transpose.int"),
    *("aten.linear", "aten.layer_norm", "aten.gelu", "aten.relu", "graphwright.rms_norm"),
    *("graphwright.rotary_embedding", "graphwright.gated_activation"),
    *("graphwright.cache_append", "graphwright.cached_attention", "graphwright.select_rows"),
    *("aten.mul.Tensor", "aten.div.Tensor", "aten.tanh"),
}


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
    assert layout == DecoderLayout(((2, 8),) * 2, ((2, 8),) * 2, 97, None)
    assert {name: (dim.min, dim.max) for name, dim in program.dims.items()} == dict.fromkeys(
        ("batch", "tokens", "selected", "slots", "capacity"), (1, None)
    )
    assert program.symbols.conditions == ()


def test_a_text_ends_where_positions_do() -> None:
    assert [DecoderLayout.of(traced(name)[1]).length for name in ("gpt2", "opt", "llama")] == [64, 64, None]
    program = traced("llama")[1].clone()
    run_passes(program, [PrepareDecoder(length=24)])
    session = ReferenceSession(program, slots=1, capacity=40)
    zero, tokens = torch.zeros(1, dtype=torch.int64), torch.ones(1, 20, dtype=torch.int64)
    session.step(tokens, zero, zero + 4, zero.view(1, 1))
    with pytest.raises(gw.InputError, match="do not fit the 24 positions"):
        session.step(tokens, zero, zero + 5, zero.view(1, 1))


def test_optimize_takes_a_folder(tinylm_dir: Path) -> None:
    """bfloat16 weights; every pass is held to its contract."""
    small = gw.optimize(tinylm_dir, [PrepareDecoder(length=128), gw.QuantizeLinears(bits=4, group_size=32)])
    assert DecoderLayout.of(small).length == 128
    assert small.report.rows[-1].outputs["logits"]["logits"]["kl"] < 0.1


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


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prepared_step_says_the_same(name: str) -> None:
    """Every family has one linear for query, key and value, and one operator for each norm, gate and rotation."""
    program = traced(name)[1].clone()
    run_passes(program, [PrepareDecoder(length=24)])
    session = ReferenceSession(program, slots=5, capacity=24)
    assert greedy(session, PROMPTS, [3, 0, 4], COUNT) == expected(name)
    found = collections.Counter(op_name(node) for node in program.nodes if node.op == "call_function")
    assert set(found) <= PREPARED
    assert found["aten.linear"] == 9
    assert found["graphwright.rotary_embedding"] in (0, 4)
    lookups = 1 if name in NO_POSITIONS else 2 if name in LEARNED else 5 if name == "gemma3" else 3
    assert found["aten.embedding"] == lookups
    chosen = [node for node in program.nodes if op_name(node) == "graphwright.select_rows"]
    heads = next(node for node in program.nodes if op_name(node) == "aten.linear" and node > max(chosen))
    assert path_of(heads) != "lm_head"


def test_a_prepared_llama_is_the_fewest_operators() -> None:
    program = traced("llama")[1].clone()
    run_passes(program, [PrepareDecoder(length=24)])
    found = {op_name(node) for node in program.nodes if node.op == "call_function"}
    assert found <= PREPARED - {"aten.mul.Tensor", "aten.tanh", "aten.div.Tensor", "aten.layer_norm", "aten.gelu"}


@pytest.mark.parametrize("name", ["qwen3", "opt"])
def test_a_step_is_quantised_under_verification(name: str) -> None:
    small = gw.optimize(traced(name)[0], [PrepareDecoder(length=64), gw.QuantizeLinears(bits=4, group_size=16)])
    assert not any(row.skipped for row in small.report.rows if row.changed)
    record = small.report.rows[-1]
    assert record.changed
    assert 0 < (record.local_error or 0) < 0.5
    assert {"kl", "top1_agreement"} <= set(record.outputs["logits"]["logits"])
    session = ReferenceSession(small, slots=5, capacity=24)
    assert len(greedy(session, PROMPTS, [3, 0, 4], 3)) == 3
