"""Attention, rotary embeddings and linears of real architectures with small random weights, verified in float64."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.arguments import arguments_of
from graphwright.passes.fusion.attention import FuseAttention
from graphwright.passes.fusion.linears import FuseGateUp, FuseQKV
from graphwright.passes.fusion.rotary import FuseRotaryEmbedding
from graphwright.passes.pipeline import run_passes
from graphwright.passes.verification import Verification, Verifier, precise

VOCABULARY = 99
HIDDEN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
DECODER = {**HIDDEN, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
IMAGE = {"image_size": 32, "patch_size": 8}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

KEYS, CAUSAL = "key mask", "causal, key mask"


@dataclass(frozen=True)
class Expected:
    """What becomes of a model: per attention what its masks are read as; rotations and merged linears."""

    model: str
    config: str
    options: dict[str, Any]
    readings: tuple[str, ...]
    rotary: int = 0
    qkv: int = 0
    gate_up: int = 0


MODELS: dict[str, Expected] = {
    "bert": Expected("BertModel", "BertConfig", HIDDEN, (KEYS,), qkv=1),
    "roberta": Expected("RobertaModel", "RobertaConfig", HIDDEN, (KEYS,), qkv=1),
    "electra": Expected("ElectraModel", "ElectraConfig", {**HIDDEN, "embedding_size": 32}, (KEYS,), qkv=1),
    "distilbert": Expected(
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 1, "n_heads": 4, "hidden_dim": 96},
        (KEYS,),
        qkv=1,
    ),
    "albert": Expected(
        "AlbertModel",
        "AlbertConfig",
        {**HIDDEN, "num_hidden_layers": 2, "embedding_size": 32},
        (KEYS, KEYS),
        qkv=2,
    ),
    "mpnet": Expected("MPNetModel", "MPNetConfig", HIDDEN, ("key mask, bias",), qkv=1),
    "t5": Expected(
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4},
        ("key mask, bias",),
        qkv=1,
    ),
    "vit": Expected("ViTModel", "ViTConfig", {**HIDDEN, **IMAGE}, ("no mask",), qkv=1),
    "llama": Expected("LlamaForCausalLM", "LlamaConfig", DECODER, (CAUSAL,), 2, 1, 1),
    "mistral": Expected(
        "MistralForCausalLM",
        "MistralConfig",
        {**DECODER, "sliding_window": 4},
        ("causal, window 4, key mask",),
        2,
        1,
        1,
    ),
    "qwen2": Expected("Qwen2ForCausalLM", "Qwen2Config", DECODER, (CAUSAL,), 2, 1, 1),
    "qwen3": Expected("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 16}, (CAUSAL,), 2, 1, 1),
    "gemma": Expected("GemmaForCausalLM", "GemmaConfig", {**DECODER, "head_dim": 16}, (CAUSAL,), 2, 1, 1),
    "gemma2": Expected("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 16}, (), 2, 0, 1),
    "gemma3": Expected(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **DECODER,
            "head_dim": 16,
            "num_hidden_layers": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        ("causal, window 4, key mask", CAUSAL),
        4,
        2,
        2,
    ),
    "phi": Expected(
        "PhiForCausalLM",
        "PhiConfig",
        {**DECODER, "num_key_value_heads": 4, "rope_parameters": PARTIAL},
        (CAUSAL,),
        rotary=2,
        qkv=1,
    ),
    "phi3": Expected("Phi3ForCausalLM", "Phi3Config", DECODER, (CAUSAL,), rotary=2),
    "gpt2": Expected("GPT2LMHeadModel", "GPT2Config", GPT, (CAUSAL,)),
    "gptj": Expected("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 8}, (CAUSAL,), rotary=2, qkv=1),
    "gpt-neox": Expected("GPTNeoXForCausalLM", "GPTNeoXConfig", HIDDEN, (CAUSAL,), rotary=2),
    "opt": Expected(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "max_position_embeddings": 64,
        },
        (CAUSAL,),
        qkv=1,
    ),
    "falcon": Expected(
        "FalconForCausalLM",
        "FalconConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
        (CAUSAL,),
        rotary=2,
    ),
    "bloom": Expected(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 1, "n_head": 4},
        ("causal, key mask, bias",),
    ),
    "mpt": Expected(
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 1, "n_heads": 4, "max_seq_len": 64},
        ("causal, key mask, bias",),
    ),
}

# Models whose masks are written in another way when transformers spells attention out.
BOTH = ("bert", "t5", "vit", "llama", "opt", "falcon")
ONLY_EAGER = ("mpnet", "gemma2", "gptj", "bloom", "mpt")
CASES = [
    *((name, "sdpa") for name in MODELS if name not in ONLY_EAGER),
    *((name, "eager") for name in (*BOTH, *ONLY_EAGER)),
]


def model_of(name: str, implementation: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    expected = MODELS[name]
    config = getattr(transformers, expected.config)(**expected.options)
    config._attn_implementation = implementation
    model: nn.Module = getattr(transformers, expected.model)._from_config(config, attn_implementation=implementation)
    return model.eval()


def inputs_of(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    """Token ids with padding on the right, or images."""
    parameters = inspect.signature(model.forward).parameters
    if "pixel_values" in parameters:
        return {"pixel_values": torch.randn(batch, 3, 32, 32)}
    lengths = torch.tensor([length, max(1, length - 3), 1])[:batch, None]
    mask = (torch.arange(length) < lengths).to(torch.int64)
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, VOCABULARY, (batch, length)), "attention_mask": mask}
    return {**inputs, "use_cache": False} if "use_cache" in parameters else inputs


def operators(program: gw.Program) -> Counter[str]:
    return Counter(gw.op_name(node) for node in program.nodes)


def readings(program: gw.Program) -> list[str]:
    """What the arguments of each attention say."""
    found = []
    for node in program.nodes:
        if gw.op_name(node) != "graphwright.attention":
            continue
        given = arguments_of(node)
        said = ["causal"] if given["causal"] else []
        said += [f"window {given['window']}"] if given["window"] else []
        said += ["key mask"] if given["key_mask"] is not None else []
        said += ["bias"] if given["bias"] is not None else []
        found.append(", ".join(said) or "no mask")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "implementation"), CASES, ids=[" ".join(case) for case in CASES])
def test_model(name: str, implementation: str) -> None:
    expected, model = MODELS[name], model_of(name, implementation)
    program = gw.trace(model, inputs_of(model, 2, 7), check=False)
    before = program.clone()
    examples = program.signature.flatten((), inputs_of(model, 2, 7))
    passes = [FuseRotaryEmbedding(), FuseAttention(), FuseQKV(), FuseGateUp()]
    report = run_passes(program, passes, [Verifier(examples, Verification(fresh=1))])
    assert all(row.local_error is None or row.local_error < 1e-12 for row in report.rows)

    assert readings(program) == list(expected.readings)
    counts = operators(program)
    left = {"gemma2": {"aten.softmax.int": 1}}.get(name, {})
    for unfused in ("aten.scaled_dot_product_attention", "aten.softmax.int", "aten.neg"):
        assert counts[unfused] == (left | ({"aten.neg": 1} if name == "mpnet" else {})).get(unfused, 0)
    assert counts["graphwright.rotary_embedding"] == expected.rotary
    merged = [str(node.target) for node in program.nodes if node.op == "get_attr"]
    layers = 2 if name == "gemma3" else 1  # ALBERT's two layers are one
    was = ("phi3",)  # has merged linears of its own
    assert sum("qkv_proj.weight" in item for item in merged) == (1 if name in was else min(expected.qkv, layers))
    assert sum("gate_up_proj.weight" in item for item in merged) == (1 if name in was else expected.gate_up)
    assert counts["aten.split_with_sizes"] == expected.qkv + expected.gate_up

    with torch.no_grad():
        for batch, length in ((1, 5), (3, 9)):
            flat = program.signature.flatten((), inputs_of(model, batch, length))
            exact, found = (precise.run(item, flat)[item.output.args[0][0].name] for item in (before, program))
            torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
    for item in passes:
        assert not item(program)


@pytest.mark.filterwarnings("ignore")
def test_finite_windows_stay_a_bias() -> None:
    """Mistral spelled out: right padding leaves queries whose whole window is padding, which get a mean there."""
    model = model_of("mistral", "eager")
    program = gw.trace(model, inputs_of(model, 2, 9), check=False)
    examples = program.signature.flatten((), inputs_of(model, 2, 9))
    report = run_passes(program, [FuseAttention()], [Verifier(examples)])
    assert readings(program) == ["bias"]
    assert "finite masks may leave a query no key" in next(iter(report.rows[0].notes["attention"].values()))


@pytest.mark.filterwarnings("ignore")
def test_soft_capped_scores_say_why() -> None:
    model = model_of("gemma2", "eager")
    program = gw.trace(model, inputs_of(model, 2, 7), check=False)
    assert not FuseAttention()(program)
    assert "aten.tanh stands between the scores and softmax" in str(FuseAttention().refusals(program)[0])
