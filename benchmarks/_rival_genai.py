"""onnxruntime-genai, in its own process: a Llama as its own model builder quantises it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from _rival_worker import serve


class Decoder:
    """A model; every continuation is a generator of its own."""

    def __init__(self, model: str, threads: int, capacity: int) -> None:
        config = genai.Config(model)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model, self._capacity = genai.Model(config), capacity

    def generate(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Greedy continuations: ``tokens``, and the ``seconds`` from the start until each is known."""
        generator = self._generator(len(prompts))
        given = np.array(prompts, np.int32)
        start = time.perf_counter()
        generator.append_tokens(given if len(prompts) > 1 else given[0])
        seconds, said = [], []
        for _ in range(tokens):
            generator.generate_next_token()
            said.append(generator.get_next_tokens().tolist())
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "tokens": list(zip(*said))}

    def logits(self, prompt: list[int]) -> list[float]:
        """After a prompt."""
        generator = self._generator(1)
        generator.append_tokens(np.array(prompt, np.int32))
        found: list[float] = generator.get_logits().reshape(-1).tolist()
        return found

    def _generator(self, sequences: int) -> Any:
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._capacity, batch_size=sequences, do_sample=False)
        return genai.Generator(self._model, parameters)


def load(request: dict[str, Any]) -> Decoder:
    """``model``, ``threads`` and the ``capacity`` of the cache."""
    return Decoder(request["model"], request["threads"], request["capacity"])


def make(request: dict[str, Any]) -> None:
    """From a Hugging Face folder ``source`` to the folder ``target``, in blocks of ``group`` columns."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    files = ["-i", request["source"], "-o", request["target"], "-c", f"{request['target']}/cache"]
    options = ["--extra_options", f"block_size={request['group']}", "accuracy_level=4"]
    subprocess.run([*builder, *files, "-p", "int4", "-e", "cpu", *options], check=True)


if __name__ == "__main__":
    serve(load, make)
