"""Folders that are no models, or not whole ones: each a clear error that names the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphwright.frontends.huggingface import load_huggingface
from graphwright.ir.errors import InputError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in three shards, to be copied and broken."""
    folder = tmp_path_factory.mktemp("model")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "single")
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def drop_tensor(file: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def refuse(folder: Any, *words: str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        load_huggingface(folder, **options)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in caught.value.what


def test_not_a_model_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "absent", "no such folder", "absent", "never downloaded")
    refuse("bert-base-uncased", "no such folder", "bert-base-uncased")
    refuse(tmp_path, "no config.json", "an empty folder")
    (tmp_path / "notes.txt").write_text("x")
    refuse(tmp_path, "no config.json", "model.safetensors", "found notes.txt")
    refuse(tmp_path / "notes.txt", "is a file")
    (tmp_path / "config.json").write_text("{")
    refuse(tmp_path, "cannot be read as JSON", "config.json")
    (tmp_path / "config.json").write_text("[]")
    refuse(tmp_path, "should hold a JSON object")
    (tmp_path / "config.json").write_text("{}")
    refuse(tmp_path, "has no weights", "notes.txt")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refuse(tmp_path, "pytorch_model.bin only", "unpickling")


def test_a_truncated_file_names_the_tensor(whole: Path, tmp_path: Path) -> None:
    file = copy(whole / "single", tmp_path / "m") / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    refuse(file.parent, "is truncated", "the tensor '", str(len(content) - 10), "model.safetensors")
    file.write_bytes(content[:20])
    refuse(file.parent, "cut off in its header")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuse(file.parent, "git lfs pull")
    file.write_bytes(struct.pack("<Q", 8) + b"notjson!")
    refuse(file.parent, "cannot be read as safetensors")


def test_broken_shards(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole / "sharded", tmp_path / "m")
    shards = sorted(folder.glob("model-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-1])
    refuse(folder, "is truncated", shards[1].name)
    shards[1].unlink()
    refuse(folder, shards[1].name, "not there")
    shards[1].write_bytes(content)
    edit(index, lambda value: value["weight_map"].update({"extra.weight": shards[0].name}))
    refuse(folder, "does not hold the tensor 'extra.weight'", shards[0].name)
    edit(index, lambda value: value["weight_map"].update({"extra.weight": "../x.safetensors"}))
    refuse(folder, "not there")
    index.write_text("{}")
    refuse(folder, "no 'weight_map'")


def test_weights_that_would_be_random(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole / "single", tmp_path / "m")
    refuse(folder, "the weights lack", "qa_outputs", "model.safetensors", task="question-answering")
    drop_tensor(folder / "model.safetensors", "bert.encoder.layer.1.output.dense.weight")
    refuse(folder, "lack 1 tensors", "bert.encoder.layer.1.output.dense.weight")


def test_weights_of_another_shape(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole / "single", tmp_path / "m")
    edit(folder / "config.json", lambda value: value.update(vocab_size=60))
    refuse(folder, "word_embeddings.weight", "[50, 16]", "[60, 16]")


def test_configurations_nobody_knows(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole / "single", tmp_path / "m")
    edit(folder / "config.json", lambda value: value.update(architectures=["NobodyModel"]))
    refuse(folder, "NobodyModel", "config.json")
    edit(folder / "config.json", lambda value: value.update(model_type="nobody"))
    refuse(folder, "does not know this model", "nobody")
    edit(
        folder / "config.json",
        lambda value: value.update(model_type="bert", quantization_config={"quant_method": "bitsandbytes"}),
    )
    refuse(folder, "already quantised by bitsandbytes", "gptq, awq, compressed-tensors")


def test_options(whole: Path) -> None:
    refuse(whole / "single", "no task 'dance'", "text-generation", task="dance")
    refuse(whole / "single", "no model for 'image-classification'", task="image-classification")
    refuse(whole / "single", "not a weight dtype", "bfloat16", dtype="int4")
    refuse(torch.nn.Linear(2, 2), "expected a folder or a transformers model", "graphwright.trace")
    refuse(3, "expected an nn.Module")
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    refuse(transformers.BertModel(config), "is for folders", dtype="float32")


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    import socket

    def refuse_connection(*args: Any) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse_connection)
    load_huggingface(whole / "sharded")
    refuse("sentence-transformers/all-MiniLM-L6-v2", "no such folder")
