"""Kernels compile for GPUs that are not here, and nothing spills."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from graphwright.backends.triton import kernels
from graphwright.backends.triton.status import triton_status

pytestmark = pytest.mark.skipif(not triton_status().available, reason=triton_status().message)

# Of all kernels and configurations the table says that nothing spills; a few are compiled here and now.
TABLE = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "triton_kernels.json"
ONLY = ("gradients of norms", "linear_nbits 1 rows, 4 bits, 128, asymmetric", "attention 64")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of another process, which does not interpret."""
    target = tmp_path_factory.mktemp("compiled") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    only = [item for name in ONLY for item in ("--only", name)]
    command = [sys.executable, "-m", "graphwright.backends.triton.compile", "--first", "--target", "sm_80"]
    command += ["--target", "sm_90", "--target", "gfx942", *only, "--json", str(target), "--check", str(TABLE)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(Path(target).read_text(encoding="utf-8"))["rows"]
    return found


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "gfx942"}
    assert all(row["registers"] > 0 for row in rows)
    assert [row for row in rows if row["spilled"]] == []


def test_the_table_is_of_every_kernel_on_every_target() -> None:
    """That it is of these kernels, as they are now, the fixture has checked."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    launched = {(row["target"], row["kernel"]) for row in table["rows"]}
    folder, names = Path(kernels.__path__[0]), set()
    for path in folder.glob("*.py"):
        names |= set(re.findall(r"@kernel\ndef _(\w+)", path.read_text(encoding="utf-8")))
    assert len(names) > 15
    for target in ("sm_80", "sm_90", "gfx942"):
        # Ampere has no FP8; gfx942 has another kind, and multiplies these numbers in float16.
        without = {"linear_fp8", "round_fp8"} if target == "sm_80" else set()
        assert {kernel for each, kernel in launched if each == target} == names - without
    assert all(row["registers"] > 0 and row["spilled"] == 0 for row in table["rows"])


@pytest.mark.parametrize(
    ("change", "is_other"),
    [
        ("return x * 2", True),
        ("return x  # the same", False),
    ],
)
def test_a_digest_of_kernels_is_of_what_they_compute(tmp_path: Path, change: str, is_other: bool) -> None:
    from graphwright.backends.triton.compile import digest_of_kernels

    plain = '@part\ndef same(x):\n    """It."""\n    return x\n\n\ndef launches():\n    return 1\n'
    (tmp_path / "a.py").write_text(plain, encoding="utf-8")
    before = digest_of_kernels(tmp_path)
    other = plain.replace("return x", change).replace("It.", "Itself.").replace("return 1", "return 2")
    (tmp_path / "a.py").write_text(other, encoding="utf-8")
    assert (digest_of_kernels(tmp_path) != before) is is_other


def test_what_spills_does_not_fit() -> None:
    from graphwright.backends.triton.compile import Compiled

    row = Compiled("norms", "norm", "", "sm_90", registers=255, shared=0, spilled=8, seconds=0.0)
    assert not row.fits
    assert "DOES NOT FIT" in str(row)
    assert not Compiled("norms", "norm", "", "sm_80", registers=64, shared=200_000, spilled=0, seconds=0.0).fits


def test_a_table_of_other_kernels_or_launches_is_objected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphwright.backends.triton import compile as compiling

    monkeypatch.setattr(compiling, "key_of", str)
    launches = [(target, "norms", "one") for target in ("sm_90", "sm_80")]
    monkeypatch.setattr(compiling, "every_launch", lambda targets: launches)
    rows = [
        asdict(compiling.Compiled("norms", "norm", "", target, 32, 0, 0, 0.1, "one")) for target in ("sm_80", "sm_90")
    ]
    table = {"triton": "3", "kernels": compiling.digest_of_kernels(), "rows": rows}
    assert compiling.objections(table) == []
    assert compiling.objections({**table, "kernels": "0"}) == ["the kernels have changed"]
    assert compiling.objections({**table, "rows": rows[:1]}) == ["is not in the table: sm_90 norms one"]
    (more,) = compiling.objections({**table, "rows": [*rows, {**rows[0], "key": "two"}]})
    assert more.startswith("is launched no more: sm_80   norms")
    (spilled,) = compiling.objections({**table, "rows": [rows[0], {**rows[1], "spilled": 8}]})
    assert spilled.endswith("8 spilled  DOES NOT FIT")
