"""Real models, traced once for all tests of the IR."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphwright.frontends.torch import trace
from graphwright.ir.program import Program


@pytest.fixture(scope="session")
def token_batch() -> dict[str, torch.Tensor]:
    """Two rows of token ids, the second one padded."""
    ids = torch.randint(5, 1000, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def minilm_program(minilm_dir: Path, token_batch: dict[str, torch.Tensor]) -> Program:
    """The real all-MiniLM-L6-v2. Do not change it: clone it."""
    transformers = pytest.importorskip("transformers")
    return trace(transformers.AutoModel.from_pretrained(minilm_dir).eval(), token_batch)


@pytest.fixture(scope="session")
def tinylm_program(tinylm_dir: Path, token_batch: dict[str, torch.Tensor]) -> Program:
    """A small Llama with tied embeddings, in bf16. Do not change it: clone it."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tinylm_dir, use_cache=False)
    return trace(model.eval(), token_batch)
