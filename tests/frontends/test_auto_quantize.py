"""AutoQuantize: the order of trials, the journal, what is returned when nothing serves."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.frontends.autoquantize.result import pareto_front
from graphwright.frontends.autoquantize.strategy import is_better

X = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1))


class Mlp(nn.Module):
    """Four linears of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 64)
        self.c, self.d = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x + self.b(torch.nn.functional.gelu(self.a(x)))
        result: torch.Tensor = self.d(torch.relu(self.c(hidden)))
        return result


MODEL = Mlp().eval()
EXACT = MODEL(X).detach()
PROGRAM = gw.trace(MODEL, X)


def error(model: Any) -> float:
    """One more than the relative error of the outputs: the original scores 1."""
    return 1.0 + float((model(X).detach() - EXACT).norm() / EXACT.norm())


SPACE = gw.SearchSpace(bits=(4, 8), group_sizes=(32,), symmetric=(True,), finer={"bits": 8, "group_size": 32})
# Any: the result's fields may be None, and these tests know when they are not.
Search = Callable[..., Any]


@pytest.fixture
def search() -> Search:
    def run(evaluate: Any = error, **options: Any) -> Any:
        usual = {"example_inputs": X, "higher_is_better": False, "space": SPACE, "verify": False}
        if "limits" not in options:
            usual["limits"] = gw.Limits(target="reference")
        return gw.auto_quantize(PROGRAM, evaluate, **{**usual, **options})

    return run


def labels(result: Any) -> list[str]:
    return [trial.label for trial in result.trials]


def test_the_smallest_is_tried_first_and_stops_the_search(search: Search) -> None:
    result = search(target=gw.Relative(0.5))
    assert labels(result) == ["INT4 g32 nearest"]
    assert result.met
    assert "meets the target" in result.message
    assert result.model is not None
    assert error(result.model) == pytest.approx(result.trial.score)
    assert result.trial.bytes < result.original["bytes"]


def test_the_cheap_rounding_comes_before_the_dear_one(search: Search) -> None:
    data = [torch.randn(4, 7, 64) for _ in range(4)]
    rough = search(target=gw.Relative(1e-9), calibration=data, space=gw.SearchSpace(bits=(4,), group_sizes=(32,)))
    assert labels(rough)[:2] == ["INT4 g32 nearest", "INT4 g32 gptq"]
    assert rough.trials[1].score != rough.trials[0].score


def test_where_a_little_is_missing_the_most_sensitive_linears_get_more_bits(search: Search) -> None:
    plain = search(target=gw.Relative(0.5)).trials[0].loss
    result = search(target=gw.Relative(0.85 * plain))
    assert result.met
    assert result.trial.label.startswith("INT4 g32 nearest, ")
    assert result.trial.label.endswith("of 4 in INT8")
    eight = [name for name, options in result.trial.choice["overrides"].items() if options["bits"] == 8]
    assert 1 <= len(eight) <= 2
    quantize = result.recipe.passes[-1]
    assert isinstance(quantize, gw.QuantizeLinears)
    assert set(quantize.overrides) == set(eight)
    assert "1 × INT8 g32" in result.report.rows[-1].notes["formats"] or len(eight) == 2


def test_what_is_foretold_to_lose_far_too_much_comes_last(search: Search) -> None:
    space = gw.SearchSpace(bits=(4, 8), group_sizes=(32, 16), symmetric=(True,), methods=("nearest",))
    result = search(target=gw.Relative(0.006), space=space)
    assert result.met
    assert labels(result) == ["INT4 g32 nearest", "INT8 g32 nearest"]
    most = search(target=gw.Relative(1e-9), space=space)
    assert labels(most) == ["INT4 g32 nearest", "INT8 g16 nearest", "INT8 g32 nearest", "INT4 g16 nearest"]


def test_a_target_nobody_can_meet_gives_the_best(search: Search) -> None:
    result = search(target=gw.Relative(1e-9))
    assert not result.met
    assert result.message.startswith("not met: the best of ")
    assert "allowed" in result.message
    assert result.trial.loss == min(trial.loss for trial in result.trials)
    assert result.trial.choice["bits"] == 8
    assert result.model is not None
    assert result.model(X).shape == EXACT.shape


def test_higher_may_be_better(search: Search) -> None:
    result = search(lambda model: 2.0 - error(model), higher_is_better=True, target=gw.Absolute(0.5))
    assert result.met
    assert result.trial.loss == pytest.approx(1.0 - result.trial.score, abs=1e-6)


def test_the_pareto_front_has_mixtures_of_formats(search: Search) -> None:
    pytest.importorskip("scipy")
    result = search(mode="pareto", target=gw.Relative(1e-9))
    assert any("mixed to" in label for label in labels(result))
    sizes, losses = [trial.bytes for trial in result.front], [trial.loss for trial in result.front]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert len(result.front) >= 3
    for trial in result.trials:
        assert any(other.bytes <= trial.bytes and other.loss <= trial.loss for other in result.front)


def test_int8_activations_keep_inputs_with_heavy_tails_in_floating_point(search: Search) -> None:
    data = [torch.randn(4, 7, 64) for _ in range(3)]
    space = gw.SearchSpace(bits=(8,), group_sizes=(None,), activations=("int8",), methods=("nearest",))
    whole = search(target=gw.Relative(0.5), calibration=data, space=space)
    assert labels(whole) == ["INT8 per channel nearest INT8 activations"]
    part = search(target=gw.Relative(0.999 * whole.trial.loss), calibration=data, space=space)
    assert any("of 4 in floating point" in label for label in labels(part))


def test_models_that_are_called_by_name_and_with_nested_arguments() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor], flag: bool = True) -> torch.Tensor:
            result: torch.Tensor = self.up(x) * pair[0] + (pair[1] if flag else 0)
            return result

    x, other = torch.randn(4, 32), torch.randn(4, 32)
    given = {"x": x, "pair": (x.abs(), other), "flag": True}
    result = gw.auto_quantize(
        Nested().eval(),
        lambda model: 1.0 + float(model(**given).std()),
        higher_is_better=False,
        target=gw.Relative(0.5),
        example_inputs=given,
        space=SPACE,
        limits=gw.Limits(target="reference"),
    )
    assert result.met


def test_a_decoder_generates_while_it_is_judged() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()

    def tokens(decoder: Any) -> float:
        return float(len(decoder.generate([[1, 2, 3]], max_new_tokens=2).tokens[0]))

    result = gw.auto_quantize(model, tokens, higher_is_better=True, space=SPACE)
    assert result.met
    assert isinstance(result.model, gw.OptimizedDecoder)
    assert sum(result.trial.kernels.values()) == 4 if result.trial is not None else False


# -- limits and proof --------------------------------------------------------------------------------------------------


def test_limits(search: Search) -> None:
    few = search(target=gw.Relative(0.5), limits=gw.Limits(bytes=10, target="reference"))
    assert not few.met
    assert few.model is None
    assert "the least one takes" in few.message
    slow = search(target=gw.Relative(0.5), limits=gw.Limits(latency_ms=1e-6, target="reference"))
    assert not slow.met
    assert "a call takes" in slow.message
    assert slow.model is not None
    assert all(trial.latency_ms > 0 for trial in slow.trials)


def test_the_kernels_are_proven(search: Search) -> None:
    from graphwright.backends.cpu import features

    if features().selected is None:
        pytest.skip("needs the C++ kernels")
    result = search(target=gw.Relative(0.5), limits=gw.Limits(target="cpu"))
    assert result.met
    assert sum(result.trial.kernels.values()) == 4
    assert not any("reference" in kernel for kernel in result.trial.kernels)
    assert list(result.trial.unproven) == []


def test_a_linear_that_runs_in_the_reference_does_not_count(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphwright.frontends.autoquantize import trials

    monkeypatch.setattr(trials, "proof", lambda model: ({"reference": 4}, ["linear", "linear_1"]))
    result = search(target=gw.Relative(0.5))
    assert not result.met
    assert "2 quantised linears run in no kernel of the target" in result.message
    assert search(target=gw.Relative(0.5), limits=gw.Limits(target="reference", kernels=False)).met


# -- the journal -------------------------------------------------------------------------------------------------------


WIDE = gw.SearchSpace(bits=(4, 8), group_sizes=(64, 32, 16), symmetric=(True,), methods=("nearest",))


class Killed(BaseException):
    """Stands for a kill."""


def test_a_killed_search_goes_on_alike(search: Search, tmp_path: Path) -> None:
    whole = search(target=gw.Relative(1e-9), space=WIDE, journal=tmp_path / "whole")
    calls = 0

    def dies(model: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return error(model)

    with pytest.raises(Killed):
        search(dies, target=gw.Relative(1e-9), space=WIDE, journal=tmp_path / "killed")
    file = tmp_path / "killed" / "journal.jsonl"
    kept = file.read_text().splitlines()
    assert len(kept) == 4  # what it is about, the original, two trials
    file.write_text(file.read_text() + '{"index": 3, "cho')  # and a line that the kill cut off
    seen: list[float] = []

    def counted(model: Any) -> float:
        seen.append(error(model))
        return seen[-1]

    again = search(counted, target=gw.Relative(1e-9), space=WIDE, journal=tmp_path / "killed")
    assert len(seen) == len(whole.trials) - 2
    assert labels(again) == labels(whole)
    assert [trial.score for trial in again.trials] == [trial.score for trial in whole.trials]
    assert again.trial.label == whole.trial.label
    assert torch.equal(again.model(X), whole.model(X))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["label"] for line in lines[2:]] == labels(whole)
    seen.clear()
    search(counted, target=gw.Relative(1e-9), space=WIDE, journal=tmp_path / "killed")
    assert seen == []


def test_the_journal_of_another_problem_is_refused(search: Search, tmp_path: Path) -> None:
    search(target=gw.Relative(0.5), journal=tmp_path)
    with pytest.raises(gw.InputError, match="journal of another problem: it differs in target"):
        search(target=gw.Relative(0.4), journal=tmp_path)
    with pytest.raises(gw.InputError, match="differs in calibration"):
        search(target=gw.Relative(0.5), journal=tmp_path, calibration=[X])
    (tmp_path / "journal.jsonl").write_text("nonsense\n")
    with pytest.raises(gw.InputError, match="is damaged"):
        search(target=gw.Relative(0.5), journal=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(gw.InputError, match="cannot be made"):
        search(target=gw.Relative(0.5), journal=tmp_path / "file")


def test_everything_is_written_beside_the_journal(search: Search, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = [torch.randn(4, 7, 64) for _ in range(3)]
    result = search(target=gw.Relative(1e-9), journal=tmp_path, calibration=data)
    assert {path.name for path in tmp_path.iterdir()} == {
        "journal.jsonl",
        "pareto.png",
        "pareto.svg",
        "recipe.toml",
        "search.html",
        "sensitivities.json",
    }
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "search.html").read_text()
    assert "<svg" in page
    assert all(label in page for label in labels(result))
    assert "quantize-linears" in page
    recipe = gw.load_recipe(tmp_path / "recipe.toml", calibration=data)
    assert recipe.target == "reference"
    again = gw.optimize(MODEL, recipe.passes, example_inputs=X)
    assert torch.allclose(again(X), result.model(X), atol=1e-6)
    with pytest.raises(gw.InputError, match="png or .svg"):
        result.plot(tmp_path / "plot.txt")
    shown = str(result)
    assert "original" in shown
    assert "chosen" in shown


def test_without_matplotlib_there_is_no_plot(search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else real(name, *rest)
    )
    result = search(target=gw.Relative(0.5), journal=tmp_path)
    assert "matplotlib is not installed" in (tmp_path / "search.html").read_text()
    with pytest.raises(gw.InputError, match="graphwright\\[search\\]"):
        result.plot(tmp_path / "plot.png")


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_trials_that_fail_stand_in_the_journal(search: Search) -> None:
    calls = 0

    def moody(model: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("no data")
        return float("nan") if calls == 3 else error(model)

    result = search(moody, target=gw.Relative(1e-9), space=gw.SearchSpace(bits=(4, 8), group_sizes=(32, 16)))
    assert result.trials[0].error == "ValueError: no data"
    assert "gave nan" in result.trials[1].error
    assert result.model is not None
    assert result.trial.index > 2
    assert "failed" in str(result)


def test_when_all_fail_the_reason_is_said(search: Search) -> None:
    calls = 0

    def once(model: Any) -> float:
        nonlocal calls
        calls += 1
        return 1.0 if calls == 1 else float("inf")

    result = search(once)
    assert not result.met
    assert result.model is None
    assert "every trial failed, the first with: gave inf" in result.message


def test_the_time_limit(search: Search) -> None:
    result = search(target=gw.Relative(1e-9), time_limit=1e-6)
    assert len(result.trials) == 1
    assert not result.met
    assert "the time limit was reached" in result.message


def test_what_is_wrong_with_the_original_is_an_error(search: Search) -> None:
    def broken(model: Any) -> float:
        raise RuntimeError("no such file")

    with pytest.raises(gw.InputError, match="raised RuntimeError on the original model: no such file"):
        search(broken)
    with pytest.raises(gw.InputError, match="gave nan"):
        search(lambda model: float("nan"))
    with pytest.raises(gw.InputError, match="must give a number"):
        search(lambda model: "good")
    with pytest.raises(gw.InputError, match="scores 0 .*\n.*Absolute"):
        search(lambda model: 0.0)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"evaluate": 3}, "must be a function"),
        ({"higher_is_better": "no"}, "must be True or False"),
        ({"mode": "best"}, "must be one of 'first', 'pareto'"),
        ({"time_limit": 0}, "positive number of seconds"),
        ({"target": 0.01}, "must be Relative"),
        ({"space": gw.SearchSpace(methods=("gptq",))}, "all need calibration data"),
        ({"limits": gw.Limits(target="gpu")}, "there is no target 'gpu'"),
    ],
)
def test_bad_options(search: Search, options: dict[str, Any], what: str) -> None:
    with pytest.raises(gw.InputError, match=what):
        search(**options)


def test_bad_goals_and_spaces() -> None:
    for make in (
        lambda: gw.Relative(-1),
        lambda: gw.Absolute(float("nan")),
        lambda: gw.Limits(bytes=0),
        lambda: gw.SearchSpace(bits=()),
        lambda: gw.SearchSpace(bits=(5,)),
        lambda: gw.SearchSpace(methods=("gptqq",)),
    ):
        with pytest.raises(gw.InputError):
            make()


def test_progress_is_told_on_a_terminal(search: Search, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    search(target=gw.Relative(0.5))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    search(target=gw.Relative(0.5))
    assert "INT4 g32 nearest: score 1." in capsys.readouterr().err


# -- ranking -----------------------------------------------------------------------------------------------------------


def trial(index: int, loss: float | None, size: int | None, *, met: bool = False, **more: Any) -> gw.Trial:
    return gw.Trial(index, {}, str(index), loss=loss, bytes=size, met=met, **more)


def test_which_result_is_better() -> None:
    order = [
        trial(1, 0.005, 10, met=True),
        trial(2, 0.001, 20, met=True),
        trial(3, 0.02, 5),
        trial(4, 0.03, 4),
        trial(5, 0.001, 5),  # quick enough it is not, or too large
        trial(6, None, None),
    ]
    for better, worse in itertools.pairwise(order):
        assert is_better(better, worse, most=0.01)
        assert not is_better(worse, better, most=0.01)
    assert is_better(order[-1], None, most=0.01)


def test_the_front() -> None:
    trials = [trial(1, 0.5, 10), trial(2, 0.4, 10), trial(3, 0.4, 12), trial(4, 0.1, 20), trial(5, None, None)]
    assert [each.index for each in pareto_front(trials)] == [2, 4]
