"""What adapters are compared on: two tasks of sentence pairs for the real MiniLM, one of generation for a Llama."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import ClassVar, NamedTuple
from xml.etree import ElementTree

import torch
from _rows import SHARED, need
from _stsb import correlation, minilm_folder, sts
from _text import llama_folder
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional

import graphwright as gw

BATCH = 16
_PACKED = 8  # batches whose texts are sorted by length together, so that little is padded


class Task(ABC):
    """A task: its data, its model, its loss and how it is judged.

    Attributes:
        quick: a few texts of it only.
    """

    name: ClassVar[str]
    model: ClassVar[str]
    judged_by: ClassVar[str]

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick

    @abstractmethod
    def program(self) -> gw.Program:
        """The model as it is before training, with tensors of its own."""

    def head(self) -> nn.Module:
        """What is trained beside every system: nothing, unless the task needs a classifier."""
        return nn.Identity()

    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens of every example that is trained on."""

    @abstractmethod
    def loss(self, program: gw.Program, head: nn.Module, chosen: Sequence[int]) -> torch.Tensor:
        """The loss of some examples, to be trained."""

    @abstractmethod
    def validation_loss(self, program: gw.Program, head: nn.Module) -> float:
        """The loss on examples that are neither trained on nor tested: what learning rates are chosen by."""

    @abstractmethod
    def test(self, program: gw.Program, head: nn.Module) -> dict[str, float]:
        """The figures of the finished model; ``judged_by`` is one of them."""

    def batches(self, seed: int) -> Iterator[list[int]]:
        """Examples for one step after the other, without end."""
        generator, lengths = torch.Generator().manual_seed(seed), self.lengths()
        while True:
            order = torch.randperm(len(lengths), generator=generator).tolist()
            for start in range(0, len(order) - BATCH + 1, _PACKED * BATCH):
                pack = sorted(order[start : start + _PACKED * BATCH], key=lengths.__getitem__)
                parts = [pack[at : at + BATCH] for at in range(0, len(pack) - BATCH + 1, BATCH)]
                for at in torch.randperm(len(parts), generator=generator).tolist():
                    yield parts[at]


def _padded(ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, ids))
    tokens = torch.tensor([[*each, *[0] * (longest - len(each))] for each in ids])
    lengths = torch.tensor([len(each) for each in ids])
    return {"input_ids": tokens, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


# -- pairs of sentences ------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Sentences as token ids, and what is to be said of each pair."""

    left: list[list[int]]
    right: list[list[int]]
    labels: torch.Tensor

    def part(self, start: int, stop: int | None, every: int = 1) -> Pairs:
        """Some of them."""
        return Pairs(self.left[start:stop:every], self.right[start:stop:every], self.labels[start:stop:every])


class PairTask(Task):
    """MiniLM embeds both sentences, as it was trained to: the mean of the last hidden states."""

    model = "MiniLM"
    tokens: ClassVar[int]
    held_out: ClassVar[int]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """MiniLM's, cutting at the task's number of tokens."""
        found = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
        found.no_padding()
        found.enable_truncation(self.tokens)
        return found

    @abstractmethod
    def read(self) -> tuple[Pairs, Pairs]:
        """What may be trained on, and what is tested."""

    @cached_property
    def data(self) -> tuple[Pairs, Pairs, Pairs]:
        """To train, to validate, to test."""
        known, tested = self.read()
        order = torch.randperm(len(known.labels), generator=torch.Generator().manual_seed(0)).tolist()
        known = Pairs([known.left[at] for at in order], [known.right[at] for at in order], known.labels[order])
        held = 32 if self.quick else self.held_out
        return known.part(held, None), known.part(0, held), tested.part(0, None, 8 if self.quick else 1)

    def encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids."""
        return [each.ids for each in self.tokenizer.encode_batch(list(texts))]

    def program(self) -> gw.Program:
        """The encoder."""
        return gw.load_huggingface(minilm_folder(), dtype="float32").clone(copy_weights=True)

    def lengths(self) -> list[int]:
        """Of both sentences."""
        return [len(left) + len(right) for left, right in zip(*self.data[0][:2], strict=True)]

    def embedded(self, program: gw.Program, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """``[texts, 384]``."""
        batch = _padded(ids)
        mask = batch["attention_mask"][:, :, None].float()
        hidden = program(**batch).last_hidden_state
        means: torch.Tensor = (hidden * mask).sum(1) / mask.sum(1)
        return means

    def all_embedded(self, program: gw.Program, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """The same of many texts, those of one length together."""
        order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
        found = torch.empty(len(ids), 384)
        with torch.no_grad():
            for start in range(0, len(order), 32):
                chosen = order[start : start + 32]
                found[chosen] = self.embedded(program, [ids[at] for at in chosen])
        return found

    def loss(self, program: gw.Program, head: nn.Module, chosen: Sequence[int]) -> torch.Tensor:
        """The task's, on both sentences' embeddings."""
        pairs = self.data[0]
        left = self.embedded(program, [pairs.left[at] for at in chosen])
        right = self.embedded(program, [pairs.right[at] for at in chosen])
        return self.pair_loss(head, left, right, pairs.labels[list(chosen)])

    def validation_loss(self, program: gw.Program, head: nn.Module) -> float:
        """The mean over the pairs held out."""
        left, right, labels = self.data[1]
        with torch.no_grad():
            a, b = self.all_embedded(program, left), self.all_embedded(program, right)
            return float(self.pair_loss(head, a, b, labels))

    @abstractmethod
    def pair_loss(self, head: nn.Module, a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of some pairs."""


class Rte(PairTask):
    """Does the text entail the hypothesis? Trained on the three development sets, tested on RTE-3's test set.

    The classifier sees ``[u, v, |u - v|, u · v]`` (Conneau et al. 2017, InferSent), as little data asks for.
    """

    name = "RTE"
    judged_by = "accuracy"
    tokens = 64
    held_out = 200

    def read(self) -> tuple[Pairs, Pairs]:
        """The development sets; the test set."""
        known = [self._file(f"rte{number}_dev.xml") for number in (1, 2, 3)]
        merged = Pairs(
            [each for pairs in known for each in pairs.left],
            [each for pairs in known for each in pairs.right],
            torch.cat([pairs.labels for pairs in known]),
        )
        return merged, self._file("rte3_test.xml")

    def _file(self, name: str) -> Pairs:
        found = list(ElementTree.parse(need(SHARED / "data" / "rte" / name)).getroot().iter("pair"))
        texts = [[" ".join((each.findtext(key) or "").split()) for each in found] for key in ("t", "h")]
        yes = [each.get("value", each.get("entailment")) in ("TRUE", "YES") for each in found]
        return Pairs(self.encoded(texts[0]), self.encoded(texts[1]), torch.tensor(yes).long())

    def head(self) -> nn.Module:
        """A linear to two classes."""
        return nn.Linear(4 * 384, 2)

    def pair_loss(self, head: nn.Module, a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy."""
        return functional.cross_entropy(head(_features(a, b)), labels)

    def test(self, program: gw.Program, head: nn.Module) -> dict[str, float]:
        """Accuracy in per cent."""
        left, right, labels = self.data[2]
        with torch.no_grad():
            found = head(_features(self.all_embedded(program, left), self.all_embedded(program, right))).argmax(-1)
        return {"accuracy": 100 * float((found == labels).float().mean())}


def _features(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # Of length √384, so that a feature is about as large as those of a hidden state.
    a, b = (functional.normalize(each, dim=-1) * 384**0.5 for each in (a, b))
    return torch.cat((a, b, (a - b).abs(), a * b), -1)


class Stsb(PairTask):
    """How alike are two sentences? The cosine is trained to be the human score; tested on the development set."""

    name = "STS-B"
    judged_by = "spearman"
    tokens = 48
    held_out = 300

    def read(self) -> tuple[Pairs, Pairs]:
        """The training set; the development set."""
        found = []
        for name in ("sts-train.csv", "sts-dev.csv"):
            left, right, scores = sts(name, None)
            found.append(Pairs(self.encoded(left), self.encoded(right), scores))
        return found[0], found[1]

    def pair_loss(self, head: nn.Module, a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Squared difference of cosine and score (Reimers & Gurevych 2019, "regression objective")."""
        return functional.mse_loss(torch.cosine_similarity(a, b), labels / 5)

    def test(self, program: gw.Program, head: nn.Module) -> dict[str, float]:
        """Spearman's rank correlation in points."""
        left, right, scores = self.data[2]
        both = torch.cat([self.all_embedded(program, left), self.all_embedded(program, right)])
        return {"spearman": 100 * correlation(both, scores)}


# -- generation --------------------------------------------------------------------------------------------------------


class Generation(NamedTuple):
    """A meaning representation and sentences that say it, as token ids and as text."""

    prompt: list[int]
    sentences: list[list[int]]
    texts: list[str]


class E2e(Task):
    """A sentence that says a restaurant's attributes. Trained on the development set, tested on the test set.

    The token loss is over all sentences of the test set's 126 meaning representations chosen, one in five; BLEU is of
    60 of them, decoded greedily.
    """

    name = "E2E"
    model = "Llama 5.8M"
    judged_by = "bleu"
    held_out: ClassVar[int] = 40
    generated: ClassVar[int] = 60
    longest: ClassVar[int] = 56

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The small Llama's."""
        return Tokenizer.from_file(str(llama_folder() / "tokenizer.json"))

    @cached_property
    def end(self) -> int:
        """The token after a sentence: that of the line's end."""
        return int(self.tokenizer.encode("\n", add_special_tokens=False).ids[-1])

    def _read(self, name: str) -> list[Generation]:
        with open(need(SHARED / "data" / "e2e" / name), encoding="utf-8", newline="") as file:
            rows = [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
        found: dict[str, Generation] = {}
        for meaning, text in rows:
            if meaning not in found:
                said = meaning.replace("[", ": ").replace("]", "")
                found[meaning] = Generation(self._ids(f"{said}\n"), [], [])
            found[meaning].sentences.append([*self._ids(" ".join(text.split())), self.end])
            found[meaning].texts.append(text)
        return list(found.values())

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def data(self) -> tuple[list[tuple[list[int], list[int]]], list[Generation], list[Generation]]:
        """Pairs to train; meanings to validate, and to test."""
        known, tested = self._read("devset.csv"), self._read("testset_w_refs.csv")
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
        held = order[: 4 if self.quick else self.held_out]
        pairs = [(known[at].prompt, each) for at in order[len(held) :] for each in known[at].sentences]
        return pairs, [known[at] for at in held], tested[:: 90 if self.quick else 5]

    def program(self) -> gw.Program:
        """The small Llama."""
        return gw.load_huggingface(llama_folder(), dtype="float32").clone(copy_weights=True)

    def lengths(self) -> list[int]:
        """Of prompt and sentence."""
        return [len(prompt) + len(sentence) for prompt, sentence in self.data[0]]

    def loss(self, program: gw.Program, head: nn.Module, chosen: Sequence[int]) -> torch.Tensor:
        """Mean over the tokens of the sentences."""
        total, count = self._losses(program, [self.data[0][at] for at in chosen])
        return total / count

    def validation_loss(self, program: gw.Program, head: nn.Module) -> float:
        """Mean over all tokens held out."""
        return self._mean_loss(program, self.data[1])

    def test(self, program: gw.Program, head: nn.Module) -> dict[str, float]:
        """The token loss in nats, and BLEU in points."""
        from sacrebleu.metrics.bleu import BLEU

        tested = self.data[2]
        chosen = tested[:2] if self.quick else tested[:: -(-len(tested) // self.generated)]
        found = self._generate(program, [each.prompt for each in chosen])
        most = max(len(each.texts) for each in chosen)
        references = [[each.texts[at] if at < len(each.texts) else None for each in chosen] for at in range(most)]
        bleu = BLEU(lowercase=True).corpus_score(found, references)  # type: ignore[arg-type]
        return {"token_loss": self._mean_loss(program, tested), "bleu": float(bleu.score)}

    def _losses(
        self, program: gw.Program, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = _padded([[*prompt, *sentence] for prompt, sentence in pairs])
        starts = torch.tensor([len(prompt) for prompt, _ in pairs])
        tokens, places = batch["input_ids"], torch.arange(batch["input_ids"].shape[1])
        wanted = (places >= starts[:, None]) & batch["attention_mask"].bool()
        logits = program(**batch).logits[:, :-1]
        return functional.cross_entropy(logits[wanted[:, 1:]], tokens[wanted], reduction="sum"), wanted.sum()

    def _mean_loss(self, program: gw.Program, meanings: Sequence[Generation]) -> float:
        pairs = [(each.prompt, sentence) for each in meanings for sentence in each.sentences]
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        total, count = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(pairs), 32):
                loss, tokens = self._losses(program, pairs[start : start + 32])
                total, count = total + float(loss), count + int(tokens)
        return total / count

    def _generate(self, program: gw.Program, prompts: Sequence[list[int]]) -> list[str]:
        """Greedy. Attention looks back only, so what pads a row behind its end is never seen."""
        rows, done = [list(prompt) for prompt in prompts], [False] * len(prompts)
        with torch.no_grad():
            for _ in range(self.longest):
                open_ = [at for at, finished in enumerate(done) if not finished]
                if not open_:
                    break
                logits = program(**_padded([rows[at] for at in open_])).logits
                for row, at in zip(logits, open_, strict=True):
                    token = int(row[len(rows[at]) - 1].argmax())
                    done[at] = token == self.end
                    rows[at].append(token)
        texts = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        return [self.tokenizer.decode([token for token in text if token != self.end]).strip() for text in texts]


TASKS: tuple[type[Task], ...] = (Rte, Stsb, E2e)
