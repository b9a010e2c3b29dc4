"""What rounding activations, caches and attention costs real models, and what keeping outliers apart gives back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.backends.cpu import CpuBackend, native_status
from graphwright.frontends.huggingface import load_decoder
from graphwright.passes.quantization.formats import Format

tokenizers = pytest.importorskip("tokenizers")

WINDOW = 256
# Windows over the whole text. Perplexities of two programs are compared on the same windows, where they differ little.
COUNT = 6


@dataclass(frozen=True)
class Language:
    """A small Llama, windows of a text, and calibration data from the same source further on."""

    program: gw.Program
    folder: Path
    windows: torch.Tensor
    calibration: list[dict[str, torch.Tensor]]
    exact: float


def inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def perplexity(logits: torch.Tensor, windows: torch.Tensor) -> float:
    wanted = windows[:, 1:].flatten()
    return math.exp(float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted)))


@pytest.fixture(scope="module")
def llama(tinylm_dir: Path, shared_dir: Path) -> Language:
    text = (shared_dir / "data" / "wikitext2" / "valid.txt").read_text()
    ids = tokenizers.Tokenizer.from_file(str(tinylm_dir / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    step = len(rows) // COUNT
    windows = rows[::step][:COUNT]
    calibration = [inputs(row.unsqueeze(0)) for row in rows[step // 2 :: step][:4]]
    program = gw.load_huggingface(tinylm_dir, dtype="float32")
    with torch.no_grad():
        exact = perplexity(program(**inputs(windows)).logits, windows)
    return Language(program, tinylm_dir, windows, calibration, exact)


def change(language: Language, passes: list[gw.Pass]) -> float:
    """Percent that the perplexity moves."""
    program = language.program.clone()
    for item in passes:
        assert item(program)
    with torch.no_grad():
        found = perplexity(program(**inputs(language.windows)).logits, language.windows)
    return 100 * (found / language.exact - 1)


def test_eight_bits_cost_next_to_nothing(llama: Language) -> None:
    int8 = gw.QuantizeLinears(activations="int8")
    for passes in (
        [int8],
        [gw.SplitOutlierColumns(count=8, calibration=llama.calibration), int8],
        [gw.FuseAttention(), gw.QuantizeAttention(), int8],
    ):
        assert abs(change(llama, list(passes))) < 0.8, passes


def test_three_bits_gain_by_half_a_percent_of_the_weights(llama: Language) -> None:
    def loss(passes: list[gw.Pass]) -> float:
        program, form = llama.program.clone(), Format(3, 128, symmetric=True, clip_search=False)
        for item in passes:
            item(program)
        with torch.no_grad():
            for name, weight in program.tensors().items():
                if name.endswith(("proj.weight", "proj.rest.weight")):
                    groups = weight.reshape(len(weight), -1, 128)
                    grid = form.fit(groups)
                    program.set_tensor(name, form.values(form.round(groups, *grid), *grid).view_as(weight))
            found = perplexity(program(**inputs(llama.windows)).logits, llama.windows)
        return 100 * (found / llama.exact - 1)

    without, protected = loss([]), loss([gw.SplitOutlierWeights()])
    assert protected < 0.75 * without, (protected, without)


@pytest.mark.skipif(not native_status().available, reason=native_status().message)
def test_an_int8_cache(llama: Language) -> None:
    passes = [gw.Cleanup(), gw.FuseAll()]
    decoder: Any = gw.optimize(load_decoder(llama.folder), passes, target=CpuBackend(), verify=False)
    found: dict[str, float] = {}
    slots = torch.arange(COUNT)
    for cache in ("float32", "int8"):
        session = decoder.session(slots=COUNT, capacity=WINDOW, cache=cache)
        rows = torch.arange(WINDOW).expand(COUNT, WINDOW)
        logits = session.step(llama.windows, slots, torch.zeros_like(slots), rows)
        found[cache] = perplexity(logits, llama.windows)
    assert abs(found["float32"] / llama.exact - 1) < 0.02, "bfloat16 weights are the same numbers"
    assert abs(found["int8"] / found["float32"] - 1) < 0.005, found


SENTENCES = (
    "A man is playing a guitar on a stage.",
    "Someone plays music.",
    "The committee rejected the proposal for the third time this year.",
    "Kittens sleep most of the day.",
    "Shares fell sharply after the announcement, then recovered by noon.",
    "How do I reset the password of my account?",
)


@dataclass(frozen=True)
class Encoder:
    """MiniLM, some sentences, others to calibrate on, and what they are embedded as."""

    program: gw.Program
    batch: dict[str, torch.Tensor]
    calibration: list[dict[str, torch.Tensor]]
    exact: torch.Tensor

    def cosines(self, passes: list[gw.Pass]) -> torch.Tensor:
        """Of the embeddings after some passes with those before."""
        program = self.program.clone()
        for item in passes:
            assert item(program)
        with torch.no_grad():
            return torch.cosine_similarity(_pooled(program, self.batch), self.exact)


@pytest.fixture(scope="module")
def encoder(minilm_dir: Path) -> Encoder:
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm_dir / "tokenizer.json"))
    tokenizer.enable_padding()

    def encode(sentences: Sequence[str]) -> dict[str, torch.Tensor]:
        found = tokenizer.encode_batch(list(sentences))
        ids, mask = ([getattr(each, part) for each in found] for part in ("ids", "attention_mask"))
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    program, batch = gw.load_huggingface(minilm_dir, dtype="float32"), encode(SENTENCES)
    calibration = [encode([each.lower().replace("the", "our") + " It rained." for each in SENTENCES[::-1]])]
    with torch.no_grad():
        return Encoder(program, batch, calibration, _pooled(program, batch))


def test_sentence_embeddings_in_eight_bits(encoder: Encoder) -> None:
    int8 = gw.QuantizeLinears(activations="int8")
    attention: list[gw.Pass] = [gw.FuseAttention(), gw.QuantizeAttention()]
    for passes in ([int8], attention, [*attention, int8]):
        assert float(encoder.cosines(list(passes)).min()) > 0.998, passes


def test_four_bit_activations_need_their_outliers_apart(encoder: Encoder) -> None:
    quik = gw.QuantizeLinears(bits=4, activations="int4")
    split = gw.SplitOutlierColumns(count=32, calibration=encoder.calibration)
    without, with_split = (float(encoder.cosines(list(each)).mean()) for each in ([quik], [split, quik]))
    assert 1 - with_split < 0.5 * (1 - without), (with_split, without)


def _pooled(program: gw.Program, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled: torch.Tensor = (program(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return pooled
