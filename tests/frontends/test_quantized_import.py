"""Folders of other tools' quantised checkpoints: codes and scales as stored, outputs as of the dequantised model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frontends import checkpoints
from tests.frontends.decoders import make

import graphwright as gw
from graphwright.frontends.huggingface.loading import load_model
from graphwright.frontends.huggingface.quantized.words import pack_words, unpack_whole, unpack_words, words_for
from graphwright.ir.ops.quantization import BITS, quantize_activations, unpack
from graphwright.ir.provenance import tags_of

transformers = pytest.importorskip("transformers")

IDS = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(3))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = (found - wanted).norm() / wanted.norm()
    assert error <= 3e-6, f"off by {error}"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 31, 32, 33, 96])
def test_words_are_little_endian_bit_strings(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (3, count))
    packed = pack_words(codes.to(torch.uint8), bits)
    assert packed.shape == (3, words_for(count, bits))
    assert torch.equal(packed, checkpoints.pack_rows(codes, bits))
    assert torch.equal(unpack_words(packed, bits, count), codes.to(torch.uint8))


def test_three_bits_with_unused_ends_of_words() -> None:
    codes = torch.randint(0, 8, (2, 27))
    filled = [
        [sum(row[10 * w + k] << 3 * k for k in range(min(10, 27 - 10 * w))) for w in range(3)] for row in codes.tolist()
    ]
    assert torch.equal(unpack_whole(torch.tensor(filled, dtype=torch.int32), 3, 27), codes.to(torch.uint8))


def check(model: Any, folder: Path, layers: dict[str, checkpoints.Layer]) -> Any:
    """Codes and scales bit for bit, and the logits of the model whose weights they stand for."""
    loaded = load_model(folder)
    for name, item in layers.items():
        module: Any = loaded.get_submodule(name)
        order = torch.arange(item.codes.shape[1]) if module.order is None else module.order
        codes = unpack(module.qweight, item.bits).flatten(1)[:, : len(order)]
        assert torch.equal(codes.long(), item.codes[:, order])
        assert torch.equal(module.scales, item.scales)
        assert module.scales.dtype == torch.float16
        if module.zero_points is None:
            assert bool((item.zeros == 2 ** (item.bits - 1)).all())
        else:
            assert torch.equal(module.zero_points.long(), item.zeros)
        assert torch.equal(torch.arange(len(order)) // (len(order) // item.scales.shape[1]), item.groups[order])
    assert_same(logits(loaded), logits(model))
    return loaded


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq(family: str, shuffled: bool, tmp_path: Path) -> None:
    model = make(family)
    build = partial(checkpoints.layer, bits=4, group=16, shuffled=shuffled)
    settings = checkpoints.gptq_settings(4, 16, desc_act=shuffled)
    check(model, tmp_path, checkpoints.write(model, tmp_path, settings, build, checkpoints.gptq))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "symmetric", "version"), [(-1, False, 2), (32, True, 1), (16, False, 1)])
def test_gptq_formats(bits: int, group: int, symmetric: bool, version: int, tmp_path: Path) -> None:
    model = make("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1, tie_word_embeddings=False)
    build = partial(checkpoints.layer, bits=bits, group=group, symmetric=symmetric)
    settings = checkpoints.gptq_settings(bits, group, checkpoint_format="gptq" if version == 1 else "gptq_v2")
    tensors = partial(checkpoints.gptq, version=version)
    check(model, tmp_path, checkpoints.write(model, tmp_path, settings, build, tensors))


def test_gptq_of_several_sizes_and_a_head(tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=1)
    sizes = {"down_proj": (8, 48)}
    layers: dict[str, checkpoints.Layer] = {}

    def build(outputs: int, inputs: int) -> checkpoints.Layer:
        return checkpoints.layer(outputs, inputs, *(sizes["down_proj"] if inputs == 48 else (4, 32)))

    settings = checkpoints.gptq_settings(
        4, 32, dynamic={"-:.*head": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": -1}}
    )
    layers = checkpoints.write(model, tmp_path, settings, build, checkpoints.gptq)
    check(model, tmp_path, layers)


def test_biases_that_the_architecture_has_not(tmp_path: Path) -> None:
    """Old AutoGPTQ stores one for every linear, of zeros; another is not dropped."""
    model = make("llama", num_hidden_layers=1)
    shift = torch.randn(48)

    def tensors(name: str, item: checkpoints.Layer) -> dict[str, torch.Tensor]:
        bias = shift if name.endswith("up_proj") else torch.zeros(len(item.codes))
        return {**checkpoints.gptq(name, item), f"{name}.bias": bias}

    build = partial(checkpoints.layer, bits=4, group=16)
    checkpoints.write(model, tmp_path, checkpoints.gptq_settings(4, 16), build, tensors)
    model.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(shift)
    loaded = load_model(tmp_path)
    assert loaded.model.layers[0].mlp.gate_proj.bias is None
    assert_same(logits(loaded), logits(model))


def test_awq(tmp_path: Path) -> None:
    model = make("qwen2")
    build = partial(checkpoints.layer, bits=4, group=16)
    settings = checkpoints.awq_settings(16, modules_to_not_convert=["lm_head"])
    check(model, tmp_path, checkpoints.write(model, tmp_path, settings, build, checkpoints.awq))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("strategy", ["channel", "group", "actorder"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(bits: int, strategy: str, symmetric: bool, tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=96)
    group = -1 if strategy == "channel" else 32
    build = partial(checkpoints.layer, bits=bits, group=group, symmetric=symmetric, shuffled=strategy == "actorder")
    weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "channel" if group == -1 else "group"}
    settings = checkpoints.compressed_settings({**weights, "group_size": None if group == -1 else group})
    check(model, tmp_path, checkpoints.write(model, tmp_path, settings, build, checkpoints.packed))


def test_compressed_tensors_of_several_groups_in_shards(tmp_path: Path) -> None:
    model = make("opt")
    weights = {"type": "int", "symmetric": False}
    groups = {
        "wide": {"targets": ["re:.*fc[12]$"], "weights": {**weights, "num_bits": 8, "strategy": "channel"}},
        "rest": {"targets": ["Linear"], "weights": {**weights, "num_bits": 4, "strategy": "group", "group_size": 16}},
    }
    settings = checkpoints.compressed_settings({}, config_groups=groups)
    names = {id(module): name for name, module in checkpoints.linears_of(model).items()}
    assert names
    sizes = {(48, 32): (8, -1), (32, 48): (8, -1), (32, 32): (4, 16)}

    def build(outputs: int, inputs: int) -> checkpoints.Layer:
        return checkpoints.layer(outputs, inputs, *sizes[outputs, inputs])

    layers = checkpoints.write(model, tmp_path, settings, build, checkpoints.packed, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check(model, tmp_path, layers)


def test_integers_alone(tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=1)
    build = partial(checkpoints.layer, bits=8, group=-1, symmetric=True)
    settings = checkpoints.compressed_settings({"num_bits": 8, "strategy": "channel"}, format="int-quantized")
    check(model, tmp_path, checkpoints.write(model, tmp_path, settings, build, checkpoints.integers))


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}


def with_rounded_inputs(model: Any, round_: Any) -> Any:
    for module in checkpoints.linears_of(model).values():
        module.register_forward_pre_hook(lambda _, given: (round_(given[0]),))
    return model


def test_integers_with_activations(tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=1)
    build = partial(checkpoints.layer, bits=8, group=-1, symmetric=True)
    settings = checkpoints.compressed_settings(
        {"num_bits": 8, "strategy": "channel"}, format="int-quantized", input_activations=TOKEN
    )
    layers = checkpoints.write(model, tmp_path, settings, build, checkpoints.integers)
    loaded = load_model(tmp_path)
    for name, item in layers.items():
        module: Any = loaded.get_submodule(name)
        assert torch.equal(module.qweight.long(), item.codes - 128)
        assert int(module.qweight.min()) == -128  # which our own grids do not use
        assert torch.equal(module.scales, item.scales.squeeze(1).float())

    def rounded(x: torch.Tensor) -> torch.Tensor:
        codes, scale, zero = quantize_activations(x, "per_token")
        return (codes - zero) * scale

    assert_same(logits(loaded), logits(with_rounded_inputs(model, rounded)))


def test_integers_with_static_ranges(tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=1)
    build = partial(checkpoints.layer, bits=8, group=-1, symmetric=True)
    settings = checkpoints.compressed_settings(
        {"num_bits": 8, "strategy": "channel"}, format="int-quantized", input_activations=STATIC
    )
    scale, zero = torch.tensor([0.03]), torch.tensor([5], dtype=torch.int8)

    def tensors(name: str, item: checkpoints.Layer) -> dict[str, torch.Tensor]:
        ranges = {f"{name}.input_scale": scale.clone(), f"{name}.input_zero_point": zero.clone()}
        return {**checkpoints.integers(name, item), **ranges}

    checkpoints.write(model, tmp_path, settings, build, tensors)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return ((x / scale).round() + zero).clamp(-128, 127).sub(zero) * scale

    assert_same(logits(load_model(tmp_path)), logits(with_rounded_inputs(model, rounded)))


def test_settings_of_older_tools(tmp_path: Path) -> None:
    """AutoGPTQ and AutoAWQ wrote them into a file of their own."""
    model = make("llama", num_hidden_layers=1)
    for method, file, settings, tensors in (
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 16}, checkpoints.gptq),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 16, "version": "GEMM"}, checkpoints.awq),
    ):
        folder = tmp_path / method
        layers = checkpoints.write(model, folder, {}, partial(checkpoints.layer, bits=4, group=16), tensors)
        document = json.loads((folder / "config.json").read_text())
        del document["quantization_config"]
        (folder / "config.json").write_text(json.dumps(document))
        (folder / file).write_text(json.dumps(settings))
        check(model, folder, layers)


def test_no_float_weight_of_a_quantised_linear_is_made(tmp_path: Path) -> None:
    from graphwright.frontends.huggingface.quantized import loading

    model = make("llama", num_hidden_layers=1)
    build = partial(checkpoints.layer, bits=4, group=16)
    checkpoints.write(model, tmp_path, checkpoints.gptq_settings(4, 16), build, checkpoints.gptq)
    seen: list[int] = []
    put = loading._put

    def spy(model: Any, place: Any, *rest: Any) -> None:
        seen.append(model.get_submodule(place.name).weight.untyped_storage().nbytes())
        put(model, place, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_put", spy)
        load_model(tmp_path, dtype="bfloat16")
    assert seen == [2] * 7


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, gw.Program, Path]:
    """A model, and the decoding step of its folder with groups that are no neighbours."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gptq")
    model = make("llama", num_hidden_layers=1)
    order = torch.randperm(32)

    def build(outputs: int, inputs: int) -> checkpoints.Layer:
        item = checkpoints.layer(outputs, inputs, 4, 16)
        if inputs == 32:
            item.groups = item.groups[order]  # layers of the same input have the same order
        return item

    checkpoints.write(model, folder, checkpoints.gptq_settings(4, 16, desc_act=True), build, checkpoints.gptq)
    return model, gw.load_decoder(folder, check=False), folder


def test_a_step_of_a_quantised_folder(traced: tuple[Any, gw.Program, Path]) -> None:
    model, program, _ = traced
    linears = [node for node in program.nodes if "linear_nbits" in str(node.target)]
    assert len(linears) == 7
    assert all("quantized" in tags_of(node) for node in linears)
    assert len([name for name in program.tensors() if name.endswith(".order")]) == 1  # shared
    for target in ("reference", "cpu"):
        optimized = gw.optimize(program, [gw.PrepareDecoder()], target=target, verify=False)
        assert isinstance(optimized, gw.OptimizedDecoder)
        session = optimized.session(slots=2, capacity=16)
        starts, rows = torch.zeros(2, dtype=torch.int64), torch.tensor([[6], [6]])
        found = session.step(IDS, torch.tensor([0, 1]), starts, rows)
        assert_same(found[:, 0].double(), logits(model)[:, -1].double())


def test_what_is_quantised_is_left_alone(traced: tuple[Any, gw.Program, Path]) -> None:
    again = traced[1].clone()
    report = gw.run_passes(again, [gw.Cleanup(), gw.QuantizeLinears(bits=4, group_size=16)])
    assert [row.changed for row in report.rows][-1] is False
