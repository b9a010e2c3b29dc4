"""Sampling against transformers' own logits processors, and the draw itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from graphwright.frontends.generation.sampling import Sampling, draw, keep_min_p, keep_top_k, keep_top_p
from graphwright.ir.errors import InputError

transformers = pytest.importorskip("transformers")

INFINITY = float("inf")


def rows() -> list[torch.Tensor]:
    """Random logits, with ties, of every spread, with tokens that are out already."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for size in (1, 2, 3, 17, 300):
        for spread in (1e-6, 1.0, 30.0, 1e4):
            row = torch.randn(size, generator=generator) * spread
            made.append(row)
            made.append((row / spread).round() * spread)  # many ties
            out = row.clone()
            out[torch.rand(size, generator=generator) < 0.4] = -INFINITY
            out[0] = 1.0
            made.append(out)
    made.append(torch.zeros(50))
    made.append(torch.tensor([-3e38, 3e38, 0.0, 3e38, -INFINITY]))
    return made


def same(found: Any, wanted: torch.Tensor) -> bool:
    return np.array_equal(found, wanted[0])


NONE = torch.zeros(1, 0, dtype=torch.int64)


@pytest.mark.parametrize("count", [1, 2, 5, 1000])
def test_top_k(count: int) -> None:
    warper = transformers.TopKLogitsWarper(count)
    assert all(same(keep_top_k(row.numpy(), count), warper(NONE, row[None])) for row in rows())


@pytest.mark.parametrize("mass", [1e-6, 0.1, 0.5, 0.9, 0.999999])
def test_top_p(mass: float) -> None:
    """Which of several equal scores stay is left open by the sort that transformers uses; how many is not."""
    warper = transformers.TopPLogitsWarper(mass)
    for row in rows():
        found, wanted = torch.from_numpy(keep_top_p(row.numpy(), mass)), warper(NONE, row[None])[0]
        assert torch.equal(found.sort().values, wanted.sort().values)
        if len(row.unique()) == len(row):
            assert torch.equal(found, wanted)


def test_top_p_keeps_the_last_of_equals() -> None:
    found = keep_top_p(np.array([2, 1, 2, 1, 2], dtype=np.float32), 0.5)
    assert found.tolist() == [-INFINITY, -INFINITY, 2.0, -INFINITY, 2.0]


@pytest.mark.parametrize("least", [1e-6, 0.1, 0.5, 1.0])
def test_min_p(least: float) -> None:
    warper = transformers.MinPLogitsWarper(least)
    assert all(same(keep_min_p(row.numpy(), least), warper(NONE, row[None])) for row in rows())


@pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0])
def test_repetition_penalty(penalty: float) -> None:
    processor, sampling = transformers.RepetitionPenaltyLogitsProcessor(penalty), Sampling(repetition_penalty=penalty)
    for row in rows():
        tokens = [0, len(row) - 1, len(row) // 2, 0]
        wanted = processor(torch.tensor([tokens]), row[None])
        assert same(sampling.scores(row, sampling.seen(tokens, len(row))), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0.3, "top_p": 0.5, "min_p": 0.2},
        {"temperature": 1.0, "top_k": 3, "repetition_penalty": 0.8},
    ],
)
def test_all_in_the_order_of_transformers(options: dict[str, Any]) -> None:
    """The order is read off what ``generate`` itself would apply."""
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = transformers.LlamaForCausalLM(config)
    settings = {"top_k": 0, **options}
    generation = transformers.GenerationConfig(do_sample=True, **settings)
    processors = model._get_logits_processor(generation_config=generation, device="cpu")
    sampling = Sampling(**options)
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        row, tokens = torch.randn(300, generator=generator) * 4, torch.randint(0, 300, (12,), generator=generator)
        wanted = processors(tokens[None], row[None])
        assert same(sampling.scores(row, sampling.seen(tokens.tolist(), 300)), wanted)


def test_draws_have_the_probabilities() -> None:
    """Pearson's test on 20 000 draws; a token without probability never comes."""
    wanted = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.2, 0.05, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    count = 20_000
    found = torch.bincount(torch.tensor([draw(wanted * 3, generator) for _ in range(count)]), minlength=7)
    assert found[wanted == 0].sum() == 0
    possible = wanted > 0
    statistic = ((found - wanted * count) ** 2 / (wanted * count))[possible].sum()
    assert statistic < 16.27  # chi-square, 3 degrees of freedom, 0.1 %


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_a_draw_at_either_end_gives_a_possible_token(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.tensor(number, dtype=torch.float64))
    probabilities = torch.tensor([0.0, 1e-300, 1.0, 1e-30, 0.0], dtype=torch.float64)
    assert draw(probabilities, torch.Generator()) == (1 if number == 0 else 2)


def test_scores_beyond_float32_leave_the_largest() -> None:
    found = Sampling(temperature=1e-4).probabilities(torch.tensor([1e37, 3e38, -3e38, 0.0]))
    assert found.tolist() == [0.5, 0.5, 0, 0]


def test_greedy_takes_the_first_of_equals() -> None:
    probabilities = Sampling().probabilities(torch.tensor([1.0, 3.0, 3.0]))
    assert probabilities.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", INFINITY),
        ("temperature", 1e-9),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", float("nan")),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        Sampling(**{name: value})
