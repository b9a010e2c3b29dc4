"""What can be said without a GPU, and without triton."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graphwright.backends.triton import triton_status
from graphwright.backends.triton.configurations import TABLE, Config, candidates


def test_importing_needs_neither_triton_nor_cuda() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import graphwright as gw, graphwright.backends.triton\n"
        "backend = gw.TritonBackend(); print(backend.device)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cuda"


def test_kernels_are_tested_here() -> None:
    """Where triton is not installed the other files of this folder are left out, and this says so."""
    status = triton_status()
    if not status.available:
        pytest.skip(f"the tests of the Triton kernels are left out: {status.message}")
    assert status.interpreted
    assert status.message.endswith("interpreted")


def test_configurations_say_what_they_are() -> None:
    config = Config({"BN": 64, "BM": 16}, 4, 5)
    assert str(config) == "BN=64 BM=16, 4 warps, 5 stages"
    assert str(config.with_blocks(BM=32)) == "BN=64 BM=32, 4 warps, 5 stages"
    assert str(Config()) == "4 warps, 2 stages"


@pytest.mark.parametrize("name", TABLE)
def test_every_architecture_has_configurations_without_repetitions(name: str) -> None:
    for arch in (80, 86, 90, 100, 942):
        found = [str(config) for config in candidates(name, arch)]
        assert found
        assert len(found) == len(set(found))
