"""Whole models on the C++ kernels: nothing that has a kernel is left to PyTorch, and results are the original's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import graphwright as gw
from graphwright.backends.cpu import native_status

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)

# What a lowered transformer must not leave to PyTorch.
KERNELS = {
    "aten.addmm",
    "aten.embedding",
    "aten.gelu",
    "aten.layer_norm",
    "aten.linear",
    "aten.relu",
    "aten.scaled_dot_product_attention",
    "aten.silu",
    "aten.softmax.int",
    "aten.tanh",
    "graphwright.attention",
    "graphwright.embedding_nbits",
    "graphwright.gated_activation",
    "graphwright.linear_int8_dynamic",
    "graphwright.linear_int8_static",
    "graphwright.linear_nbits",
    "graphwright.rms_norm",
    "graphwright.rotary_embedding",
}
IDS = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 17:] = 0
BATCH = {"input_ids": IDS, "attention_mask": MASK}
FUSED: list[gw.Pass] = [gw.Cleanup(), gw.FuseAll()]


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=160, num_attention_heads=4, vocab_size=100
    )
    model: nn.Module = BertModel(config)
    return model.eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


def lowered(model: nn.Module, passes: list[gw.Pass], backend: gw.CpuBackend | None = None) -> gw.OptimizedModel:
    return gw.optimize(model, passes, example_inputs=BATCH, target=backend or "cpu", verify=False)


def result(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs)[0]
    return found


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0, use_cache=False)
    model: nn.Module = GPT2LMHeadModel(config)
    return model.eval()


CASES: dict[str, tuple[Any, list[gw.Pass], str]] = {
    "BERT": (bert, [], "float32"),
    "BERT bfloat16": (bert, [], "bfloat16"),
    "BERT INT8": (bert, [gw.QuantizeLinears(bits=8, activations="int8"), gw.QuantizeEmbeddings()], "float32"),
    "BERT INT8 static": (
        bert,
        [gw.QuantizeLinears(bits=8, activations="int8", calibration=[BATCH], rounding="nearest")],
        "float32",
    ),
    "GPT-2": (gpt2, [], "float32"),
    "Llama": (llama, [], "float32"),
    "Llama INT4": (llama, [gw.QuantizeLinears(bits=4, group_size=32)], "float32"),
    "Llama INT4 bfloat16": (llama, [gw.QuantizeLinears(bits=4, group_size=32)], "bfloat16"),
    "Llama INT4 int8": (llama, [gw.QuantizeLinears(bits=4, group_size=32)], "int8"),
}


@pytest.mark.parametrize("case", CASES)
def test_models_run_on_kernels(case: str, tmp_path: Path) -> None:
    make, passes, compute = CASES[case]
    model = make()
    small = lowered(model, [*FUSED, *passes], gw.CpuBackend(compute=compute))
    left = [use for use in small.explain() if use.op in KERNELS and use.kernel in ("torch", "reference")]
    assert not left, left
    least = {"float32": 0.0, "bfloat16": 1e-4, "int8": 1e-4}[compute]
    most = {"float32": 2e-5, "bfloat16": 3e-2, "int8": 3e-2}[compute]
    assert all(least <= error <= most for error in small.lowering_error())
    # The same program in PyTorch: what differs is how kernels round.
    reference = gw.optimize(small, [], example_inputs=BATCH, target="reference", verify=False)
    tolerance = {"float32": 2e-5, "bfloat16": 3e-2, "int8": 3e-2}[compute]
    for rows, length in ((2, 24), (1, 1), (3, 9)):
        ids, mask = IDS[:1, :length].expand(rows, -1), MASK[:1, :length].expand(rows, -1)
        if rows == 2:
            ids, mask = IDS, MASK
        found, wanted = (result(each, input_ids=ids, attention_mask=mask) for each in (small, reference))
        kept = mask.bool()
        assert (found - wanted)[kept].norm() <= tolerance * wanted[kept].norm()
    # The number of threads changes nothing, nor does a way to the disk and back.
    wanted = result(small, input_ids=IDS, attention_mask=MASK)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(result(small, input_ids=IDS, attention_mask=MASK), wanted)
    finally:
        torch.set_num_threads(threads)
    small.save_packed(tmp_path / "model")
    loaded = gw.load_packed(tmp_path / "model")
    assert torch.equal(result(loaded, input_ids=IDS, attention_mask=MASK), wanted)
    assert loaded.explain() == small.explain()


def test_float_models_stay_exact() -> None:
    for make in (bert, gpt2, llama):
        model = make()
        small = lowered(model, FUSED)
        found, wanted = (result(each, input_ids=IDS, attention_mask=MASK) for each in (small, model))
        kept = MASK.bool()
        torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-4, atol=1e-5)


def test_bfloat16_models() -> None:
    model = bert().to(torch.bfloat16)
    small = lowered(model, FUSED)
    found, wanted = (result(each, input_ids=IDS, attention_mask=MASK) for each in (small, model))
    assert found.dtype == torch.bfloat16
    kept = MASK.bool()
    assert (found - wanted)[kept].float().norm() <= 2e-2 * wanted[kept].float().norm()
    assert any("bfloat16 weights" in use.kernel for use in small.explain())
