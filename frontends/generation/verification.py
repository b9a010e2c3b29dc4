"""Which drafted tokens stay: exactly what the model would have chosen without a draft."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from graphwright.frontends.generation.drafts import Proposal
from graphwright.frontends.generation.sampling import Sampling, draw


def verified(
    sampling: Sampling,
    logits: torch.Tensor,
    proposal: Proposal,
    seen: torch.Tensor | None,
    generator: torch.Generator,
) -> Iterator[int]:
    """The next tokens: the accepted beginning of the proposal, and one more that the model chooses.

    A drafted token ``x`` with probability ``q(x)`` stays with probability ``min(1, p(x) / q(x))``, where ``p`` is the
    model's; the first that does not is replaced by a draw from ``max(0, p - q)``, normalised (Leviathan et al. 2023,
    algorithm 1), so that every token is distributed as ``p``. In greedy decoding the token that stays is the likeliest
    one. Kernels may round one row of a step differently from many, so logits that nearly tie may fall to the other
    side than without a draft.

    Args:
        sampling: how the model chooses.
        logits: float32 ``[k + 1, V]``: after the last token of the sequence and after each of the k drafted ones.
        proposal: of k tokens.
        seen: for a repetition penalty, bool ``[V]``; whoever takes a token marks it here before asking for the next.
        generator: of the sequence.
    """
    for index, token in enumerate(proposal.tokens):
        if sampling.is_greedy:
            best = sampling.best(logits[index], seen)
            yield best
            if best != token:
                return
            continue
        model = sampling.probabilities(logits[index], seen).numpy()
        guessed = _guessed(proposal, index, len(model))
        if float(torch.rand((), dtype=torch.float64, generator=generator)) * guessed[token] < model[token]:
            yield token
            continue
        rest = np.maximum(model - guessed, 0)
        # Where the two agree up to rounding there is no rest, and the model's own distribution is as good.
        yield draw(torch.from_numpy(rest if rest.sum() > 0 else model), generator)
        return
    if sampling.is_greedy:
        yield sampling.best(logits[-1], seen)
    else:
        yield draw(sampling.probabilities(logits[-1], seen), generator)


def _guessed(proposal: Proposal, index: int, vocabulary: int) -> npt.NDArray[np.float64]:
    if proposal.probabilities is not None:
        return proposal.probabilities[index].numpy()
    certain = np.zeros(vocabulary)
    certain[proposal.tokens[index]] = 1.0
    return certain
