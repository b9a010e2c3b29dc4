"""Prompt tuning and DePT: trained tokens in front of the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.passes.adapters.base import AdapterKind, Draw, Factor, finite, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.sites import Site, refusal
from graphwright.passes.adapters.virtual import in_front, lengthen, token_inputs
from graphwright.passes.selection import Predicate


@dataclass(frozen=True)
class PromptTuning(AdapterKind):
    """``[P; E]``: n trained vectors in front of the embeddings of the text (Lester et al. 2021).

    Trains ``n d`` numbers. The program takes what it took; inside, the sequence is n longer, with positions that go on
    behind the prompt and a mask that admits it. Outputs have no rows for the prompt, where PEFT's have them in front;
    what is taken from the first row, such as BERT's pooled value, is taken from the prompt's, as PEFT does.

    A longest sequence that the program has is n shorter with it.

    Attributes:
        tokens: n.
        init: ``vocabulary``: the prompt starts as embeddings of tokens drawn at random; ``normal``.
        std: of ``normal``.
    """

    kind: ClassVar[str] = "prompt"
    unmergeable: ClassVar[str | None] = "it is more text, not another weight"
    identity: ClassVar[bool] = False

    tokens: int = 8
    init: str = "vocabulary"
    std: float = 0.02

    def __post_init__(self) -> None:
        whole(self.kind, "tokens", self.tokens)
        finite(self.kind, "std", self.std, positive=True)
        if self.init not in ("vocabulary", "normal"):
            raise InputError(f"must be 'vocabulary' or 'normal', not {self.init!r}", where=f"{self.kind}: init")

    def sites(self, program: Program, selected: Predicate, *, head: bool) -> Iterator[Site | Refusal]:
        """The look-up of the tokens' embeddings."""
        found = token_inputs(program)
        if isinstance(found, str):
            yield refusal(program.output, found)
        else:
            yield replace(found.site, op="prompt")

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``prompt [n, d]``."""
        width = site.features[0]
        if self.init == "normal":
            return {"prompt": Factor(draw.normal(self.tokens, width, std=self.std).to(site.dtype))}
        if site.weight is None or site.program is None:
            raise InputError(
                "the embeddings are packed", where=f"{self.kind} at {site.path}", hint="give init='normal'"
            )
        rows = torch.randint(site.features[1], (self.tokens,), generator=draw.generator)
        return {"prompt": Factor(site.program.tensor(site.weight).detach()[rows].clone())}

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """Longer inputs, and the prompt in their first places."""
        _lengthen(builder, self.tokens, None)
        prompt = builder.call("aten.unsqueeze", factors["prompt"], 0)
        builder.adapt(site.node, in_front(builder, site.node, prompt, 1, self.tokens))


@dataclass(frozen=True)
class DePT(PromptTuning):
    """``[P; E + A B]``: a short prompt, and a low-rank update of the text's embeddings (Shi & Lipani 2024, §2.2).

    ``A [s, r]`` has a row for each position of the text, ``B [r, d]``. Trains ``n d + r (s + d)`` numbers. ``A`` starts
    normal, ``B`` at 0. The paper trains prompt and update at different rates (α₁, α₂), which is the optimiser's matter.

    Attributes:
        rank: r.
        max_length: s; longer texts are refused.
    """

    kind: ClassVar[str] = "dept"

    rank: int = 8
    max_length: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self.kind, "rank", self.rank)
        whole(self.kind, "max_length", self.max_length)

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``prompt [n, d]``, ``dept_A [s, r]``, ``dept_B [r, d]``."""
        width = site.features[0]
        return {
            **super().factors(site, draw),
            "dept_A": Factor(draw.normal(self.max_length, self.rank, std=self.std).to(site.dtype)),
            "dept_B": Factor(torch.zeros(self.rank, width, dtype=site.dtype)),
        }

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """The update has no rows where the prompt is."""
        ids = _lengthen(builder, self.tokens, self.max_length)
        length = builder.call("aten.sym_size.int", ids, 1)
        rows = builder.call("aten.slice.Tensor", factors["dept_A"], 0, 0, length)
        update = builder.call("aten.matmul", rows, factors["dept_B"])
        update = builder.call("aten.constant_pad_nd", update, [0, 0, self.tokens, 0])
        prompt = builder.call("aten.unsqueeze", factors["prompt"], 0)
        adapted = in_front(builder, site.node, prompt, 1, self.tokens)
        builder.adapt(site.node, builder.plus(adapted, update))


def _lengthen(builder: Builder, tokens: int, longest: int | None) -> fx.Node:
    """Make the inputs longer; the token ids as they are given."""
    found = token_inputs(builder.rewriter.program)
    assert not isinstance(found, str)
    lengthen(builder, found, tokens, longest)
    return found.ids
