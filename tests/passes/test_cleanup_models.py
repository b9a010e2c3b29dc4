"""Cleanup and the fusions of norms and activations on small models of real architectures, verified pass by pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw

transformers = pytest.importorskip("transformers")

PASSES: list[gw.Pass] = [
    gw.Cleanup(),
    gw.FuseLayerNorm(),
    gw.FuseRMSNorm(),
    gw.FuseGelu(),
    gw.FuseGatedActivation(),
]


@dataclass(frozen=True)
class Case:
    """A model class and configuration, and how often its two layers should hold each operator in the end."""

    model: str
    config: str
    options: dict[str, Any]
    expected: dict[str, int]
    inputs: str = "text"
    dtype: torch.dtype = torch.float32


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 97}
GROUPED = {**SIZES, "num_key_value_heads": 2}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
DECODER_NORMS = {"graphwright.rms_norm": 5, "graphwright.gated_activation": 2}

CASES = {
    "llama": Case("LlamaForCausalLM", "LlamaConfig", GROUPED, DECODER_NORMS),
    "llama in bfloat16": Case("LlamaForCausalLM", "LlamaConfig", GROUPED, DECODER_NORMS, dtype=torch.bfloat16),
    "gemma in bfloat16": Case(
        "GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}, DECODER_NORMS, dtype=torch.bfloat16
    ),
    "qwen3": Case(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**GROUPED, "head_dim": 8},
        {"graphwright.rms_norm": 9, "graphwright.gated_activation": 2},
    ),
    "phi3": Case("Phi3ForCausalLM", "Phi3Config", {**GROUPED, "pad_token_id": 0}, DECODER_NORMS),
    "t5": Case("T5EncoderModel", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}, DECODER_NORMS),
    "gpt2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {"aten.layer_norm": 5, "aten.gelu": 2},
    ),
    "bert": Case("BertModel", "BertConfig", SIZES, {"aten.layer_norm": 5, "aten.gelu": 2}),
    "roberta": Case("RobertaModel", "RobertaConfig", SIZES, {"aten.layer_norm": 5, "aten.gelu": 2}),
    "clip": Case(
        "CLIPTextModel", "CLIPTextConfig", {**SIZES, "eos_token_id": 2}, {"aten.layer_norm": 5, "aten.gelu": 0}
    ),
    "vit": Case(
        "ViTModel",
        "ViTConfig",
        {**SIZES, "image_size": 16, "patch_size": 8},
        {"aten.layer_norm": 5, "aten.gelu": 2},
        inputs="image",
    ),
}
# Nothing of this may be left in a cleaned-up program.
NOISE = {
    "aten._assert_tensor_metadata",
    "aten.dropout",
    "aten.view",
    "aten.contiguous",
    "aten.clone",
    "aten.alias",
    "aten.to.dtype_layout",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These tensors are small: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def example(case: Case, batch: int, sequence: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sequence)
    if case.inputs == "image":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator).to(case.dtype)}
    ids = torch.randint(3, 97, (batch, sequence), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, sequence - 2 :] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "CausalLM" in case.model or "LMHead" in case.model:
        inputs["use_cache"] = False
    return inputs


def make(case: Case) -> nn.Module:
    torch.manual_seed(0)
    options = {key: value for key, value in case.options.items() if case.inputs == "text" or key != "vocab_size"}
    model = getattr(transformers, case.model)(getattr(transformers, case.config)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    module: nn.Module = model.eval().to(case.dtype)
    return module


@pytest.mark.parametrize("name", CASES)
def test_small_models(name: str) -> None:
    case = CASES[name]
    model, inputs = make(case), example(case, 2, 7)
    program = gw.trace(model, inputs)
    before = len(program.nodes)
    report = gw.run_passes(program, PASSES, [gw.Verifier(program.signature.flatten((), inputs))])

    operators = Counter(gw.op_name(node) for node in program.nodes if node.op == "call_function")
    assert {operator: operators[operator] for operator in case.expected} == case.expected
    assert not NOISE & operators.keys()
    assert len(program.nodes) < before
    for row in report.rows:
        assert row.local_error is None or row.local_error < 1e-12
    for item in PASSES:
        assert not item(program), f"{item.name} changes the program a second time"

    other = example(case, 3, 11)
    with torch.no_grad():
        found, expected = program(**other)[0], model(**other)[0]
    step = torch.finfo(case.dtype).eps
    difference = (found - expected).float().pow(2).mean().sqrt() / expected.float().pow(2).mean().sqrt()
    assert float(difference) < (8 * step if case.dtype == torch.float32 else 2 * step)
