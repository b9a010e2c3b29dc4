"""``benchmarks/gpu.py`` is ready: every case runs and checks itself, on small sizes under the interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
CPU = torch.device("cpu")
# A machine on which everything takes a millisecond.
LIMITS = SimpleNamespace(read_ms=lambda nbytes: 1.0, copy_ms=lambda nbytes: 1.0, matmul_ms=lambda macs: 1.0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    timing = importlib.import_module("_gpu_timing")
    monkeypatch.setattr(timing, "copies_of", lambda nbytes: 2)
    return importlib.import_module("gpu")


def small(gpu: Any) -> Any:
    shape = importlib.import_module("_gpu_decode").Shape(
        hidden=128, feed_forward=128, layers=2, heads=2, key_heads=1, width=64, vocabulary=40
    )
    return gpu.Sizes(
        square=128,
        rows=17,
        shapes=((40, 128),),
        linear_many=(20, 128),
        attention=((64, 40, True), (128, 33, False)),
        checked=24,
        cache=70,
        tokens=5,
        hidden=96,
        wide=70,
        decoder=shape,
        context=9,
        decoder_checked=1,
    )


def test_every_case_checks_itself_before_it_is_timed(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    rows, timed = importlib.import_module("_rows").Rows(), []

    def time_of(calls: Any) -> float:
        timed.append(calls[0]())
        return 1.0

    names = []
    for family in gpu.FAMILIES:
        for make in family(LIMITS, CPU, small(gpu), quick=False):
            case = make()
            names.append(case.name)
            case.rivals.clear()
            assert gpu.run(case, rows, time_of), capsys.readouterr().out
    assert len(set(names)) == len(names) == len(timed) == 16
    assert rows.missed == []
    assert all(row["relative_error"] > 0 and row["bound_ms"] > 0 for row in rows.rows)
    quick = [make for family in gpu.FAMILIES for make in family(LIMITS, CPU, small(gpu), quick=True)]
    assert len(quick) == 6


def test_what_is_wrong_is_not_timed(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = importlib.import_module("_rows").Rows()
    for worst in (0.2, float("nan"), float("inf")):
        case = gpu.Case("wrong", [lambda: pytest.fail("was run")], lambda worst=worst: (worst, 0.1), 1.0, 0.0)
        assert not gpu.run(case, rows, lambda calls: pytest.fail("was timed"))
    assert len(rows.missed) == 3
    assert rows.rows == []


def test_targets_that_are_missed_or_stay_open(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = importlib.import_module("_rows").Rows()

    def absent() -> Any:
        raise ImportError("no such\nthing")

    def slow() -> Any:
        time.sleep(5)

    rivals = {"slow": lambda: [lambda: 9.0], "fast": lambda: [lambda: 1.0], "absent": absent, "sleepy": slow}
    ratios = {"slow": 1.2, "fast": 1.2, "absent": 1.0}
    case = gpu.Case("case", [lambda: 2.0], lambda: (0.0, 0.1), 1.0, 0.8, rivals, ratios)
    assert gpu.run(case, rows, lambda calls: calls[0](), patience=0.1)
    assert [text.partition(": ")[2] for text in rows.missed] == [
        "50% of the bound, not 80%",
        "0.50 × fast, not 1.20 ×",
        "open, absent did not run",
    ]
    assert [row.get("failed", "") for row in rows.rows] == [
        *("", "", ""),
        "ImportError: no such thing",
        "TimeoutError: took longer than 0 s",
    ]


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "this benchmark needs a GPU: torch sees no GPU\n"
