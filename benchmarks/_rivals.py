"""Rivals in a virtual environment and a process of their own: nothing of theirs gets in the way of ours.

The environments are made under build/rivals when first asked for, and again when what they hold changes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _rows import REPOSITORY

FOLDER: Path = REPOSITORY / "build" / "rivals"


# Quantisers that are scripts of their own (``_rival_NAME.py --model DIR ... --out DIR``): what is installed, and what
# is then installed without what it asks for: GPTQModel wants a newer torch than it needs.
_PLAIN = ("torch==2.13.0", "numpy", "safetensors", "transformers", "accelerate")
QUANTIZERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gptq": (
        (
            *_PLAIN,
            "datasets",
            "jinja2",
            "ninja",
            "pillow",
            "protobuf",
            "requests",
            "setuptools",
            "threadpoolctl",
            "wheel",
        ),
        ("gptqmodel==7.7.0", "defuser", "device-smi", "logbar", "pypcre", "tokenicer", "torchao"),
    ),
    "hqq": ((*_PLAIN, "einops", "termcolor", "tqdm"), ("hqq==0.2.8.post1",)),
    "autoround": ((*_PLAIN, "datasets", "py-cpuinfo", "threadpoolctl", "tqdm"), ("auto-round==0.16.1",)),
    "awq": (
        (
            *("torch==2.13.0", "numpy", "safetensors", "loguru", "pydantic", "pyarrow", "pandas", "pillow", "pyyaml"),
            *("requests", "tqdm", "psutil", "packaging", "regex", "typer", "dill<0.4.2", "xxhash", "click"),
            *("multiprocess<0.70.20", "httpx<1", "nvidia-ml-py", "jinja2"),
        ),
        (
            *("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0", "accelerate==1.15.0"),
            *("datasets==5.2.0", "tokenizers==0.23.3", "huggingface-hub<2"),
        ),
    ),
    "nncf": ((*_PLAIN, "nncf==3.4.0"), ()),
    "torchao": (("torch==2.13.0", "numpy", "safetensors", "torchao==0.18.0"), ()),
}


class RivalError(RuntimeError):
    """A rival that cannot be installed, started or run; the message is the last line it gave."""


class Rival:
    """A worker process on an environment of its own.

    Args:
        name: of the environment's folder.
        requirements: what pip installs; without any, the worker runs on this Python and this environment.
        worker: script beside this file that calls ``_rival_worker.serve``.
        environment: variables it needs besides ours.
        build: variables that pip needs where it compiles something.
        label: tells processes of one environment apart.

    Raises:
        RivalError: it cannot be installed or started.
    """

    def __init__(
        self,
        name: str,
        requirements: Sequence[str],
        worker: str,
        environment: dict[str, str] | None = None,
        *,
        build: dict[str, str] | None = None,
        label: str = "",
    ) -> None:
        self.name = f"{name}-{label}" if label else name
        self._log = FOLDER / f"{self.name}.log"
        python = _environment(name, requirements, build or {}) if requirements else Path(sys.executable)
        FOLDER.mkdir(parents=True, exist_ok=True)
        with open(self._log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [str(python), str(Path(__file__).with_name(worker))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **(environment or {})},
            )

    def ask(self, do: str, system: str, **what: Any) -> Any:
        """Send a request and wait for its answer.

        Raises:
            RivalError: it failed, or the process is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, "system": system, **what}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            raise RivalError(f"exit code {self._process.returncode}: {_last_line(self._log.read_text())}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise RivalError(_last_line(answer["error"]))
        return answer

    def times(self, system: str, warm: float, seconds: float, **what: Any) -> list[float]:
        """Seconds of each call of a system that was loaded."""
        found: list[float] = self.ask("time", system, warm=warm, seconds=seconds, **what)
        return found

    def answer(self, system: str, **what: Any) -> np.ndarray:
        """What a system gives."""
        target = FOLDER / f"{self.name}.npy"
        self.ask("answer", system, to=str(target), **what)
        found: np.ndarray = np.load(target)
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


def when_needed(
    name: str, requirements: Sequence[str], worker: str, environment: dict[str, str] | None = None
) -> Callable[[], Rival]:
    """What gives the rival, started when it is first asked for; if it cannot be, it says why each time."""
    started: list[Rival | RivalError] = []

    def get() -> Rival:
        if not started:
            try:
                started.append(Rival(name, requirements, worker, environment))
            except RivalError as error:
                started.append(error)
        if isinstance(started[0], RivalError):
            raise started[0]
        return started[0]

    return get


def quantizer(name: str) -> list[str]:
    """What a command line of a quantiser begins with: its Python and its script.

    Raises:
        RivalError: it cannot be installed.
    """
    requirements, bare = QUANTIZERS[name]
    python = _environment(f"quantizer-{name}", requirements, {"BUILD_CUDA_EXT": "0"}, bare)
    return [str(python), str(Path(__file__).with_name(f"_rival_{name}.py"))]


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Arrays for a worker, as npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named: dict[str, Any] = dict(arrays)
    np.savez(path, **named)


def _environment(name: str, requirements: Sequence[str], build: dict[str, str], bare: Sequence[str] = ()) -> Path:
    folder: Path = FOLDER / name
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join([sys.version, *requirements, *bare, *(f"{key}={value}" for key, value in build.items())])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {' '.join(requirements)} into {folder}", flush=True)
    venv.EnvBuilder(clear=True, with_pip=True).create(folder)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [[*command, *requirements]]
    if bare:
        steps.append([*command, "--no-deps", "--no-build-isolation", *bare])
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False, env={**os.environ, **build})
        if done.returncode != 0:
            raise RivalError(f"cannot be installed: {_last_line(done.stderr)}")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"
