"""The command line, command by command: what it prints, writes and returns."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from graphwright.frontends.cli.main import main
from graphwright.frontends.huggingface import load_huggingface
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.passes import registry
from graphwright.passes.base import Pass

transformers = pytest.importorskip("transformers")

CLEANUP = '[[pass]]\nname = "cleanup"\n'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small BERTs with a GELU spelled out, as Hugging Face folders ``a`` and ``b`` that differ in their weights."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        config = transformers.BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=50,
            hidden_act="gelu_python",
        )
        transformers.BertModel(config).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def saved(models: Path) -> Path:
    """The first of them, cleaned up, as a saved Program with its reports."""
    recipe = models / "cleanup.toml"
    recipe.write_text(CLEANUP)
    assert main(["optimize", str(models / "a"), "--recipe", str(recipe), "-o", str(models / "saved")]) == 0
    return models / "saved"


@pytest.fixture(scope="module")
def other(models: Path) -> Path:
    """The second of them as a saved Program, as it was traced."""
    load_huggingface(models / "b").save(models / "other")
    return models / "other"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_optimize_writes_a_program_and_reports(saved: Path, models: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [
        "model.safetensors",
        "program.json",
        "report.html",
        "report.json",
    ]
    program = Program.load(saved)
    assert [entry.pass_name for entry in program.journal] == ["cleanup"]
    report = json.loads((saved / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["cleanup"]
    assert "<html" in (saved / "report.html").read_text()
    assert not list(models.glob(".*"))


def test_optimize_prints_the_report(other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path / "r.toml", CLEANUP + '[[pass]]\nname = "fuse-gelu"\n')
    assert main(["optimize", str(other), "--recipe", recipe, "-o", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "cleanup" in out
    assert "fuse-gelu" in out
    assert f"wrote {tmp_path / 'out'}" in out
    assert err == ""
    names = [op_name(node) for node in Program.load(tmp_path / "out").nodes]
    assert "aten.gelu" in names
    assert "aten.erf" not in names


def test_a_result_is_replaced_only_when_told_to(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write(tmp_path / "r.toml", CLEANUP), tmp_path / "out"
    arguments = ["optimize", str(saved), "--recipe", recipe, "-o", str(out), "--json"]
    assert main(arguments) == 0
    (out / "extra").write_text("x")
    assert main(arguments) == 2
    assert "add --force" in capsys.readouterr().err
    assert (out / "extra").exists()
    assert main([*arguments, "--force"]) == 0
    assert not (out / "extra").exists()
    assert json.loads(capsys.readouterr().out)["rows"]
    # its own source may be what it replaces
    assert main(["optimize", str(out), "--recipe", recipe, "-o", str(out), "--force"]) == 0
    assert len(Program.load(out).journal) == 3
    capsys.readouterr()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("x")
    assert main([*arguments[:5], str(tmp_path / "other"), "--force"]) == 2
    assert "not a saved Program" in capsys.readouterr().err
    assert (tmp_path / "other" / "precious").exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ('[[pass]]\nname = "fuse-gelo"', ["r.toml, line 2", "no pass 'fuse-gelo'", "fuse-gelu"]),
        ('[[pass]]\nname = "fuse-gelu"\nwher = "x"', ["line 3", "no option 'wher'", "'where'"]),
        ('[[pass]]\nname = "fuse-gelu"\nwhere = "no.such.*"', ["selects nothing"]),
        ('target = "moon"\n' + CLEANUP, ["no target 'moon'", "reference"]),
        ("[[pass", ["r.toml", "not valid TOML"]),
    ],
)
def test_a_recipe_with_a_mistake(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, words: list[str]
) -> None:
    out = tmp_path / "out"
    assert main(["optimize", str(saved), "--recipe", write(tmp_path / "r.toml", recipe), "-o", str(out)]) == 2
    printed = capsys.readouterr()
    for word in words:
        assert word in printed.err
    assert printed.err.startswith("graphwright: error: ")
    assert "Traceback" not in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


def test_places_that_cannot_be_written(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path / "r.toml", CLEANUP)
    for place, words in (
        (tmp_path / "no" / "where", "no such folder"),
        (tmp_path / "r.toml", "is a file"),
        (tmp_path / "r.toml" / "out", "no such folder"),
    ):
        assert main(["optimize", str(saved), "--recipe", recipe, "-o", str(place)]) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


@pytest.mark.parametrize("place", ["weights", "report"])
def test_a_full_disk_leaves_nothing_behind(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    if place == "weights":
        monkeypatch.setattr("graphwright.ir.serialization.write_tensors", full)
    else:
        monkeypatch.setattr("graphwright.passes.report.Report.to_html", full)
    recipe, out = write(tmp_path / "r.toml", CLEANUP), tmp_path / "out"
    assert main(["optimize", str(saved), "--recipe", recipe, "-o", str(out)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


@dataclass(frozen=True, kw_only=True)
class DropBias(Pass):
    """Forgets the bias of one linear, and says it is exact."""

    name: ClassVar[str] = "drop-bias"

    def run(self, program: Program) -> bool:
        node = next(node for node in program.nodes if op_name(node) == "aten.linear")
        with program.edit() as rewriter:
            rewriter.replace(node, rewriter.call("aten.linear", *node.args[:2], like=node))
        return True


@pytest.fixture
def bad_pass(monkeypatch: pytest.MonkeyPatch) -> str:
    original: Callable[[str], type[Pass]] = registry.get
    monkeypatch.setattr(registry, "get", lambda name: DropBias if name == DropBias.name else original(name))
    return '[[pass]]\nname = "drop-bias"\n'


def test_a_broken_contract_is_a_failed_check(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad_pass: str
) -> None:
    program = Program.load(other)
    for name, parameter in program.clone(copy_weights=True).named_parameters():
        if name.endswith("bias"):  # zero in a fresh model
            program.set_tensor(name, torch.nn.Parameter(torch.randn_like(parameter)))
    program.save(tmp_path / "m")
    recipe, out = write(tmp_path / "r.toml", bad_pass), tmp_path / "out"
    arguments = ["optimize", str(tmp_path / "m"), "--recipe", recipe, "-o", str(out)]
    assert main(arguments) == 1
    assert "drop-bias" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--no-verify"]) == 0


def test_inspect(models: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(models / "a")]) == 0
    text = capsys.readouterr().out
    for word in ("BertModel", "aten.linear", "encoder.layer", "input_ids: i64[batch, sequence]", "sequence: 1 to 512"):
        assert word in text
    assert main(["inspect", str(saved), "--json", "--at", "batch=1,sequence=4"]) == 0
    summary = json.loads(capsys.readouterr().out)
    model = transformers.BertModel.from_pretrained(models / "a")
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["sizes"] == {"batch": 1, "sequence": 4}
    assert summary["operators"]["aten.linear"] == 7
    assert summary["journal"][0]["pass"] == "cleanup"
    assert list(summary["outputs"]) == ["last_hidden_state", "pooler_output"]
    assert sum(entry["parameters"] for entry in summary["modules"].values()) == summary["parameters"]
    assert main(["inspect", str(saved), "--text"]) == 0
    assert "aten.linear(" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--at", "batch"], "'batch' is not a size"),
        (["--at", "time=3"], "time"),
        (["--depth", "0"], "must be 1 or more"),
    ],
)
def test_inspect_refuses(saved: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["inspect", str(saved), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_models_that_are_none(tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("x")
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "neither a saved Program nor a Hugging Face model" in error
    assert "found notes.txt" in error
    assert "Traceback" not in error
    assert main(["inspect", str(tmp_path), "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in saved.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 4000 if file.suffix == ".safetensors" else None])
    assert main(["inspect", str(broken)]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_diff(other: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(saved), str(saved)]) == 0
    capsys.readouterr()
    assert main(["diff", str(other), str(saved)]) == 1
    assert "aten.dropout" in capsys.readouterr().out


def test_verify(models: Path, other: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(models / "a"), str(saved)]) == 0
    assert "the outputs agree" in capsys.readouterr().out
    assert main(["verify", str(other), str(saved), "--json", "--cases", "2"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is False
    assert len(result["outputs"]) == 4
    assert all(row["relative"] > 0.1 for row in result["outputs"])
    assert main(["verify", str(other), str(saved), "--max-error", "10"]) == 0
    assert main(["verify", str(other), str(saved), "--max-error", "10", "--min-cosine", "0.99"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main(["verify", str(saved), str(saved), "--cases", "0"]) == 2
    assert main(["verify", str(saved), str(saved), "--max-error", "-1"]) == 2


def test_verify_of_models_that_cannot_be_compared(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    assert main(["verify", str(saved), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "different inputs" in error
    assert "pixel_values" in error


def test_export(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    for mode in ("runtime", "portable"):
        file = tmp_path / f"{mode}.onnx"
        assert main(["export", str(saved), "-o", str(file), "--mode", mode, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["mode"] == mode
        assert [value.name for value in onnx.load(file).graph.input] == ["input_ids", "attention_mask"]
    assert main(["export", str(saved), "-o", str(tmp_path / "no" / "x.onnx")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_why(models: Path, other: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["why", str(other), "fuse-gelu"]) == 0
    assert "fuse-gelu rewrites 1 places" in capsys.readouterr().out
    config = transformers.BertConfig.from_pretrained(models / "a", hidden_act="quick_gelu")
    load_huggingface(transformers.BertModel(config)).save(tmp_path / "quick")
    arguments = ["why", str(tmp_path / "quick"), "fuse-gelu"]
    assert main([*arguments, "--after", "cleanup", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["changed"] is False
    depths = [refusal["matched"] for refusal in answer["refusals"]]
    assert depths == sorted(depths, reverse=True)
    assert main([*arguments, "--where", "no.such"]) == 2
    assert "selects nothing" in capsys.readouterr().err
    assert main(["why", str(other), "fuse-gelo"]) == 2
    assert "fuse-gelu" in capsys.readouterr().err
    assert main([*arguments, "--option", "where"]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    text = capsys.readouterr().out
    for name in registry.names():
        assert name in text
    assert main(["passes", "quantize-linears"]) == 0
    text = capsys.readouterr().out
    assert "bits" in text
    assert "Options in a recipe" in text
    assert main(["passes", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in described] == registry.names()
    assert all(entry["summary"] and entry["contract"] for entry in described)
    assert main(["passes", "quantise-linears"]) == 2
    assert "did you mean 'quantize-linears'?" in capsys.readouterr().err


def test_progress_is_for_terminals(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphwright.passes.progress.is_shown", lambda: True)
    recipe = write(tmp_path / "r.toml", CLEANUP)
    assert main(["optimize", str(saved), "--recipe", recipe, "-o", str(tmp_path / "out"), "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_an_interrupt(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphwright.frontends.cli.inspect.run", interrupt)
    assert main(["inspect", str(saved)]) == 130
    assert capsys.readouterr().err == "graphwright: interrupted\n"


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys; from graphwright.frontends.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)"
    )
    for arguments in (["--help"], ["optimize", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert "graphwright" in done.stdout
    bad = subprocess.run(
        [sys.executable, "-m", "graphwright.frontends.cli.main", "inspct"], capture_output=True, text=True, check=False
    )
    assert bad.returncode == 2
    assert "inspct" in bad.stderr
