"""Generation on the executor: the same tokens as on the reference, from a packed folder too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.frontends.generators import PROMPTS, expected, model_and_decoder

import graphwright as gw
from graphwright.frontends.huggingface import load_decoder

pytest.importorskip("transformers")
pytest.importorskip("graphwright.backends.cpu._native")

COUNT = 12


def test_the_executor_generates_what_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks whose logits nobody wants, with drafts that roll back, over caches that share and copy."""
    monkeypatch.setattr("graphwright.frontends.generation.run.CHUNK", 3)
    model, _ = model_and_decoder()
    decoder: Any = gw.optimize(load_decoder(model, check=False), [gw.PrepareDecoder()], target="cpu", verify=False)
    decoder.save_packed(tmp_path)
    packed: Any = gw.load_packed(tmp_path)
    wanted = [expected(model, prompt, COUNT) for prompt in PROMPTS]
    for each in (decoder, packed):
        assert each.context == 128
        cache = each.prompt_cache(slots=3, capacity=40)
        given: list[dict[str, Any]] = [
            {},
            {"draft": "prompt-lookup"},
            {"draft": decoder, "draft_tokens": 3},
            {"cache": cache},
            {"cache": cache},
        ]
        for options in given:
            found = each.generate(PROMPTS, max_new_tokens=COUNT, **options)
            assert [list(new) for new in found.tokens] == wanted


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_rounded_caches_generate(cache: str) -> None:
    model, _ = model_and_decoder()
    decoder: Any = gw.optimize(load_decoder(model, check=False), target="cpu", verify=False)
    found = decoder.generate(PROMPTS, max_new_tokens=4, cache=cache, batch_size=2)
    assert [len(new) for new in found.tokens] == [4] * 4
    # The first token of an answer hangs on few rounded values.
    assert [new[0] for new in found.tokens] == [expected(model, prompt, 1)[0] for prompt in PROMPTS]
