"""``make demo`` does what it promises on the real model: smaller files, the same answers, a report to look at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_demo(repository: Path, minilm_dir: Path, tmp_path: Path) -> None:
    assert minilm_dir.is_dir()
    command = [sys.executable, "examples/minilm_demo.py", "--out", str(tmp_path), "--rounds", "1"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = {name: (tmp_path / f"minilm-{name}.onnx").stat().st_size for name in ("fp32", "int8", "int4")}
    assert sizes["int8"] < 0.26 * sizes["fp32"]
    assert sizes["int4"] < 0.21 * sizes["fp32"]
    for name in sizes:
        assert (tmp_path / f"report-{name}.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "MatMulNBits bits=4 block=32" in done.stdout
    assert "MatMulIntegerToFloat" in done.stdout
