"""OpenVINO GenAI, in its own process: a Llama as optimum-intel exports it and NNCF compresses its weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from _rival_worker import serve


class Decoder:
    """A pipeline, which is given tokens."""

    def __init__(self, model: str, threads: int, settings: dict[str, Any]) -> None:
        self._model = Path(model)
        self._settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **settings}
        self._pipeline = openvino_genai.LLMPipeline(model, "CPU", **self._settings)

    def generate(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Greedy continuations: ``tokens``, and the ``seconds`` from the start until each is known."""
        config = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        ids = np.array(prompts, np.int64)
        given = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        result = self._pipeline.generate(given, config)
        # It takes these times itself: the first in microseconds since the call, the others in milliseconds.
        times = result.perf_metrics.raw_metrics
        first, arrived = 1e-6 * times.m_times_to_first_token[0], times.m_new_token_times
        return {"seconds": [first + 1e-3 * (each - arrived[0]) for each in arrived], "tokens": result.tokens}

    def logits(self, prompt: list[int]) -> list[float]:
        """After a prompt, of the same file run without the pipeline, which does not give them."""
        compiled = openvino.Core().compile_model(self._model / "openvino_model.xml", "CPU", self._settings)
        ids = np.array([prompt], np.int64)
        given = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(prompt), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        found: list[float] = compiled(given)["logits"][0, -1].tolist()
        return found


def load(request: dict[str, Any]) -> Decoder:
    """``model``, ``threads`` and other ``settings``."""
    return Decoder(request["model"], request["threads"], request["settings"])


def make(request: dict[str, Any]) -> None:
    """From a Hugging Face folder ``source`` to the folder ``target``, in groups of ``group`` columns."""
    # optimum-intel installs it, but built for another torch; not needed here.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    from optimum.commands.optimum_cli import main as optimum_cli

    files = ["--model", request["source"], "--task", "text-generation-with-past", request["target"]]
    # The head and the table of embeddings too, as the other systems have them.
    weights = ["--weight-format", "int4", "--sym", "--ratio", "1.0", "--all-layers"]
    sys.argv = ["optimum-cli", "export", "openvino", *files, *weights, "--group-size", str(request["group"])]
    optimum_cli()


if __name__ == "__main__":
    serve(load, make)
