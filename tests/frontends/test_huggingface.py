"""Local Hugging Face folders and live models: the same outputs as transformers, at several sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from graphwright.frontends.huggingface import load_huggingface, load_model, make_examples
from graphwright.ir.program import Program

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 100}

# name -> (model class, configuration class, options)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", SMALL),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", SMALL),
    "roberta": ("RobertaModel", "RobertaConfig", SMALL),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "vocab_size": 100},
    ),
    "mpnet": ("MPNetModel", "MPNetConfig", SMALL),
    "albert": ("AlbertModel", "AlbertConfig", {**SMALL, "embedding_size": 16}),
    "electra": ("ElectraModel", "ElectraConfig", {**SMALL, "embedding_size": 16}),
    "deberta-v2": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral-window": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**GROUPED, "pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 100}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", SMALL),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 100}),
    "t5-encoder": ("T5EncoderModel", "T5Config", T5),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**{k: v for k, v in SMALL.items() if k != "vocab_size"}, "image_size": 32, "patch_size": 8},
    ),
}


def make_model(name: str) -> Any:
    model, config, options = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def inputs_of(program: Program, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random inputs of a size, with a padded last row."""
    made: dict[str, torch.Tensor] = {}
    for node in program.inputs:
        name = str(node.target)
        if name == "pixel_values":
            made[name] = torch.randn(batch, *node.meta["val"].shape[1:])
        elif name == "attention_mask":
            made[name] = torch.ones(batch, length, dtype=torch.int64)
            made[name][-1, length - length // 3 :] = 0
        else:
            made[name] = torch.randint(3, 100, (batch, length + 2 if name.startswith("decoder") else length))
    return made


def assert_same(program: Program, model: Any, sizes: tuple[tuple[int, int], ...]) -> None:
    quiet = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for batch, length in sizes:
        inputs = inputs_of(program, batch, length)
        with torch.no_grad():
            expected, found = model(**inputs, **quiet), program(**inputs)
        assert type(found) is type(expected)
        assert list(found) == list(expected)
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_saved_model_is_the_same_as_a_program(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    program = load_huggingface(tmp_path)
    assert program.title == type(model).__name__
    assert_same(program, model, ((2, 12), (1, 9), (3, 5), (1, 1)))


def test_a_live_model_is_left_as_it_was() -> None:
    model = make_model("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    program = load_huggingface(model)
    assert model.training
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert program.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert program.tensor("lm_head.weight") is model.model.embed_tokens.weight
    assert_same(program, model.eval(), ((2, 8),))


def test_a_program_on_disk_is_called_like_the_model(tmp_path: Path) -> None:
    model = make_model("t5")
    load_huggingface(model).save(tmp_path)
    assert_same(Program.load(tmp_path), model, ((2, 7),))


def test_shards_and_dtype(tmp_path: Path) -> None:
    model = make_model("qwen2")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(load_huggingface(tmp_path), model, ((2, 5),))
    program = load_huggingface(tmp_path, dtype="bfloat16")
    assert {tensor.dtype for tensor in program.parameters()} == {torch.bfloat16}
    model.bfloat16().save_pretrained(tmp_path / "half")
    assert {tensor.dtype for tensor in load_huggingface(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_a_task_chooses_the_head(tmp_path: Path) -> None:
    make_model("bert-classifier").save_pretrained(tmp_path)
    assert load_model(tmp_path, task="text-classification").__class__.__name__ == "BertForSequenceClassification"
    assert load_huggingface(tmp_path, task="feature-extraction").title == "BertModel"


def test_a_missing_pooling_layer_is_left_out(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, task="feature-extraction")
    assert model.pooler is None


def test_eager_attention(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    program = load_huggingface(tmp_path, attn_implementation="eager")
    assert_same(program, model, ((2, 8),))


def test_examples_speak_for_themselves() -> None:
    examples = make_examples(make_model("bert"))
    assert examples.pop("use_cache") is False
    assert list(examples) == ["input_ids", "attention_mask"]
    ids, mask = examples["input_ids"], examples["attention_mask"]
    assert ids.shape == mask.shape
    assert ((ids == 0) == (mask == 0)).all()
    assert 0 < int((mask == 0).sum()) < mask.numel() // 2
    assert int(ids.max()) < 100
    assert "token_type_ids" in make_examples(make_model("bert"), also=("token_type_ids",))
    assert set(make_examples(make_model("t5"))) == {"input_ids", "attention_mask", "decoder_input_ids", "use_cache"}
    assert make_examples(make_model("vit"))["pixel_values"].shape == (2, 3, 32, 32)


def test_own_examples() -> None:
    model = make_model("bert")
    ids = torch.randint(0, 100, (2, 7))
    program = load_huggingface(model, example_inputs={"input_ids": ids, "token_type_ids": ids % 2})
    assert [node.target for node in program.inputs] == ["input_ids", "token_type_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, token_type_ids=ids % 2).last_hidden_state
    torch.testing.assert_close(program(input_ids=ids, token_type_ids=ids % 2).last_hidden_state, expected)


def test_the_tokenizer_may_ask_for_segment_ids(tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    tokenizer = tmp_path / "tokenizer_config.json"
    tokenizer.write_text('{"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}')
    assert {node.target for node in load_huggingface(tmp_path).inputs} == {
        "input_ids",
        "attention_mask",
        "token_type_ids",
    }


def test_minilm(minilm_dir: Path) -> None:
    program = load_huggingface(minilm_dir)
    assert_same(program, transformers.AutoModel.from_pretrained(minilm_dir).eval(), ((1, 1), (2, 13), (3, 40)))


def test_tinylm(tinylm_dir: Path) -> None:
    assert load_model(tinylm_dir).dtype == torch.bfloat16
    program = load_huggingface(tinylm_dir, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tinylm_dir, dtype=torch.float32).eval()
    assert_same(program, model, ((1, 1), (2, 13), (3, 40)))


def test_gradients_equal_the_models() -> None:
    model = make_model("llama")
    program = load_huggingface(model).clone(copy_weights=True)
    ids = torch.randint(0, 100, (2, 6))
    mask = torch.ones_like(ids)
    runs: list[Callable[..., Any]] = [model, program]
    for run in runs:
        run(input_ids=ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
    expected = dict(model.named_parameters())
    for name, parameter in program.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-7)
