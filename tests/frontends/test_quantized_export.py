"""Programs as folders of other tools: the same codes and scales when they are read again, and the same outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frontends import checkpoints
from tests.frontends.decoders import make

import graphwright as gw
from graphwright.frontends.cli.main import main
from graphwright.frontends.huggingface.loading import load_model
from graphwright.frontends.huggingface.quantized.modules import StoredLinear
from graphwright.ir.errors import ExportError, InputError
from graphwright.ir.names import op_name

transformers = pytest.importorskip("transformers")

LAYOUTS = ("compressed-tensors", "gptq", "awq")
SIZES = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}


class Traced:
    """A random model's folder and the program that was traced from it."""

    def __init__(self, folder: Path, family: str, *, decoder: bool = True, **changes: Any) -> None:
        self.folder = folder / family
        make(family, **SIZES, **changes).save_pretrained(self.folder)
        (self.folder / "chat_template.jinja").write_text("{{ messages }}")
        load: Any = gw.load_decoder if decoder else gw.load_huggingface
        self.program: gw.Program = load(self.folder, check=False)

    def quantized(self, *passes: gw.Pass) -> gw.Program:
        program = self.program.clone()
        gw.run_passes(program, list(passes))
        return program


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return Traced(tmp_path_factory.mktemp("traced"), "llama")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return Traced(tmp_path_factory.mktemp("traced"), "qwen2", decoder=False, tie_word_embeddings=False)


def four_bits(group: int | None = 32, *, symmetric: bool = True, bits: int = 4, **options: Any) -> gw.QuantizeLinears:
    return gw.QuantizeLinears(bits=bits, group_size=group, symmetric=symmetric, clip_search=False, **options)


def stored(model: Any) -> dict[str, torch.Tensor]:
    """Codes, scales and zero points of a model that was read."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, StoredLinear):
            found |= {f"{name}.{leaf}": tensor for leaf, tensor in module.named_buffers()}
    return found


def assert_same_codes(program: gw.Program, model: Any) -> None:
    """Bit for bit; merged linears in the program are those of the model in a row."""
    found, held = stored(model), program.tensors()
    count = 0
    for name, tensor in held.items():
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if leaf not in ("qweight", "scales", "zero_points"):
            continue
        merged = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        parts = [found[f"{parent}.{part}.{leaf}"] for part in merged.get(last, (last,))]
        assert torch.equal(torch.cat(parts), tensor), name
        count += len(parts)
    assert count == len(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_trip(llama: Traced, layout: str, symmetric: bool, tmp_path: Path) -> None:
    program = llama.quantized(four_bits(symmetric=symmetric))
    result = gw.save_quantized(program, tmp_path / "out", layout=layout)
    assert (result.layout, result.linears) == (layout, 7)
    assert result.error is not None
    assert result.error < 1e-5
    loaded = load_model(tmp_path / "out")
    assert_same_codes(program, loaded)
    assert loaded.config.tie_word_embeddings
    scales = torch.cat([tensor.flatten() for name, tensor in stored(loaded).items() if name.endswith(".scales")])
    if symmetric:
        assert bool((scales < 0).any())  # which grids of ours have, and must survive
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_merged_linears_are_cut_again(llama: Traced, layout: str, tmp_path: Path) -> None:
    program = llama.quantized(gw.PrepareDecoder(), four_bits(None, bits=8))
    assert any(name.endswith("qkv_proj.qweight") for name in program.tensors())
    assert any(name.endswith("gate_up_proj.qweight") for name in program.tensors())
    result = gw.save_quantized(program, tmp_path / "out", layout=layout)
    assert result.linears == 7
    assert_same_codes(program, load_model(tmp_path / "out"))


def test_merged_linears_in_floating_point_with_biases(qwen: Traced, tmp_path: Path) -> None:
    program = qwen.quantized(gw.Cleanup(), gw.FuseAll(), four_bits(ignore="*self_attn*"))
    assert "model.layers.0.self_attn.qkv_proj.bias" in program.tensors()
    result = gw.save_quantized(program, tmp_path / "out", layout="gptq")
    assert result.linears == 3
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert r"-:^model\.layers\.0\.self_attn\.q_proj$" in settings["dynamic"]
    original, loaded = load_model(qwen.folder), load_model(tmp_path / "out")
    for name in ("q_proj", "k_proj", "v_proj"):
        for kind in ("weight", "bias"):
            wanted, found = (getattr(each.model.layers[0].self_attn, name) for each in (original, loaded))
            assert torch.equal(getattr(found, kind), getattr(wanted, kind))


def test_activations_of_eight_bits(llama: Traced, tmp_path: Path) -> None:
    program = llama.quantized(four_bits(None, bits=8, activations="int8"))
    result = gw.save_quantized(program, tmp_path / "out")
    assert result.linears == 7
    assert_same_codes(program, load_model(tmp_path / "out"))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "int-quantized"
    for layout in ("gptq", "awq"):
        with pytest.raises(ExportError, match="activations are quantised, which the layout"):
            gw.save_quantized(program, tmp_path / "no", layout=layout)
    assert not (tmp_path / "no").exists()


def test_several_sizes(llama: Traced, tmp_path: Path) -> None:
    program = llama.quantized(four_bits(32, where="*mlp*"), four_bits(None, bits=8, symmetric=False))
    for layout in ("compressed-tensors", "gptq"):
        gw.save_quantized(program, tmp_path / layout, layout=layout)
        assert_same_codes(program, load_model(tmp_path / layout))
    with pytest.raises(ExportError, match="it has 8 bits, which the layout 'awq' cannot say"):
        gw.save_quantized(program, tmp_path / "no", layout="awq")
    mixed = llama.quantized(four_bits(32, where="*mlp*"), four_bits(16))
    with pytest.raises(ExportError, match="groups of 2 sizes"):
        gw.save_quantized(mixed, tmp_path / "no", layout="awq")


def test_a_quantised_head_is_tied_no_more(tmp_path: Path) -> None:
    traced = Traced(tmp_path, "qwen2", decoder=False, tie_word_embeddings=False, vocab_size=96)
    document = json.loads((traced.folder / "config.json").read_text())
    (traced.folder / "config.json").write_text(json.dumps({**document, "tie_word_embeddings": True}))
    program = traced.quantized(four_bits(lm_head=True))
    for layout in ("compressed-tensors", "gptq"):
        result = gw.save_quantized(program, tmp_path / layout, layout=layout)
        written = json.loads((tmp_path / layout / "config.json").read_text())
        assert (result.linears, written["tie_word_embeddings"]) == (8, False)
    assert written["quantization_config"]["lm_head"] is True


def test_groups_that_are_no_neighbours(tmp_path: Path) -> None:
    """From GPTQ to compressed-tensors and back: the order of columns stays."""
    model = make("llama", **SIZES)

    def build(outputs: int, inputs: int) -> checkpoints.Layer:
        return checkpoints.layer(outputs, inputs, 4, 16, shuffled=True)

    first = tmp_path / "first"
    layers = checkpoints.write(model, first, checkpoints.gptq_settings(4, 16, desc_act=True), build, checkpoints.gptq)
    program = gw.load_huggingface(first, check=False)
    gw.save_quantized(program, tmp_path / "second", layout="compressed-tensors")
    gw.save_quantized(program, tmp_path / "third", layout="gptq")
    for folder in ("second", "third"):
        before, after = stored(load_model(first)), stored(load_model(tmp_path / folder))
        assert before.keys() == after.keys()
        assert len([name for name in before if name.endswith(".order")]) == len(layers)
        assert all(torch.equal(before[name], after[name]) for name in before)
    settings = json.loads((tmp_path / "third" / "config.json").read_text())["quantization_config"]
    assert (settings["desc_act"], settings["checkpoint_format"]) == (True, "gptq_v2")  # zero points of 0
    with pytest.raises(ExportError, match="no neighbours"):
        gw.save_quantized(program, tmp_path / "no", layout="awq")


def test_shards(llama: Traced, tmp_path: Path) -> None:
    program = llama.quantized(four_bits())
    result = gw.save_quantized(program, tmp_path / "out", layout="gptq", max_shard_bytes=8000)
    files = [file.name for file in result.files if file.suffix == ".safetensors"]
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert_same_codes(program, load_model(tmp_path / "out"))


def test_gpt2(tmp_path: Path) -> None:
    """Its linears are stored the other way round, and its heads in one of them."""
    model = make("gpt2", n_layer=1)
    model.save_pretrained(tmp_path / "source")
    program = gw.load_huggingface(tmp_path / "source", check=False)
    gw.run_passes(program, [gw.Cleanup(), gw.TransposeLinears(), four_bits(ignore="*c_fc*")])
    result = gw.save_quantized(program, tmp_path / "out", layout="gptq")
    assert result.linears == 3
    for layout in ("compressed-tensors", "awq"):
        with pytest.raises(ExportError, match="Conv1D"):
            gw.save_quantized(program, tmp_path / "no", layout=layout)


def _refuse(
    program: gw.Program, folder: Path, *words: str, kind: type[Exception] = ExportError, **options: Any
) -> None:
    with pytest.raises(kind) as caught:
        gw.save_quantized(program, folder, **options)
    for word in words:
        assert word in str(caught.value)


def test_what_is_refused(llama: Traced, tmp_path: Path) -> None:
    program, out = llama.quantized(four_bits()), tmp_path / "out"
    _refuse(llama.program, out, "no quantised linear", "QuantizeLinears")
    _refuse(program, out, "'marlin'", "gptq", layout="marlin", kind=InputError)
    _refuse(program, tmp_path / "none" / "out", "does not exist")
    _refuse(program, llama.folder, "other things than an earlier export")
    (tmp_path / "file").write_text("")
    _refuse(program, tmp_path / "file", "not a folder")
    program.origin = None
    _refuse(program, out, "argument 'source'", kind=InputError)
    _refuse(program, out, "there is no such folder", source=tmp_path / "nowhere", kind=InputError)
    table = llama.quantized(four_bits(lm_head=True), gw.QuantizeEmbeddings(tied=True))
    _refuse(table, out, "embedding_nbits", "floating point")
    floats = llama.quantized(four_bits(symmetric=False, float_zero_points=True))
    for layout in ("gptq", "compressed-tensors"):
        _refuse(floats, out, "zero points lie between codes", layout=layout)
    narrow = llama.quantized(four_bits(48))
    _refuse(narrow, out, "64 inputs are no multiple of the group size 48")
    assert not out.exists()
    assert llama.folder.exists()


def test_a_graph_that_weights_do_not_describe(llama: Traced, tmp_path: Path) -> None:
    program = llama.quantized(four_bits())
    with program.edit() as rewriter:
        node = next(node for node in program.nodes if op_name(node) == "graphwright.linear_nbits")
        doubled = rewriter.call("aten.mul.Tensor", node, 1.01, like=node)
        rewriter.replace(node, doubled, equivalent=False)
    _refuse(program, tmp_path / "out", "off by", "weights alone do not say")
    assert not (tmp_path / "out").exists()
    assert gw.save_quantized(program, tmp_path / "out", check=False).error is None


def test_a_weight_without_a_place(llama: Traced, tmp_path: Path) -> None:
    program = llama.quantized(four_bits())
    with program.edit() as rewriter:
        node = next(node for node in program.nodes if node.name == "linear_nbits_1")
        weight = rewriter.weight("adapter.weight", torch.nn.Parameter(torch.zeros(32)), like=node)
        rewriter.replace(node, rewriter.call("aten.add.Tensor", node, weight, like=node), equivalent=False)
    _refuse(program, tmp_path / "out", "'adapter.weight' [32] has no place")


def test_an_earlier_export_stays_whole(llama: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, out = llama.quantized(four_bits()), tmp_path / "out"
    gw.save_quantized(program, out, layout="gptq", check=False)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    from graphwright.frontends.huggingface.quantized import writing

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_tensors", full)
        _refuse(program, out, "No space left", layout="awq")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    gw.save_quantized(program, out, layout="awq", check=False)  # takes its place
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"


def test_the_method_and_the_command(llama: Traced, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optimized = gw.optimize(llama.program, [four_bits()], verify=False)
    optimized.save_quantized(tmp_path / "first", layout="gptq")
    optimized.save(tmp_path / "program")
    options = ["--layout", "awq", "--no-check", "--json"]
    assert _export([str(tmp_path / "program"), "-o", str(tmp_path / "second"), *options]) == 2
    assert "argument 'source'" in capsys.readouterr().err
    source = ["--source", str(llama.folder)]
    assert _export([str(tmp_path / "program"), "-o", str(tmp_path / "second"), *options, *source]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["linears"], written["layout"]) == (7, "awq")
    codes = [stored(load_model(tmp_path / name)) for name in ("first", "second")]
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    assert _export([str(tmp_path / "program"), "-o", str(tmp_path / "x.onnx"), *source]) == 2


def _export(arguments: Sequence[str]) -> int:
    return main(["export", *arguments])


def test_transformers_reads_compressed_tensors(llama: Traced, tmp_path: Path) -> None:
    """With its own reader; ``benchmarks/interchange.py`` goes through GPTQModel's as well."""
    pytest.importorskip("compressed_tensors")
    gw.save_quantized(llama.quantized(four_bits()), tmp_path / "out", check=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(1, 97, (2, 9))
    with torch.no_grad():
        wanted, found = load_model(tmp_path / "out")(ids).logits, theirs(ids).logits
    assert (found - wanted).norm() / wanted.norm() < 1e-6


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_library_unpacks_what_we_pack(llama: Traced, symmetric: bool, bits: int, tmp_path: Path) -> None:
    """Linear by linear: transformers 5.23 makes room for zero points that are not packed, and refuses packed ones."""
    library = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from safetensors.torch import load_file

    gw.save_quantized(llama.quantized(four_bits(bits=bits, symmetric=symmetric)), tmp_path / "out", check=False)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationConfig(**settings).config_groups["group_0"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    ours = load_model(tmp_path / "out", dtype="float32")
    for name, module in ours.named_modules():
        if isinstance(module, StoredLinear):
            given = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
            given["weight_scale"] = given["weight_scale"].float()
            theirs = library.PackedQuantizationCompressor.decompress(given, scheme)["weight"]
            with torch.no_grad():
                assert torch.equal(module(torch.eye(theirs.shape[1])).T, theirs)
