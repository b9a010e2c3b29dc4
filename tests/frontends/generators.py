"""Small random decoders that generate, and answers of transformers to hold theirs against."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tests.frontends.decoders import make

from graphwright.backends.session import Session
from graphwright.frontends.api import optimize
from graphwright.frontends.generation.decoder import Decoder
from graphwright.frontends.generation.facts import DecoderFacts
from graphwright.frontends.generation.optimized import OptimizedDecoder
from graphwright.frontends.huggingface import load_decoder
from graphwright.ir.decoder import DecoderLayout

# Of three and of two tokens in common at the beginning, of different lengths.
PROMPTS = [[1, 5, 9, 33], [1, 5, 9, 40, 41, 2, 7, 60], [4], [1, 5, 8]]


@functools.cache
def model_and_decoder(layers: int = 2, **changes: Any) -> tuple[Any, OptimizedDecoder]:
    """A Llama of 97 tokens without an end token, and the same as a decoder on the reference backend."""
    model = make("llama", num_hidden_layers=layers, max_position_embeddings=128, **changes)
    made = optimize(load_decoder(model, check=False), verify=False)
    assert isinstance(made, OptimizedDecoder)
    return model, made


def expected(model: Any, prompt: Sequence[int], count: int, **options: Any) -> list[int]:
    """New tokens of transformers' own greedy decoding."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0, **options
        )
    new: list[int] = out[0, len(prompt) :].tolist()
    return new


class CountingSession(Session):
    """A session whose logits a table gives by the last token, and which counts the tokens that it takes in."""

    def __init__(self, table: torch.Tensor, slots: int, capacity: int) -> None:
        self.layout = DecoderLayout(((1, 1),), ((1, 1),), table.shape[1])
        self.slots, self.capacity, self.cache = slots, capacity, "float32"
        self._table = table
        self.held = torch.full((slots, capacity), -1)
        self.steps: list[tuple[int, int]] = []

    def copy(self, source: int, target: int, length: int) -> None:
        self.held[target, :length] = self.held[source, :length]

    def _step(
        self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        for row, slot in enumerate(slots.tolist()):
            start = int(starts[row])
            assert bool((self.held[slot, :start] >= 0).all()), "a position that was never written counts as held"
            self.held[slot, start : start + tokens.shape[1]] = tokens[row]
        self.steps.append((tokens.shape[0], tokens.shape[1]))
        return self._table[tokens.gather(1, rows)].clone()


class TableDecoder(Decoder):
    """Chooses the next token by the last one alone, from a table of logits ``[V, V]``."""

    def __init__(self, table: torch.Tensor, facts: DecoderFacts | None = None, tokenizer: Any = None) -> None:
        self.table = table
        self.layout = DecoderLayout(((1, 1),), ((1, 1),), table.shape[1])
        self.facts = facts or DecoderFacts()
        self.sessions: list[CountingSession] = []
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def _lowered(self) -> Any:
        return self

    def session(
        self, *, slots: int = 1, capacity: int | None = None, cache: str = "float32", depth: Any = None
    ) -> CountingSession:
        self.sessions.append(CountingSession(self.table, slots, capacity or 64))
        return self.sessions[-1]


def script(tokens: Sequence[int], vocabulary: int) -> torch.Tensor:
    """A table by which each of these (distinct) tokens is followed by the next one."""
    table = torch.zeros(vocabulary, vocabulary)
    for token, following in itertools.pairwise(tokens):
        table[token, following] = 9.0
    return table


def byte_tokenizer() -> Any:
    """A tokenizer of transformers whose tokens are the 256 bytes and ``</s>`` (256): byte b is token b."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = _byte_letters()
    vocabulary = {letters[byte]: byte for byte in range(256)} | {"</s>": 256}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=core, eos_token="</s>")


def _byte_letters() -> list[str]:
    """How byte-level tokenizers spell each byte (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(other)) for byte in range(256)]


def folder_with_tokenizer(folder: Path, tokenizer: Any) -> Path:
    """A folder that holds this tokenizer."""
    tokenizer.save_pretrained(folder)
    return folder
