"""Trains the small decoders that sharing is judged on: E2E, one width, 12 layers shared or not, and shallow ones.

    OMP_NUM_THREADS=1 nice -n 15 python _shared_decoders.py             all of them, one after the other; may be killed
    python _shared_decoders.py --models 4x3 --quick                     a few steps of one

``GxR`` has G distinct layers, each used R times, classified after every repetition (Hooper et al., SPEED: loss
``Σ w_i L_i``, ``w_i = i / Σ i``); ``12x1`` has 12 separate layers; ``2x1``, ``3x1``, ``4x1`` are the shallow networks.
All see the same examples in the same order. Weights and the optimiser's state are written every few steps, so a run
that was killed goes on where it was. :func:`trained_step` gives the finished decoding step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _adapter_tasks import E2e
from _rows import SHARED, need, parser
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import graphwright as gw

# name -> distinct layers, repetitions
MODELS: dict[str, tuple[int, int]] = {
    "4x3": (4, 3),
    "4x1": (4, 1),
    "2x6": (2, 6),
    "2x1": (2, 1),
    "3x4": (3, 4),
    "3x1": (3, 1),
    "12x1": (12, 1),
}
STEPS = 500
RATE = 1e-3
WARMUP = 60
SAVED_EVERY = 25
_STATE, _DONE = "state.safetensors", "trained.json"


VOCABULARY = 1024


class SmallE2e(E2e):  # type: ignore[misc]
    """E2E in the words of its development set: a tokenizer of 1024 pieces, trained on it."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Byte-level BPE; the same each time."""
        found = Tokenizer(models.BPE())
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
        text = need(SHARED / "data" / "e2e" / "devset.csv").read_text(encoding="utf-8")
        found.train_from_iterator(text.replace("[", ": ").replace("]", "").splitlines(), trainer)
        return found


def cache_folder() -> Path:
    """Where trained models lie: ``GRAPHWRIGHT_BENCH_CACHE``, or a folder in the user's cache."""
    given = os.environ.get("GRAPHWRIGHT_BENCH_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "graphwright" / "shared-decoders"


def base_model(layers: int) -> Any:
    """A random Llama, hidden 256, FFN 512, 4 heads, tied embeddings."""
    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def program_of(name: str) -> gw.Program:
    """The model as it is trained, called with ``input_ids`` and ``attention_mask``; its layers are shared."""
    groups, repeats = MODELS[name]
    ids = torch.zeros(2, 7, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    program = gw.trace(base_model(groups * repeats), batch)
    program.requires_grad_(True)
    if repeats > 1:
        gw.ShareLayers(groups=groups)(program)
    return program


def trained_step(name: str, folder: Path | None = None) -> gw.Program:
    """The trained decoder as a decoding step, its layers shared, before any other pass.

    Raises:
        SystemExit: it was not trained; says how to.
    """
    target = (folder or cache_folder()) / name
    if not (target / _DONE).exists():
        raise SystemExit(f"{target} has no trained model: run {Path(__file__).name} --models {name}")
    groups, repeats = MODELS[name]
    step = gw.load_decoder(base_model(groups * repeats), check=False)
    if repeats > 1:
        gw.ShareLayers(groups=groups)(step)
    state = load_file(target / "model.safetensors")
    own = step.state_dict()
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)
    return step


class Training:
    """One model on its way; everything that the rest of the run depends on is in its state."""

    def __init__(self, name: str, folder: Path, task: E2e, steps: int) -> None:
        self.name, self.folder, self.task, self.steps = name, folder / name, task, steps
        self.program = program_of(name)
        self.classified = self.program.clone()
        if MODELS[name][1] > 1:
            gw.ClassifyRepetitions()(self.classified)
        self.parameters = dict(self.program.named_parameters())
        matrices = [each for each in self.parameters.values() if each.dim() > 1]
        others = [each for each in self.parameters.values() if each.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, RATE, betas=(0.9, 0.98))
        self.step, self.seconds = 0, 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / _STATE).exists():
            self._restore(load_file(self.folder / _STATE))

    def run(self) -> None:
        """Train to the end, saving now and then."""
        batches = self.task.batches(seed=0)
        for _ in range(self.step):
            next(batches)
        while self.step < self.steps:
            start = time.process_time()
            loss = self._train(next(batches))
            self.seconds += time.process_time() - start
            if self.step % SAVED_EVERY == 0 or self.step == self.steps:
                self._save()
                print(f"{self.name} step {self.step}/{self.steps} loss {loss:.4f} cpu {self.seconds:.0f} s", flush=True)

    def finish(self) -> dict[str, Any]:
        """Judge and write the finished model."""
        figures = {"token_loss": self.task.validation_loss(self.program, torch.nn.Identity())}
        weights = {name: each.detach().contiguous() for name, each in self.parameters.items()}
        _write(weights, self.folder / "model.safetensors")
        self.program.save(self.folder / "program")
        found = {"steps": self.step, "cpu_s": round(self.seconds, 1), **figures}
        (self.folder / "trained.part").write_text(json.dumps(found) + "\n", encoding="utf-8")
        os.replace(self.folder / "trained.part", self.folder / _DONE)
        (self.folder / _STATE).unlink()
        return found

    def _train(self, chosen: list[int]) -> float:
        rate = RATE * min((self.step + 1) / WARMUP, 1.0) * (0.5 + 0.5 * math.cos(math.pi * self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = max(rate, 0.02 * RATE)
        pairs = [self.task.data[0][at] for at in chosen]
        batch, labels = _batch(pairs)
        found = self.classified(**batch)
        logits = found["repetition_logits"] if MODELS[self.name][1] > 1 else [found.logits]
        loss = gw.repetition_loss([each[:, :-1] for each in logits], labels[:, 1:])
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _save(self) -> None:
        state = {f"weight.{name}": each.detach().contiguous() for name, each in self.parameters.items()}
        for name, each in self.parameters.items():
            for key, value in self.optimizer.state[each].items():
                state[f"optimizer.{key}.{name}"] = value.detach().float().contiguous()
        state["step"] = torch.tensor([self.step, self.seconds], dtype=torch.float64)
        _write(state, self.folder / _STATE)

    def _restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self.step, self.seconds = int(state["step"][0]), float(state["step"][1])
        with torch.no_grad():
            for name, each in self.parameters.items():
                each.copy_(state[f"weight.{name}"])
                kept = {key: state[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[each] = {key: value.clone() for key, value in kept.items()}


def _batch(pairs: list[tuple[list[int], list[int]]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Padded on the right; labels are the sentence's tokens, and -100 elsewhere."""
    longest = max(len(prompt) + len(sentence) for prompt, sentence in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, sentence) in enumerate(pairs):
        text = torch.tensor([*prompt, *sentence])
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
        labels[row, len(prompt) : len(text)] = text[len(prompt) :]
    return {"input_ids": ids, "attention_mask": mask}, labels


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    part = path.with_suffix(".part")
    save_file(dict(tensors), part)
    os.replace(part, path)


def main() -> int:
    """Train what is not trained yet."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="GxR")
    options.add_argument("--steps", type=int, default=STEPS)
    options.add_argument("--folder", type=Path, default=cache_folder())
    given: argparse.Namespace = options.parse_args()
    task = SmallE2e(quick=given.quick)
    found = {}
    for name in given.models:
        done = given.folder / name / _DONE
        if done.exists():
            found[name] = json.loads(done.read_text(encoding="utf-8"))
            print(f"{name} is trained: {found[name]}", flush=True)
            continue
        training = Training(name, given.folder, task, 4 if given.quick else given.steps)
        training.run()
        found[name] = training.finish()
        print(f"{name}: {found[name]}", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
