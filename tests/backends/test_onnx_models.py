"""Whole models of many families, and what the file looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import nn

import graphwright as gw
from graphwright.backends.onnx import OnnxExport

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SMALL)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=99)
    ),
    "albert": lambda: transformers.AlbertModel(transformers.AlbertConfig(**SMALL, embedding_size=16)),
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SMALL)),
    "electra": lambda: transformers.ElectraModel(transformers.ElectraConfig(**SMALL)),
    "deberta": lambda: transformers.DebertaV2Model(transformers.DebertaV2Config(**SMALL)),
    "modernbert": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(**SMALL, pad_token_id=0, cls_token_id=1, sep_token_id=2, **NO_SPECIAL)
    ),
    "t5": lambda: transformers.T5EncoderModel(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=8)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=4)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED, head_dim=8)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GROUPED, head_dim=8)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GROUPED, head_dim=8)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, **NO_SPECIAL)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**{**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32})
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL)),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**GROUPED, pad_token_id=0, **NO_SPECIAL)),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99)
    ),
}


def program_of(name: str) -> tuple[gw.Program, dict[str, torch.Tensor]]:
    """A small random model of a family and a padded batch for it."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    batch: dict[str, Any] = {"input_ids": torch.randint(3, 90, (2, 7)), "attention_mask": mask}
    if hasattr(model, "lm_head") or "CausalLM" in type(model).__name__:
        batch["use_cache"] = False
    return gw.trace(model, batch), batch


def export(name: str, path: Path, **options: Any) -> tuple[gw.Program, OnnxExport]:
    program, batch = program_of(name)
    return program, gw.export_onnx(program, path, example_inputs=batch, **options)


@pytest.mark.parametrize("name", MODELS)
def test_models_agree(tmp_path: Path, name: str) -> None:
    """At the example's sizes and at others; every dimension open, under its own name."""
    program, report = export(name, tmp_path / "model.onnx")
    assert {each.sizes for each in report.differences} == {"batch=2 sequence=7", "batch=5 sequence=10"}
    model = onnx.load(tmp_path / "model.onnx")
    for value in model.graph.input:
        assert [axis.dim_param for axis in value.type.tensor_type.shape.dim] == ["batch", "sequence"]
    assert [value.name for value in model.graph.input] == list(program.signature.names)
    assert [value.name for value in model.graph.output] == program.signature.output_names()
    assert not any(node.op_type == "Transpose" and "weight" in node.input[0] for node in model.graph.node)


@pytest.mark.parametrize("name", ["deberta", "mistral", "gpt2"])
@pytest.mark.parametrize("options", [{"mode": "portable", "opset": 23}, {"mode": "portable", "opset": 21}])
def test_models_agree_in_standard_onnx(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    export(name, tmp_path / "model.onnx", **options)
    model = onnx.load(tmp_path / "model.onnx")
    assert {(each.domain, each.version) for each in model.opset_import} == {("", options["opset"])}
    onnx.checker.check_model(model, full_check=True)


def test_weights_keep_names_and_content(tmp_path: Path) -> None:
    program, _ = export("bert", tmp_path / "model.onnx")
    stored = {
        each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "model.onnx").graph.initializer
    }
    weights = program.tensors()
    named = {name: value for name, value in stored.items() if name in weights}
    assert "encoder.layer.0.attention.self.query.weight" in named
    assert len(named) == len(weights)
    for name, value in named.items():
        assert torch.equal(torch.from_numpy(value.copy()), weights[name])


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_tied_weights_are_stored_once(tmp_path: Path, name: str) -> None:
    program, _ = export(name, tmp_path / "model.onnx")
    assert program.aliases, "the model is meant to tie its head to its embedding"
    model = onnx.load(tmp_path / "model.onnx")
    assert sum(list(each.dims) == [99, 32] for each in model.graph.initializer) == 1


def test_the_file_is_the_same_every_time(tmp_path: Path) -> None:
    program, _ = program_of("llama")
    for name in ("one", "two"):
        gw.export_onnx(program, tmp_path / f"{name}.onnx", check=False)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_example_inputs_are_made_up_when_left_out(tmp_path: Path) -> None:
    program, _ = program_of("roberta")
    report = gw.export_onnx(program, tmp_path / "model.onnx")
    assert {each.sizes for each in report.differences} == {"batch=3 sequence=5", "batch=6 sequence=8"}


class Vision(nn.Module):
    """Inputs whose sizes are fixed, outputs that are an input, a constant, a size, and twice the same."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> tuple[Any, ...]:
        value = self.convolution(pixels)
        return value, pixels, value, torch.arange(3), pixels.shape[0], self.convolution.bias


def test_unusual_outputs(tmp_path: Path) -> None:
    program = gw.trace(Vision(), torch.randn(2, 3, 8, 8), dynamic={"pixels": {0: "batch"}})
    report = gw.export_onnx(program, tmp_path / "model.onnx")
    assert len(set(report.output_names)) == 6
    fixed = gw.trace(Vision(), torch.randn(2, 3, 8, 8), dynamic=None)
    assert gw.export_onnx(fixed, tmp_path / "fixed.onnx").differences[0].sizes == ""


def test_the_report_reads_well_and_is_json(tmp_path: Path) -> None:
    import json

    _, report = export("bert", tmp_path / "model.onnx")
    text = str(report)
    assert text.startswith(
        f"{tmp_path / 'model.onnx'}: 0.1 MiB, ONNX opset 23, runtime mode\nlast_hidden_state: batch=2"
    )
    assert "     2  Attention\n" in text
    found = json.loads(json.dumps(report.to_json()))
    assert found["inputs"] == ["input_ids", "attention_mask"]
    assert found["kernels"][0] == {"kernel": "Gemm", "count": 12, "note": ""}
    assert all(each["error"] <= each["tolerance"] for each in found["differences"])


def test_the_real_model_needs_no_slow_fused_kernel(tmp_path: Path, minilm_dir: Path) -> None:
    """MiniLM as exported: attention, normalisation and Gemm as they run fastest; nothing else per layer."""
    model = transformers.AutoModel.from_pretrained(minilm_dir)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    batch = {"input_ids": torch.randint(1000, 20000, (2, 12)), "attention_mask": mask, "token_type_ids": mask * 0}
    program = gw.trace(model, batch)
    report = gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=batch)
    assert report.kernels is not None
    counts = {row.kernel: row.count for row in report.kernels}
    assert (counts["Attention"], counts["LayerNormalization"], counts["Gelu"], counts["Gemm"]) == (6, 13, 6, 36)
    assert "SkipLayerNormalization" not in counts
    assert "Transpose" not in counts
    assert report.error < 1e-4


class Projections(nn.Module):
    """One linear taken apart into three, as fused q, k and v; and one whose parts overlap with another use."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(16, 48)
        self.kept = nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = self.fused(x).split(16, dim=-1)
        kept = self.kept(x)
        first, second = kept.split((6, 2), -1)
        return query * key + value, first * 2, second * 3, kept


def test_a_linear_taken_apart_is_several(tmp_path: Path) -> None:
    """A Gemm for each part on its rows of the weight, and no Split; where the whole is read too, it stays whole."""
    program = gw.trace(Projections(), torch.randn(2, 3, 16), dynamic={"x": {0: "batch", 1: "sequence"}})
    gw.export_onnx(program, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [node.op_type for node in graph.node].count("Gemm") == 4
    assert [node.op_type for node in graph.node].count("Split") == 1
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    whole = program.tensor("fused.weight")
    for start in (0, 16, 32):
        part = torch.from_numpy(stored[f"fused.weight[{start}:{start + 16}]"].copy())
        assert torch.equal(part, whole[start : start + 16])


def test_onnxruntime_as_a_target() -> None:
    from graphwright.backends.onnx import OnnxBackend

    program, batch = program_of("bert")
    executable = OnnxBackend().lower(program)
    flat = program.signature.flatten((), batch)
    for one, other in zip(program.body(*flat), executable(*flat), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    uses = executable.explain()
    assert sum(use.kernel == "Attention" for use in uses) == 2
    assert any(use.path == "encoder.layer.0.attention.self.query" and use.kernel == "Gemm" for use in uses)
