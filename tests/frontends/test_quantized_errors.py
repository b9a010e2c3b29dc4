"""Checkpoints whose packing or settings do not match: each an error that names the tensor, and what was expected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frontends import checkpoints
from tests.frontends.decoders import make

from graphwright.frontends.huggingface.loading import load_model
from graphwright.ir.errors import InputError

pytest.importorskip("transformers")

UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, torch.Tensor]
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each format, to be copied and broken."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole")
    build = partial(checkpoints.layer, bits=4, group=16)
    eight = partial(checkpoints.layer, bits=8, group=-1, symmetric=True)
    four = {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}
    token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    integers = checkpoints.compressed_settings({"num_bits": 8, "strategy": "channel"}, input_activations=token)
    for name, settings, make_layer, tensors in (
        ("gptq", checkpoints.gptq_settings(4, 16), build, checkpoints.gptq),
        ("awq", checkpoints.awq_settings(16), build, checkpoints.awq),
        ("compressed", checkpoints.compressed_settings(four), build, checkpoints.packed),
        ("integers", integers, eight, checkpoints.integers),
    ):
        model = make("llama", num_hidden_layers=1)
        checkpoints.write(model, folder / name, settings, make_layer, tensors)
    return folder


def settings_of(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["quantization_config"]
    return found


def weights_of(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = settings_of(document)["config_groups"]["group_0"]
    return found


def refuse(
    whole: Path,
    tmp_path: Path,
    name: str,
    *words: str,
    settings: Callable[[dict[str, Any]], Any] | None = None,
    tensors: Callable[[Tensors], Any] | None = None,
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole / name, folder)
    if settings is not None:
        document = json.loads((folder / "config.json").read_text())
        settings(document)
        (folder / "config.json").write_text(json.dumps(document))
    if tensors is not None:
        stored = load_file(folder / "model.safetensors")
        tensors(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        load_model(folder)
    assert "\n" not in caught.value.what
    assert caught.value.hint or caught.value.where
    for word in words:
        assert word in str(caught.value)


def test_methods_that_are_not_read(whole: Path, tmp_path: Path) -> None:
    def method(value: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda document: document.update(quantization_config=value)

    go = partial(refuse, whole, tmp_path, "gptq")
    go("bitsandbytes", "gptq, awq, compressed-tensors", settings=method({"quant_method": "bitsandbytes"}))
    go("another tool", "config.json", settings=method({"bits": 4}))
    go("must be an object", "config.json", settings=method(4))
    go("marlin", "checkpoint_format", settings=lambda d: settings_of(d).update(checkpoint_format="marlin"))
    refuse(whole, tmp_path, "awq", "'gemv'", "gemm", settings=lambda d: settings_of(d).update(version="gemv"))


def test_nothing_is_quantised(whole: Path, tmp_path: Path) -> None:
    def drop(stored: Tensors) -> None:
        for name in [name for name in stored if name.endswith("qweight")]:
            del stored[name]

    refuse(whole, tmp_path, "gptq", "no weight is stored so", "config.json", tensors=drop)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_bits(whole: Path, tmp_path: Path, name: str) -> None:
    go = partial(refuse, whole, tmp_path, name)
    go("of 5 bits are not read", "config.json", settings=lambda d: settings_of(d).update(bits=5))
    go("'bits' must be a whole number", settings=lambda d: settings_of(d).update(bits="four"))
    go("'bits' must be a whole number", settings=lambda d: settings_of(d).pop("bits"))


def test_gptq_of_other_bits_than_it_says(whole: Path, tmp_path: Path) -> None:
    go = partial(refuse, whole, tmp_path, "gptq")
    change = {"settings": lambda d: settings_of(d).update(bits=8)}
    go(".qweight", "int32 [6, 32], expected int32 [12, 32]", "bits=8", "model.safetensors", **change)


def test_group_sizes(whole: Path, tmp_path: Path) -> None:
    for size, words in ((32, "group_size=32"), (12, "group_size=12"), (5, "whole bytes"), (0, "whole bytes")):
        refuse(whole, tmp_path, "gptq", words, settings=partial(put_group, size))
    go = partial(refuse, whole, tmp_path, "awq", settings=partial(put_group, 32))
    go(".scales", "[3, 32], expected", "[2, 32]", "group_size=32")
    go = partial(refuse, whole, tmp_path, "compressed")
    change: Change = partial(put_width, 32)
    go(".weight_scale", "[32, 3], expected", "[32, 2]", settings=change)
    go("'group_size' must be a whole number", settings=lambda d: weights_of(d)["weights"].pop("group_size"))


def put_width(size: int, document: dict[str, Any]) -> None:
    weights_of(document)["weights"]["group_size"] = size


def put_group(size: int, document: dict[str, Any]) -> None:
    settings_of(document)["group_size"] = size


@pytest.mark.parametrize(
    ("name", "leaf", "shape"),
    [
        ("gptq", "qzeros", "[2, 6]"),
        ("gptq", "scales", "[2, 48]"),
        ("awq", "qzeros", "[2, 6]"),
        ("awq", "scales", "[2, 48]"),
        ("compressed", "weight_scale", "[48, 2]"),
        ("compressed", "weight_zero_point", "[48, 2]"),
        ("integers", "weight_scale", "[48, 1]"),
    ],
)
def test_missing_tensors(whole: Path, tmp_path: Path, name: str, leaf: str, shape: str) -> None:
    refuse(whole, tmp_path, name, f"{UP}.{leaf}", "lacks", shape, tensors=lambda stored: stored.pop(f"{UP}.{leaf}"))


def test_an_order_that_is_needed(whole: Path, tmp_path: Path) -> None:
    change = {"settings": lambda d: settings_of(d).update(desc_act=True)}
    refuse(whole, tmp_path, "gptq", "g_idx", UP, tensors=lambda stored: stored.pop(f"{UP}.g_idx"), **change)


@pytest.mark.parametrize(
    ("name", "leaf"),
    [("gptq", "qweight"), ("gptq", "qzeros"), ("gptq", "g_idx"), ("awq", "qweight"), ("compressed", "weight_packed")],
)
def test_shapes_and_dtypes(whole: Path, tmp_path: Path, name: str, leaf: str) -> None:
    key = f"{UP}.{leaf}"

    def shorten(stored: Tensors) -> None:
        stored[key] = stored[key][1:].contiguous()

    refuse(whole, tmp_path, name, key, "expected int32", "model.safetensors", tensors=shorten)
    refuse(whole, tmp_path, name, key, "float32", "expected int32", tensors=lambda s: s.update({key: s[key].float()}))


def test_indices_of_groups(whole: Path, tmp_path: Path) -> None:
    def put(value: int, at: int) -> Callable[[Tensors], Any]:
        def change(stored: Tensors) -> None:
            stored[f"{UP}.g_idx"][at] = value

        return change

    go = partial(refuse, whole, tmp_path, "gptq", f"{UP}.g_idx", "check group_size")
    go("names the group 2", tensors=put(2, 5))
    go("names the group -1", tensors=put(-1, 5))
    go("do not have 16 columns each", tensors=put(1, 5))


def test_numbers_that_are_none(whole: Path, tmp_path: Path) -> None:
    for name, leaf in (("gptq", "scales"), ("awq", "scales"), ("compressed", "weight_scale")):

        def spoil(stored: Tensors, key: str = f"{UP}.{leaf}") -> None:
            stored[key][0, 0] = float("nan")

        refuse(whole, tmp_path, name, f"{UP}.{leaf}", "NaN or infinity", tensors=spoil)


def test_another_models_weights(whole: Path, tmp_path: Path) -> None:
    change = {"settings": lambda d: d.update(intermediate_size=64)}
    refuse(whole, tmp_path, "gptq", "expected", "64", "quantization_config", **change)
    refuse(whole, tmp_path, "compressed", "weight_shape", "[32, 48]", "[32, 64]", "different models", **change)


def test_a_truncated_file(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(whole / "gptq", folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="is truncated: the tensor"):
        load_model(folder)


def test_compressed_tensors_that_are_not_read(whole: Path, tmp_path: Path) -> None:
    def weights(**changes: Any) -> dict[str, Any]:
        return {"settings": lambda d: weights_of(d)["weights"].update(changes)}

    def group(**changes: Any) -> dict[str, Any]:
        return {"settings": lambda d: weights_of(d).update(changes)}

    def whole_model(**changes: Any) -> dict[str, Any]:
        return {"settings": lambda d: settings_of(d).update(changes)}

    go = partial(refuse, whole, tmp_path, "compressed")
    go("floats of a few bits", **weights(type="float"))
    go("'block'", "tensor, channel, group", **weights(strategy="block"))
    go("quantises outputs", **group(output_activations={"num_bits": 8}))
    go("quantises activations in a way", **group(input_activations={"num_bits": 8, "dynamic": True}))
    go("no config group targets", "Linear", **group(targets=["re:.*q_proj"]))
    go("config_groups", **whole_model(config_groups=None))
    go("cache of keys and values", **whole_model(kv_cache_scheme={"num_bits": 8}))
    go("sparse", **whole_model(sparsity_config={"format": "sparse-24-bitmask"}))
    go("transforms", **whole_model(transform_config={"config_groups": {"R1": {}}}))
    go = partial(refuse, whole, tmp_path, "integers")
    go("strategy 'group'", **group(input_activations={"num_bits": 8, "strategy": "group", "dynamic": True}))
    static = {"num_bits": 8, "strategy": "tensor", "dynamic": False}
    go("lacks the tensor", "input_scale", **group(input_activations=static))
    key = f"{UP}.weight"
    go("int8", "float32", tensors=lambda s: s.update({key: s[key].float()}))


def test_modules_that_dynamic_leaves_out(whole: Path, tmp_path: Path) -> None:
    go = partial(refuse, whole, tmp_path, "gptq")
    go("not quantised, but it is stored so", settings=lambda d: settings_of(d).update(dynamic={"-:.*up_proj": {}}))
    go("is no pattern", settings=lambda d: settings_of(d).update(dynamic={"+:(": {}}))
