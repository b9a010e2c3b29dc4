"""graphwright, in a process of its own like the rivals of the decoder benchmark."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import transformers
from _rival_worker import serve

import graphwright as gw


class Ours:
    """A packed decoder with a session for so many sequences at once as are asked for."""

    def __init__(self, model: str, capacity: int, cache: str) -> None:
        self._decoder: Any = gw.load_packed(model)
        self._capacity, self._cache = capacity, cache
        self._sessions: dict[int, Any] = {}

    def generate(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Greedy continuations: ``tokens``, and the ``seconds`` from the start until each is known."""
        session, slots = self._session(len(prompts)), torch.arange(len(prompts))
        given, held = torch.tensor(prompts), torch.zeros(len(prompts), dtype=torch.int64)
        start = time.perf_counter()
        seconds, said = [], []
        for _ in range(tokens):
            rows = torch.full((len(prompts), 1), given.shape[1] - 1)
            logits = session.step(given, slots, held, rows)
            held = held + given.shape[1]
            # In numpy: torch's threads would go on looking for work while ours need the cores.
            given = torch.from_numpy(logits[:, -1].numpy().argmax(-1, keepdims=True))
            said.append(given[:, 0].tolist())
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "tokens": list(zip(*said))}

    def logits(self, prompt: list[int]) -> list[float]:
        """After a prompt."""
        zero = torch.zeros(1, dtype=torch.int64)
        last = torch.tensor([[len(prompt) - 1]])
        found: list[float] = self._session(1).step(torch.tensor([prompt]), zero, zero, last)[0, 0].tolist()
        return found

    def overhead(self, steps: int) -> dict[str, float]:
        """Microseconds of a step, and of them those not spent in instructions; medians."""
        session, one, zero = self._session(1), torch.tensor([[1]]), torch.zeros(1, dtype=torch.int64)
        whole, besides = [], []
        rows = torch.tensor([[0]])
        for index in range(steps):
            held = torch.tensor([32 + index])
            start = time.perf_counter()
            spent = session.profile(one, zero, held, rows)
            whole.append(1e6 * (time.perf_counter() - start))
            besides.append(whole[-1] - sum(spent) / 1e3)
        return {"step_us": statistics.median(whole), "besides_us": statistics.median(besides)}

    def lookup(self, prompt: list[int], tokens: int, draft: str | None) -> float:
        """Seconds to continue a prompt, with a draft of what comes or without."""
        start = time.perf_counter()
        self._decoder.generate(torch.tensor([prompt]), max_new_tokens=tokens, draft=draft)
        return time.perf_counter() - start

    def _session(self, slots: int) -> Any:
        if slots not in self._sessions:
            self._sessions[slots] = self._decoder.session(slots=slots, capacity=self._capacity, cache=self._cache)
        return self._sessions[slots]


def load(request: dict[str, Any]) -> Ours:
    """``model``, ``threads``, the ``capacity`` of the cache, and what the ``cache`` holds."""
    torch.set_num_threads(request["threads"])
    return Ours(request["model"], request["capacity"], request["cache"])


def make(request: dict[str, Any]) -> None:
    """From a Hugging Face folder ``source`` to the packed file ``target``.

    ``bits`` of its linears, 4 where nothing is said and 32 for floats, in groups of ``group`` columns or whole rows; a
    share of ``zeros``, the smallest weights of each linear and of the head.
    """
    bits, zeros = request.get("bits", 4), request.get("zeros", 0.0)
    passes: list[gw.Pass] = [gw.PrepareDecoder(length=request["positions"])]
    if zeros:
        passes.append(gw.PruneLinears(sparsity=zeros, lm_head=True))
    if bits != 32:
        # A search for the best clip takes minutes, and nothing here depends on it.
        passes.append(gw.QuantizeLinears(bits=bits, group_size=request["group"], lm_head=True, clip_search=False))
    if zeros:
        passes.append(gw.CompressLinears())
    source = request["source"]
    if bits == 32:
        source = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    gw.optimize(source, passes, target=gw.CpuBackend(compute="int8"), verify=False).save_packed(request["target"])


if __name__ == "__main__":
    serve(load, make)
