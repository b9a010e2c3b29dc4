"""Adapters are trained: in whole models, beside packed weights, and in another dtype than their layer."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.passes.adapters.cases import CASES, Net, X, stirred
from tests.passes.adapters.models import MODELS, batch_for, language_model
from tests.passes.adapters.shared import moved
from torch import nn

import graphwright as gw
from graphwright.ir.arguments import arguments_of
from graphwright.ir.blocks import blocks_of
from graphwright.passes.adapters.sites import PACKED_LINEARS

pytest.importorskip("transformers")


def losses(program: gw.Program, batch: dict[str, Any], rate: float, steps: int = 12) -> list[float]:
    """Of steps on one batch, which hundreds of numbers can learn by heart: twelve steps of 0.05 must take 5 % off."""
    optimizer = torch.optim.AdamW([p for p in program.parameters() if p.requires_grad], rate)
    found = []
    for _ in range(steps):
        loss = program(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_optimizer_trains_the_adapter_and_nothing_else(name: str) -> None:
    model = MODELS[name]()
    batch = batch_for(model)
    program = gw.optimize(model, [gw.InsertAdapters(gw.KronA(), ignore="classifier")], example_inputs=batch)
    before = {key: each.detach().clone() for key, each in program.tensors().items()}
    found = losses(program, batch, 0.05)
    assert found[-1] < 0.95 * found[0]
    own = gw.adapter_tensors(program, "default")
    for key, each in program.tensors().items():
        assert torch.equal(each, before[key]) == (key not in own), key
    for key, each in model.named_parameters():
        assert torch.equal(each, before[key])
        assert each.grad is None


# -- packed weights ----------------------------------------------------------------------------------------------------

FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 16},
    "int4-asymmetric": {"bits": 4, "group_size": 16, "symmetric": False},
    "int8": {"bits": 8},
    "nf4": {"dtype": "nf4", "group_size": 16},
    "fp8": {"dtype": "fp8_e4m3"},
}


def unpacked(model: Net, packed: gw.Program) -> Net:
    """The model with the weights that the packed ones stand for."""
    made, paths = copy.deepcopy(model), dict(model.named_modules())
    for node in packed.nodes:
        if gw.op_name(node) not in PACKED_LINEARS:
            continue
        given = {
            key: packed.tensor(value) if isinstance(value, torch.fx.Node) and value.op == "get_attr" else value
            for key, value in arguments_of(node).items()
        }
        path = gw.path_of(node)
        eye = torch.eye(paths[path].in_features, dtype=torch.float64)
        weight = node.target(**{**given, "x": eye, "bias": None}).t()  # type: ignore[operator]
        with torch.no_grad():
            made.get_submodule(path).weight.copy_(weight)  # type: ignore[operator]
    return made


def gradients(program: gw.Program, x: torch.Tensor) -> dict[str, torch.Tensor]:
    program(x).square().sum().backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in program.named_parameters() if p.requires_grad and p.grad is not None}
    return {**found, "x": x.grad}


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_through_packed_weights_are_those_of_the_weights_they_stand_for(name: str) -> None:
    model = Net()
    small = gw.optimize(model, [gw.QuantizeLinears(lm_head=True, **FORMATS[name])], example_inputs=X)
    adapt = gw.InsertAdapters(gw.LoRA(rank=4), where="blocks.*")
    packed = stirred(gw.optimize(small, [adapt], example_inputs=X))
    plain = stirred(gw.optimize(unpacked(model, small), [adapt], example_inputs=X))
    found, wanted = (gradients(each, X.clone().requires_grad_()) for each in (packed, plain))
    assert found.keys() == wanted.keys()
    assert len(found) == 13
    for key, each in found.items():
        assert (each - wanted[key]).norm() <= 1e-5 * wanted[key].norm(), key
    original = gradients(stirred(gw.optimize(model, [adapt], example_inputs=X)), X.clone().requires_grad_())
    assert (found["x"] - original["x"]).norm() > 1e-3 * original["x"].norm()  # which weights these are can be seen


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_pass_rounded_activations(bits: int) -> None:
    """Rounding counts as the identity, so they are near those of the floating-point model, in every layer."""
    model = Net()
    small = gw.QuantizeLinears(bits=bits, activations="int8", group_size=16 if bits == 4 else None)
    adapt = gw.InsertAdapters(gw.LoRA(rank=4), where="blocks.*")
    packed = stirred(gw.optimize(model, [small, adapt], example_inputs=X))
    plain = stirred(gw.optimize(model, [adapt], example_inputs=X))
    found, wanted = (gradients(each, X.clone().requires_grad_()) for each in (packed, plain))
    assert found.keys() == wanted.keys()
    for key, each in found.items():
        assert torch.cosine_similarity(each.flatten(), wanted[key].flatten(), dim=0) > 0.97, key


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_4_bits_trains(name: str) -> None:
    model = MODELS[name]()
    batch = batch_for(model)
    passes = [
        gw.QuantizeLinears(dtype="nf4", group_size=16),
        gw.InsertAdapters(gw.LoRA(rank=4), ignore="classifier"),
    ]
    program = gw.optimize(model, passes, example_inputs=batch)
    before = {key: each.detach().clone() for key, each in program.tensors().items()}
    found = losses(program, batch, 0.05)
    assert found[-1] < 0.95 * found[0]
    own = gw.adapter_tensors(program, "default")
    assert all(torch.equal(each, before[key]) == (key not in own) for key, each in program.tensors().items())


# -- another dtype than the layer's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_beside_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = language_model().to(dtype)
    batch = batch_for(model)
    adapt = gw.InsertAdapters(gw.LoRA(rank=4), dtype="float32")
    traced = gw.trace(model, batch)
    program = gw.optimize(traced, [adapt], example_inputs=batch)
    own = gw.adapter_tensors(program, "default")
    assert {each.dtype for each in own.values()} == {torch.float32}
    assert {each.dtype for key, each in model.named_parameters()} == {dtype}
    assert torch.equal(program(**batch).logits, model(**batch).logits)
    found = losses(program, batch, 0.05)
    assert found[-1] < 0.95 * found[0]
    # A step that half precision would round away: the first one of Adam moves every number by the rate. A is uniform
    # within 1/√32 = 0.18. Of numbers between one power of two and the next, 2⁻ᵏ, float16 has one every 2⁻¹⁰⁻ᵏ, and 1e-7
    # leads past the middle between two of them with a chance of 1e-7 · 2¹⁰⁺ᵏ. Weighted by how many numbers lie there,
    # that is 0.06 % for each power, 0.7 % in all; bfloat16 has an eighth of it for each.
    name = next(key for key in own if "lora_A" in key)
    before = program.tensor(name).detach().clone()
    losses(program, batch, 1e-7, steps=1)
    assert not torch.equal(program.tensor(name), before)
    assert (program.tensor(name).to(dtype) != before.to(dtype)).float().mean() < 0.02

    gw.save_adapter(program, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118
    wanted = program(**batch).logits
    for stored in ("float32", None):
        insert = gw.InsertAdapters(tmp_path, dtype=stored)
        again = gw.optimize(traced, [insert], example_inputs=batch, verify=False)
        assert torch.equal(again(**batch).logits, wanted)
        kept = all(torch.equal(each, program.tensor(key)) for key, each in again.named_parameters() if key in own)
        assert kept == (stored is not None)
    assert gw.RemoveAdapters()(program)
    assert torch.equal(program(**batch).logits, model(**batch).logits)


@functools.cache
def halved() -> tuple[nn.Module, gw.Program]:
    """The net in bfloat16, and its program, which is not to be written into."""
    model = Net().bfloat16()
    return model, gw.trace(model, X.bfloat16())


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_kind_in_float32_beside_bfloat16(name: str) -> None:
    case, x = CASES[name], X.bfloat16()
    model, bare = halved()
    adapt = gw.InsertAdapters(case.kind, where=case.where, dtype="float32", **case.options)
    program = gw.optimize(bare, [adapt], example_inputs=x)
    stirred(program)(x).float().square().sum().backward()
    trained = [p for p in program.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == case.trained
    for p in trained:
        assert p.dtype == torch.float32
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
    wide = moved(name)(X)
    assert (program(x).float() - wide).norm() <= 0.05 * wide.norm()
    assert gw.RemoveAdapters()(program)
    assert torch.equal(program(x), model(x))


def test_merged_from_float32_it_is_rounded_once() -> None:
    x, model = X.bfloat16(), Net().bfloat16()
    program = gw.optimize(model, [gw.InsertAdapters(gw.LoRA(rank=4), dtype="float32")], example_inputs=x)
    stirred(program)
    a, b = (program.tensor(f"blocks.0.q.lora_{key}.default").double() for key in "AB")
    weight = model.get_parameter("blocks.0.q.weight").double()
    merged = gw.optimize(program, [gw.MergeAdapters()], example_inputs=x)
    assert torch.equal(merged.tensor("blocks.0.q.weight"), (weight + b @ a).bfloat16())


def test_what_reads_weights_alone_lies_in_its_layer() -> None:
    model = language_model().bfloat16()
    batch = batch_for(model)
    bare = gw.trace(model, batch)
    program = gw.optimize(bare, [gw.InsertAdapters(gw.LoRA(rank=2), dtype="float32")], example_inputs=batch)
    assert [block.path for block in blocks_of(program)] == [block.path for block in blocks_of(bare)]


def test_dtypes_that_there_are_not_are_refused() -> None:
    with pytest.raises(gw.InputError, match="must be one of float32, bfloat16, float16, not 'int8'"):
        gw.InsertAdapters("lora", dtype="int8")


def test_cleanup_leaves_casts_of_trained_tensors() -> None:
    x = X.bfloat16()
    adapt = gw.InsertAdapters(gw.LoRA(rank=4), dtype="float32")
    program = gw.optimize(Net().bfloat16(), [adapt, gw.Cleanup()], example_inputs=x)
    stirred(program)(x).sum().backward()
    assert all(p.grad is not None for p in program.parameters() if p.requires_grad)
    assert isinstance(program.tensor("blocks.0.q.lora_A.default"), nn.Parameter)
