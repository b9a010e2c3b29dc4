"""Drafts: greedy answers stay token for token, sampled ones stay in distribution, whatever is guessed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.frontends.generators import PROMPTS, TableDecoder, model_and_decoder, script

import graphwright as gw

pytest.importorskip("transformers")

COUNT = 20


@dataclass
class Guesser(gw.Draft):
    """Guesses by a function of the sequence so far."""

    guess: Any
    tokens: int = 4

    def start(self, *, rows: int, capacity: int, vocabulary: int) -> gw.Proposer:
        guess = self.guess

        class Guessing(gw.Proposer):
            def propose(self, wanted: Sequence[gw.Wanted]) -> list[gw.Proposal]:
                return [guess(each) for each in wanted]

        return Guessing()


def oracle(answers: dict[int, list[int]], right: int) -> Guesser:
    """Guesses this many tokens of the true answers right, and the next one wrong."""

    def guess(wanted: gw.Wanted) -> gw.Proposal:
        known = answers[wanted.row]
        rest = known[len(wanted.tokens) :][: wanted.count]
        return gw.Proposal([*rest[:right], *[(token + 1) % 97 for token in rest[right : right + 1]]])

    return Guesser(guess)


@pytest.mark.parametrize("right", [0, 1, 2, 3, 9])
def test_greedy_answers_do_not_depend_on_how_many_guesses_are_right(right: int) -> None:
    _, decoder = model_and_decoder()
    plain = decoder.generate(PROMPTS, max_new_tokens=COUNT)
    found = decoder.generate(PROMPTS, max_new_tokens=COUNT, draft=oracle(dict(enumerate(plain.sequences)), right))
    assert found.tokens == plain.tokens
    counts = found.counts
    assert counts.accepted_tokens <= counts.drafted_tokens
    if right == 0:
        assert counts.accepted_tokens == 0
    if right == 9:  # all taken: four and one of the model's own at a step
        assert counts.accepted_tokens == counts.drafted_tokens > 0
        assert counts.steps == 4


def test_rows_accept_different_numbers() -> None:
    _, decoder = model_and_decoder()
    plain = decoder.generate(PROMPTS, max_new_tokens=COUNT)
    rng = random.Random(2)

    def guess(wanted: gw.Wanted) -> gw.Proposal:
        rest = plain.sequences[wanted.row][len(wanted.tokens) :][: rng.randint(0, wanted.count)]
        return gw.Proposal([token if rng.random() < 0.8 else rng.randrange(97) for token in rest])

    for slots in (1, 2, 4):
        found = decoder.generate(PROMPTS, max_new_tokens=COUNT, draft=Guesser(guess, 5), batch_size=slots)
        assert found.tokens == plain.tokens
        assert 0 < found.counts.accepted_tokens < found.counts.drafted_tokens


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_smaller_decoder_as_draft(penalty: float) -> None:
    _, decoder = model_and_decoder()
    _, small = model_and_decoder(1)
    options: dict[str, Any] = {"max_new_tokens": COUNT, "repetition_penalty": penalty}
    plain = decoder.generate(PROMPTS, **options)
    for draft, tokens in ((small, None), (small, 1), (decoder, 7)):
        found = decoder.generate(PROMPTS, draft=draft, draft_tokens=tokens, batch_size=3, **options)
        assert found.tokens == plain.tokens
        assert found.counts.drafted_tokens > 0
        if draft is decoder:  # what it would say itself is always right
            assert found.counts.accepted_tokens == found.counts.drafted_tokens


def test_ends_come_where_they_come_without_a_draft() -> None:
    _, decoder = model_and_decoder()
    plain = decoder.generate(PROMPTS, max_new_tokens=COUNT)
    stop = [plain.tokens[0][7], plain.tokens[1][3]]
    wanted = decoder.generate(PROMPTS, max_new_tokens=COUNT, stop_tokens=stop)
    assert "stop_token" in wanted.stopped
    for draft in (oracle(dict(enumerate(plain.sequences)), 9), decoder, "prompt-lookup"):
        found = decoder.generate(PROMPTS, max_new_tokens=COUNT, stop_tokens=stop, draft=draft)
        assert (found.tokens, found.stopped) == (wanted.tokens, wanted.stopped)
        cache = decoder.prompt_cache(slots=4, capacity=20)
        full = decoder.generate(PROMPTS, max_new_tokens=40, cache=cache, draft=draft)
        assert full.stopped == ("capacity",) * 4
        assert [len(sequence) for sequence in full.sequences] == [20] * 4
        assert all(a == b for a, b in zip(full.tokens[2], plain.tokens[2]))


def test_prompt_lookup_guesses_what_followed_last() -> None:
    proposer = gw.PromptLookup(4, longest=3).start(rows=2, capacity=99, vocabulary=99)

    def guess(tokens: list[int], count: int = 4, row: int = 0) -> list[int]:
        wanted = gw.Wanted(row, tokens, count, gw.Sampling(), torch.Generator())
        return list(proposer.propose([wanted])[0].tokens)

    tokens = [1, 2, 3, 4, 5, 9, 2, 3, 6, 7, 8, 9, 3]
    assert guess(tokens) == [6, 7, 8, 9]  # only "3" was there before
    tokens += [6, 7, 8]
    assert guess(tokens) == [9, 3, 6, 7]
    assert guess(tokens, 2) == [9, 3]
    assert guess([1, 2, 3], row=1) == []
    assert guess([1], row=2) == []
    assert guess([*tokens, 50]) == []
    assert guess([*tokens, 50, 4, 5]) == [9, 2, 3, 6]
    with pytest.raises(gw.InputError, match="PromptLookup"):
        gw.PromptLookup(longest=1, shortest=2)


def test_prompt_lookup_needs_fewer_steps_where_text_repeats() -> None:
    decoder = TableDecoder(script([*range(1, 30)], 40) + script([29, 1], 40))
    prompt = [*range(1, 30), 1, 2]
    plain = decoder.generate(prompt, max_new_tokens=41)
    found = decoder.generate(prompt, max_new_tokens=41, draft="prompt-lookup", draft_tokens=4)
    assert found.tokens == plain.tokens
    assert (plain.counts.steps, found.counts.steps) == (40, 8)


# -- sampling is exact -------------------------------------------------------------------------------------------------

VOCABULARY = 5


def chi_square(counts: torch.Tensor, wanted: torch.Tensor) -> float:
    total = counts.sum()
    return float(((counts - wanted * total) ** 2 / (wanted * total)).sum())


def drawn_by(wanted: gw.Wanted, table: torch.Tensor) -> gw.Proposal:
    """Guesses drawn from another table."""
    tokens, probabilities = [wanted.tokens[-1]], []
    for _ in range(wanted.count):
        probabilities.append(table[tokens[-1]].double().softmax(0))
        tokens.append(int(torch.multinomial(probabilities[-1], 1, generator=wanted.generator)))
    return gw.Proposal(tokens[1:], torch.stack(probabilities))


@pytest.mark.parametrize("kind", ["none", "drawn", "certain", "lookup", "decoder", "itself"])
@pytest.mark.parametrize("options", [{}, {"top_k": 3, "temperature": 1.5}])
def test_sampled_tokens_have_the_models_distribution(kind: str, options: dict[str, Any]) -> None:
    """Pairs of neighbouring tokens of a Markov chain against its own probabilities (Pearson's test)."""
    generator = torch.Generator().manual_seed(8)
    table, other = (torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 1.2 for _ in range(2))
    decoder = TableDecoder(table)
    drafts: dict[str, Any] = {
        "none": None,
        "drawn": Guesser(lambda wanted: drawn_by(wanted, other), 3),
        "certain": Guesser(lambda wanted: gw.Proposal([1, 3, 0][: wanted.count]), 3),
        "lookup": "prompt-lookup",
        "decoder": gw.DecoderDraft(TableDecoder(other), 3),
        "itself": gw.DecoderDraft(TableDecoder(table), 3),
    }
    sampling: dict[str, Any] = {"temperature": 1.0, **options}
    found = decoder.generate([[0, 1, 2, 3, 4]] * 40, max_new_tokens=50, seed=1, draft=drafts[kind], **sampling)
    transitions = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    for sequence in found.sequences:
        for first, second in itertools.pairwise(sequence[4:]):
            transitions[first, second] += 1
    rule = gw.Sampling(**sampling)
    statistic, freedom = 0.0, 0
    for row in range(VOCABULARY):
        wanted = rule.probabilities(table[row])
        assert transitions[row][wanted == 0].sum() == 0
        statistic += chi_square(transitions[row][wanted > 0], wanted[wanted > 0])
        freedom += int((wanted > 0).sum()) - 1
    # Normal approximation of Wilson and Hilferty (1931) to the 0.1 % point.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit
    if kind == "itself":
        assert found.counts.accepted_tokens == found.counts.drafted_tokens
    elif kind != "none":
        assert 0 < found.counts.accepted_tokens < found.counts.drafted_tokens


def test_the_test_of_distributions_can_fail() -> None:
    """Guesses that lie about the distribution they were drawn from."""
    generator = torch.Generator().manual_seed(8)
    table, other = (torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 1.2 for _ in range(2))

    def lying(wanted: gw.Wanted) -> gw.Proposal:
        true = drawn_by(wanted, other)
        return gw.Proposal(true.tokens, torch.full((len(true.tokens), VOCABULARY), 1 / VOCABULARY).double())

    found = TableDecoder(table).generate([[0]] * 40, max_new_tokens=50, seed=1, temperature=1.0, draft=Guesser(lying))
    counts = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    for sequence in found.sequences:
        for first, second in itertools.pairwise(sequence):
            counts[first, second] += 1
    statistics = [chi_square(counts[row], table[row].double().softmax(0)) for row in range(VOCABULARY)]
    assert max(statistics) > 5 * 18.47


def test_sampled_answers_are_reproducible_with_a_draft() -> None:
    _, decoder = model_and_decoder()
    _, small = model_and_decoder(1)
    options: dict[str, Any] = {"max_new_tokens": COUNT, "temperature": 0.8, "seed": 3, "draft": small}
    together = decoder.generate(PROMPTS, **options)
    assert decoder.generate(PROMPTS, **options).tokens == together.tokens
    assert decoder.generate(PROMPTS[1], **options).tokens == together.tokens[1:2]


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_draft_of_another_vocabulary_is_refused_before_anything_runs() -> None:
    decoder = TableDecoder(torch.eye(9))
    with pytest.raises(gw.InputError, match="the draft has a vocabulary of 8, the model one of 9"):
        decoder.generate([1], draft=TableDecoder(torch.eye(8)))
    assert all(not session.steps for session in decoder.sessions)


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        (gw.Proposal([1] * 9), "proposes 9 tokens where 4 were wanted"),
        (gw.Proposal([9]), "the vocabulary has 9"),
        (gw.Proposal([-1]), "the vocabulary has 9"),
        (gw.Proposal([1], torch.ones(1, 8)), r"gives probabilities \[1, 8\]"),
    ],
)
def test_a_malformed_proposal_is_named(proposal: gw.Proposal, message: str) -> None:
    decoder = TableDecoder(torch.eye(9))
    cache = decoder.prompt_cache()
    with pytest.raises(gw.InputError, match=message) as caught:
        decoder.generate([1], cache=cache, draft=Guesser(lambda wanted: proposal))
    assert "Guesser" in str(caught.value)
    assert cache.free == 1


def test_a_draft_whose_logits_are_no_numbers_is_named() -> None:
    with pytest.raises(gw.GenerationError, match="the draft's logits"):
        TableDecoder(torch.eye(9)).generate([1], draft=TableDecoder(torch.full((9, 9), float("nan"))))
