"""Decoders in ONNX: one file with caches, which says step by step what the program says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tests.frontends.decoders import FAMILIES, generate, greedy, make

import graphwright as gw
from graphwright.backends.onnx import OnnxBackend
from graphwright.backends.onnx.positions import position_table
from graphwright.backends.onnx.proof import prove_attention
from graphwright.frontends.huggingface import load_decoder
from graphwright.ir import ops
from graphwright.ir.arguments import argument
from graphwright.ir.errors import ExportError, InputError, ProgramError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.passes.pipeline import run_passes

pytest.importorskip("transformers")

# Head dims for which the kernel rotates by itself: multiples of 16.
_WIDE: dict[str, dict[str, Any]] = {
    **{
        name: {"hidden_size": 64}
        for name in ("llama", "mistral", "qwen2", "phi3", "falcon-multi-query", "falcon-grouped")
    },
    **{name: {"head_dim": 16} for name in ("qwen3", "gemma", "gemma2", "gemma3")},
    "phi": {"hidden_size": 128, "partial_rotary_factor": 0.5},
    "gpt-neox": {"hidden_size": 128},
}
PROMPTS = [[5, 17, 30, 44, 3, 61, 80], [22, 71], [33, 2, 64, 19]]


@functools.cache
def model_of(name: str) -> Any:
    return make(name, **_WIDE.get(name, {}))


@functools.cache
def loaded(name: str) -> Program:
    """As traced; not to be written into."""
    return load_decoder(model_of(name), check=False)


@functools.cache
def fused(name: str) -> Program:
    """Without tables of positions."""
    program = loaded(name).clone()
    run_passes(program, [gw.Cleanup(), gw.FuseAll()], [])
    return program


@functools.cache
def prepared(name: str) -> Program:
    program = loaded(name).clone()
    run_passes(program, [gw.PrepareDecoder(length=64)], [])
    return program


def kernels(export: Any) -> dict[str, int]:
    return {row.kernel: row.count for row in export.kernels}


# -- every family ------------------------------------------------------------------------------------------------------


# Those left out differ from one of these in nothing that the export sees.
@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"qwen2", "gemma", "falcon-multi-query", "mpt"}))
def test_every_family(name: str, tmp_path: Path) -> None:
    """The export compares steps by itself; here, that attention is one kernel a layer and rotary is part of it."""
    export = gw.export_onnx(prepared(name), tmp_path / "model.onnx")
    counts = kernels(export)
    attention = {kernel: count for kernel, count in counts.items() if kernel.startswith("GroupQueryAttention")}
    assert sum(attention.values()) == 2
    rotates = any(op_name(node) == "graphwright.rotary_embedding" for node in prepared(name).nodes)
    assert all(("do_rotary=1" in kernel) == rotates for kernel in attention)
    assert {"RotaryEmbedding", "Sin"}.isdisjoint(counts)
    assert {each.output for each in export.differences} == {"logits", "caches"}
    assert {each.sizes for each in export.differences if each.output == "logits"} == {
        "batch=3 tokens=7 past=0",
        "batch=3 tokens=1 past=7",
        "batch=3 tokens=1 past=8",
        "batch=1 tokens=3 past=0",
        "batch=1 tokens=4 past=3",
    }


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon-alibi"])
def test_generates_like_transformers(name: str) -> None:
    """As traced, without any pass, in a session of onnxruntime."""
    session = OnnxBackend().lower(loaded(name)).session(slots=4, capacity=24)
    assert greedy(session, PROMPTS, [3, 0, 2], 8) == generate(model_of(name), PROMPTS, 8)


# -- the file by itself ------------------------------------------------------------------------------------------------


def test_signature_and_single_storage(tmp_path: Path) -> None:
    program = fused("llama")
    export = gw.export_onnx(program, tmp_path / "model.onnx", context_length=64)
    assert export.input_names == (
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    )
    assert export.output_names == ("logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value")
    graph = onnx.load(export.path).graph
    shapes = {each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in
              (*graph.input, *graph.output)}  # fmt: skip
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]
    assert shapes["present.0.key"] == ["batch_size", 2, "total_sequence_length", 16]
    assert shapes["logits"] == ["batch_size", 1, 97]
    # The embedding is tied to the head; the layers share the tables of angles.
    sizes = sorted(int(np.prod(each.dims)) for each in graph.initializer)
    assert sizes.count(97 * 64) == 1
    assert [tuple(each.dims) for each in graph.initializer if "table" in each.name] == [(64, 8), (64, 8)]


def test_prompts_padded_on_the_right_then_single_tokens(tmp_path: Path) -> None:
    """Fed by hand as the documentation says, against transformers."""
    gw.export_onnx(fused("mistral"), tmp_path / "model.onnx", check=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    longest, lengths = max(map(len, PROMPTS)), np.array([len(prompt) for prompt in PROMPTS])
    tokens = np.array([[*prompt, *[0] * (longest - len(prompt))] for prompt in PROMPTS])
    caches = {each.name: np.zeros((3, 2, 0, 16), np.float32) for each in session.get_inputs()[2:]}
    found: list[Any] = []
    for _ in range(8):
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        logits, *presents = session.run(None, {"input_ids": tokens, "attention_mask": mask, **caches})
        caches = dict(zip(caches, presents, strict=True))
        tokens = logits.argmax(-1)
        found.append(tokens)
        lengths = lengths + 1
    assert np.concatenate(found, axis=1).tolist() == generate(model_of("mistral"), PROMPTS, 8)


@pytest.mark.parametrize(("logits", "shape"), [("last", (2, 1, 97)), ("all", (2, 5, 97)), ("rows", (2, 3, 97))])
def test_which_logits(logits: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    gw.export_onnx(fused("llama"), tmp_path / "model.onnx", logits=logits)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {each.name: np.zeros((2, 2, 0, 16), np.float32) for each in session.get_inputs() if "past" in each.name}
    feed |= {"input_ids": np.ones((2, 5), np.int64), "attention_mask": np.ones((2, 5), np.int64)}
    if logits == "rows":
        feed["rows"] = np.array([[0, 2, 4], [1, 1, 3]])
    assert session.run(["logits"], feed)[0].shape == shape


def test_without_a_context_length_there_is_no_limit(tmp_path: Path) -> None:
    export = gw.export_onnx(fused("llama"), tmp_path / "model.onnx")
    assert kernels(export)["RotaryEmbedding"] == 4
    assert "table" not in " ".join(each.name for each in onnx.load(export.path).graph.initializer)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights(bits: int, tmp_path: Path) -> None:
    program = fused("llama").clone()
    run_passes(program, [gw.QuantizeLinears(bits=bits, group_size=32)], [])
    export = gw.export_onnx(program, tmp_path / "model.onnx", context_length=64)
    assert sum(count for kernel, count in kernels(export).items() if kernel.startswith("MatMulNBits")) >= 8
    assert set(export.quantized.values()) == {"MatMulNBits"}
    rounded = gw.export_onnx(program, tmp_path / "rounded.onnx", context_length=64, accuracy_level=4)
    assert rounded.error > export.error


def test_quantised_and_tied_is_stored_once(tmp_path: Path) -> None:
    program = fused("llama").clone()
    run_passes(program, [gw.QuantizeLinears(bits=4, group_size=32)], [])
    run_passes(program, [gw.QuantizeEmbeddings(bits=8, group_size=32, tied=True)], [])
    export = gw.export_onnx(program, tmp_path / "model.onnx", context_length=64)
    tables = [each for each in onnx.load(export.path).graph.initializer if int(np.prod(each.dims)) == 97 * 64]
    assert len(tables) == 1
    assert kernels(export)["GatherBlockQuantized bits=8 block=32"] == 1


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_session_takes_steps_of_any_kind() -> None:
    """Several tokens behind others in several rows, tokens taken back, no logits at all; slots are copied."""
    program = loaded("llama")
    ours = OnnxBackend().lower(program).session(slots=4, capacity=16)
    from graphwright.backends.reference.session import ReferenceSession

    reference = ReferenceSession(program, slots=4, capacity=16)
    steps = [
        ([[5, 17, 30], [44, 3, 61]], [3, 1], [0, 0], [[], []]),
        ([[80, 12], [9, 22]], [3, 1], [3, 2], [[0, 1], [1, 0]]),
        ([[71], [8]], [1, 3], [4, 5], [[0], [0]]),
        ([[90, 4, 6]], [2], [2], [[2]]),
    ]
    for session in (ours, reference):
        session.step(*[torch.tensor(each) for each in ([[1, 2, 3]], [0], [0], [[0]])])
        session.copy(0, 2, 2)
    for tokens, slots, starts, rows in steps:
        given = [torch.tensor(each, dtype=torch.int64) for each in (tokens, slots, starts, rows)]
        torch.testing.assert_close(ours.step(*given), reference.step(*given), rtol=0, atol=2e-5)
    with pytest.raises(InputError, match="position"):
        ours.step(*[torch.tensor(each) for each in ([[1, 2]], [0], [15], [[0]])])


def test_optimised_for_onnxruntime() -> None:
    """A decoding step on the target ``onnx`` is called like any other."""
    optimized = gw.optimize(model_of("gpt2"), target="onnx", verify=False)
    assert max(optimized.lowering_error()) < 1e-5


# -- rotary embedding --------------------------------------------------------------------------------------------------


def test_tables_hold_what_depends_on_positions_alone() -> None:
    program = fused("llama")
    rotary = next(node for node in program.nodes if op_name(node) == "graphwright.rotary_embedding")
    table = position_table(program, argument(rotary, "cos"), 40)
    assert table is not None
    assert table.shape == (40, 16)
    angles = torch.arange(40).unsqueeze(1) / 10000 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(table, angles.cos().repeat(1, 2), rtol=0, atol=1e-5)
    # A hidden state does not.
    assert position_table(program, argument(rotary, "x"), 40) is None


def test_positions_that_the_program_has(tmp_path: Path) -> None:
    """No more than it has tables for; fewer, if asked for."""
    gw.export_onnx(prepared("llama"), tmp_path / "model.onnx", context_length=20, check=False)
    tables = [each.dims for each in onnx.load(tmp_path / "model.onnx").graph.initializer if "table" in each.name]
    assert [tuple(each) for each in tables] == [(20, 8), (20, 8)]
    with pytest.raises(ExportError, match="64 positions, not for 65"):
        gw.export_onnx(prepared("llama"), tmp_path / "model.onnx", context_length=65)


# -- queries, keys and values in one piece -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "is_packed"), [("llama", True), ("gpt2", True), ("phi3", True), ("qwen3", False)])
def test_one_linear_feeds_the_attention(name: str, is_packed: bool, tmp_path: Path) -> None:
    """By a split (Llama once fused, GPT-2) or by slices (Phi-3); Qwen3 normalises queries and keys in between."""
    gw.export_onnx(prepared(name), tmp_path / "model.onnx", check=False)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    attention = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    assert all((list(node.input[1:3]) == ["", ""]) == is_packed for node in attention)


def test_parts_in_another_order_stay_apart(tmp_path: Path) -> None:
    """Keys before queries: the file must not take one for the other."""
    program = prepared("gpt2").clone()
    attention = [node for node in program.nodes if op_name(node) == "graphwright.cached_attention"]
    with program.edit():
        for node in attention:
            append = argument(node, "keys")
            query, key = argument(node, "query"), argument(append, "new")
            node.replace_input_with(query, key)
            append.prepend(query)
            append.replace_input_with(key, query)
    gw.export_onnx(program, tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert all(node.input[1] for node in nodes if node.op_type == "GroupQueryAttention")


# -- what cannot be exported -------------------------------------------------------------------------------------------


def test_head_dim_without_a_kernel(tmp_path: Path) -> None:
    program = load_decoder(make("llama", hidden_size=48), check=False)
    with pytest.raises(ExportError, match="head dim of 12, only for multiples of 8"):
        gw.export_onnx(program, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_portable_mode(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="onnxruntime's operators"):
        gw.export_onnx(fused("llama"), tmp_path / "model.onnx", mode="portable")
    assert list(tmp_path.iterdir()) == []


class _Loose(torch.nn.Module):
    """Operators of the cache in a program that is no decoding step."""

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> Any:
        return ops.get("select_rows").target(x, rows)


def test_cache_operators_outside_of_a_step(tmp_path: Path) -> None:
    program = gw.trace(_Loose(), {"x": torch.randn(2, 3, 4), "rows": torch.tensor([[0], [1]])})
    with pytest.raises(ExportError, match="not a decoding step"):
        gw.export_onnx(program, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("option", "message"),
    [({"logits": "first"}, "'first'"), ({"context_length": 0}, "at least 16"), ({"context_length": 8}, "at least 16")],
)
def test_options(option: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        gw.export_onnx(fused("llama"), tmp_path / "model.onnx", **option)


@pytest.mark.parametrize("make_path", [lambda folder: folder / "none" / "model.onnx", lambda folder: folder])
def test_path_that_cannot_be_written(make_path: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="folder"):
        gw.export_onnx(fused("llama"), make_path(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_attention_by_another_operator_is_refused() -> None:
    node = onnx.helper.make_node("Concat", ["a", "b"], ["present.0.key"], axis=2)
    graph = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    with pytest.raises(ExportError, match="given by Concat, not by GroupQueryAttention"):
        prove_attention(graph, ["present.0.key"], "GroupQueryAttention")


def test_a_wrong_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that are off by one must not pass the comparison."""
    from graphwright.backends.onnx import decoder

    plain = decoder.DecoderLowering._count

    def shifted(self: Any, mask: Any, starts: Any, length: Any) -> Any:
        result = plain(self, mask, starts, length)
        self.set(starts, self.graph.call("Add", self.tensor(starts), self.graph.integers(1)))
        return result

    monkeypatch.setattr(decoder.DecoderLowering, "_count", shifted)
    with pytest.raises(ExportError, match="from the program"):
        gw.export_onnx(fused("gpt2"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_config_needs_a_decoder() -> None:
    program = gw.trace(torch.nn.Linear(3, 4), torch.randn(2, 3))
    with pytest.raises(ProgramError, match="not a decoding step"):
        OnnxBackend().lower(program).session()
