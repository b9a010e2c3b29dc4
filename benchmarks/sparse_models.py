"""Whole models on weights that are mostly zeros: a Llama that decodes, and BERT-base beside DeepSparse.

Random weights of which the smallest of each linear are zeros, two threads. The Llama has TinyLlama's shape; its systems
are graphwright's own, each in a process of its own: dense in FP32 and INT4, sparse in INT8 (its head, which is a larger
share of a model with fewer ``--layers``, is as sparse as the rest). BERT has 128 tokens; DeepSparse gets the same
weights in ONNX with integer products, as SparseML exports them. All take turns, with a pause before each; what they say
is checked. A rival that cannot be installed or run is a row that says why. Exit code 1 when a target is missed. Making
the Llama with all layers takes minutes and 9 GB; what is made is kept under build/rivals.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bounds import Bounds
from _decoder_models import HIDDEN, LAYERS, MODELS, POSITIONS, folder, follower, made, packed_bytes, prompt
from _rivals import Rival, RivalError
from _rows import Rows, parser
from encoder import (
    DEEPSPARSE,
    LENGTH,
    PAUSE,
    System,
    bert,
    cosine,
    executed,
    inputs_of,
    last_line,
    process,
    rival_files,
    tensors,
)

import graphwright as gw

THREADS = 2
OURS = "graphwright"
QUICK_LAYERS = 2
CONTEXT, TOKENS, CAPACITY = 32, 33, 128
ZEROS = 0.8
# Times dense fp32 by the share of zeros; and times the best dense INT4.
FP32_TARGETS, INT4_TARGET = {0.7: 6.0, 0.8: 7.0}, 1.0
DEEPSPARSE_TARGET = 1.0
# What rounding to 8 bits leaves of the states' agreement with the pruned model's in floats.
COSINE = {True: 0.98, False: 0.9}


def main() -> int:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=LAYERS, help="of the Llama")
    options.add_argument("--parts", default="llama,bert", help="which of the two")
    arguments = options.parse_args()
    torch.set_num_threads(THREADS)
    rows, bounds, parts = Rows(), Bounds(THREADS), arguments.parts.split(",")
    rounds = 3 if arguments.quick else 7
    if "llama" in parts:
        layers = min(arguments.layers, QUICK_LAYERS) if arguments.quick else arguments.layers
        decoding(rows, bounds, layers, decoders(layers, arguments.quick), rounds)
        rows.write(arguments.json)
    if "bert" in parts:
        encoding(rows, 1 if arguments.quick else 8, rounds)
    return int(rows.finish(arguments.json))


# -- Llama -------------------------------------------------------------------------------------------------------------


@dataclass
class Decoder:
    """graphwright with weights of a form.

    Attributes:
        source: how ``_ours_decode.py`` makes it.
        steps: seconds of each token but the first.
    """

    name: str
    target: Path
    source: dict[str, Any]
    zeros: float = 0.0
    steps: list[float] = field(default_factory=list)
    process: Rival | None = None

    def open(self) -> None:
        """Make it if it is not there, and start it."""

        def make(target: Path) -> None:
            maker = Rival(OURS, [], "_ours_decode.py", label="make")
            try:
                maker.ask("make", self.name, target=str(target), **self.source)
            finally:
                maker.close()

        made(self.target, make)
        self.process = Rival(OURS, [], "_ours_decode.py", label=self.target.stem)
        options = {"threads": THREADS, "capacity": CAPACITY, "cache": "float32"}
        self.process.ask("load", self.name, model=str(self.target), **options)

    def run(self, seed: int) -> None:
        """Continue a prompt.

        Raises:
            RivalError: it says something else than the model.
        """
        assert self.process is not None
        given = prompt(CONTEXT, seed)
        answer = self.process.ask("generate", self.name, prompts=[given], tokens=TOKENS)
        (said,) = answer["tokens"]
        if said != [follower(token) for token in [given[-1], *said[:-1]]]:
            raise RivalError(f"it says {said} after {given[-1]}")
        self.steps.extend(float(step) for step in np.diff(answer["seconds"]))


def decoders(layers: int, quick: bool) -> list[Decoder]:
    """Dense ones, and sparse ones."""
    forms: list[tuple[str, int, int | None, float]] = [("fp32", 32, None, 0.0), ("int4", 4, 128, 0.0)]
    forms += [(f"int8-{round(100 * zeros)}", 8, None, zeros) for zeros in FP32_TARGETS if zeros == ZEROS or not quick]
    source = {"source": str(folder(layers=layers)), "positions": POSITIONS}
    return [
        Decoder(
            f"{OURS} {'sparse' if zeros else 'dense'} {form}",
            MODELS / f"{OURS}-{HIDDEN}-{layers}-{form}.packed",
            {**source, "bits": bits, "group": group, "zeros": zeros},
            zeros,
        )
        for form, bits, group, zeros in forms
    ]


def decoding(rows: Rows, bounds: Bounds, layers: int, everyone: list[Decoder], rounds: int) -> None:
    """A token after another."""
    case, read = f"decode, Llama 1.1 B shape, {layers} of {LAYERS} layers, context {CONTEXT}", list[float]()
    for system in everyone:
        system.open()
        system.run(seed=1000)
        system.steps.clear()
    for index in range(rounds):
        for system in everyone:
            time.sleep(PAUSE)
            read.append(bounds.read_gb_per_s() or float("nan"))
            system.run(seed=index)
    bandwidth, found = statistics.median(read), dict[str, float]()
    for system in everyone:
        median = found[system.name] = 1e3 * statistics.median(system.steps)
        bound = packed_bytes(system.target) / bandwidth / 1e6
        rows.add(case, system.name, median_ms=median, bound_ms=bound, read_gb_per_s=bandwidth)
        assert system.process is not None
        system.process.close()
    dense, int4 = (found[f"{OURS} dense {form}"] for form in ("fp32", "int4"))
    for system in everyone:
        if system.zeros:
            over, wanted = dense / found[system.name], FP32_TARGETS[system.zeros]
            rows.require(over >= wanted, f"{case}: {system.name} {over:.2f} x dense fp32, {wanted} wanted")
            over = int4 / found[system.name]
            rows.require(over >= INT4_TARGET, f"{case}: {system.name} {over:.2f} x dense int4, {INT4_TARGET} wanted")


# -- BERT --------------------------------------------------------------------------------------------------------------


def encoding(rows: Rows, most: int, rounds: int) -> None:
    """Batches of one, and of ``most``."""
    everyone: list[tuple[System, torch.nn.Module]] = []
    for zeros in (0.0, ZEROS):
        torch.manual_seed(0)
        model = bert("sdpa")
        prune(model, zeros)
        everyone += [(system, model) for system in encoders(model, zeros)]
    for batch in sorted({1, most}):
        encode(rows, everyone, batch, rounds)


def prune(model: torch.nn.Module, zeros: float) -> None:
    """Set the smallest weights of every linear to 0."""
    for module in model.modules():
        if zeros and isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            weight[weight.abs() <= weight.abs().flatten().kthvalue(round(zeros * weight.numel())).values] = 0.0


def encoders(model: torch.nn.Module, zeros: float) -> list[System]:
    """Ours and DeepSparse, in INT8."""
    kind = f"{zeros:.0%} zeros" if zeros else "dense"
    example = tensors(inputs_of(2))
    # Nothing is verified here, for time's sake: each system's answer is compared with the model's.
    passes: list[gw.Pass] = [gw.Cleanup(), gw.FuseAll(), gw.QuantizeLinears(bits=8, activations="int8")]
    if zeros:
        passes.append(gw.CompressLinears())
    small = gw.optimize(model, passes, example_inputs=example, verify=False, target="cpu")
    start = process("deepsparse", DEEPSPARSE, "_rival_deepsparse.py", {"NM_DISABLE_ANALYTICS": "1"})

    def deepsparse(inputs: dict[str, np.ndarray]) -> Any:
        names = ("plain", "static per tensor", "integer")
        files = rival_files(model, names, f"-{round(100 * zeros)}-zeros" if zeros else "")
        return start({"model": str(files["integer"])})(inputs)

    return [
        System(f"{OURS} int8 dynamic, {kind}", "int8", executed(small)),
        System(f"{DEEPSPARSE[0]} int8 static, {kind}", "int8", deepsparse),
    ]


def encode(rows: Rows, everyone: list[tuple[System, torch.nn.Module]], batch: int, rounds: int) -> None:
    """Median milliseconds of every system, in turns."""
    inputs, case = inputs_of(batch), f"BERT-base, batch {batch}, sequence {LENGTH}"
    running: list[tuple[System, Callable[[float, float], list[float]], float]] = []
    for system, model in everyone:
        system.times.clear()
        with torch.no_grad():
            expected = model(**tensors(inputs)).last_hidden_state.numpy()
        try:
            time_it, answer = system.open(inputs)
            agreement = cosine(answer(), expected)
        except Exception as error:  # whatever keeps a rival from running is told
            if system.ours:
                raise
            rows.add(case, system.name, error=last_line(error))
            continue
        least = COSINE[system.ours]
        if agreement < least:
            rows.require(not system.ours, f"{case}: {system.name} agrees to {agreement:.5f}, {least} wanted")
            rows.add(case, system.name, error=f"it agrees with the model to {agreement:.3f} only")
            continue
        running.append((system, time_it, agreement))
    for _ in range(rounds):
        for system, time_it, _ in running:
            time.sleep(PAUSE)
            system.times.extend(time_it(0.05, 0.2))
    found: dict[str, float] = {}
    for system, _, agreement in running:
        median = found[system.name] = 1e3 * statistics.median(system.times)
        rows.add(case, system.name, median_ms=median, least_ms=1e3 * min(system.times), cosine=agreement)
    ours = found.get(f"{OURS} int8 dynamic, {ZEROS:.0%} zeros", float("nan"))
    theirs = found.get(f"{DEEPSPARSE[0]} int8 static, {ZEROS:.0%} zeros", float("nan"))
    dense = found.get(f"{OURS} int8 dynamic, dense", float("nan"))
    rows.add(case, f"{OURS}, {ZEROS:.0%} zeros", over_deepsparse=theirs / ours, over_own_dense=dense / ours)
    wanted = DEEPSPARSE_TARGET
    rows.require(
        theirs >= wanted * ours, f"{case}: {theirs / ours:.2f} x DeepSparse with as many zeros, {wanted} wanted"
    )


if __name__ == "__main__":
    raise SystemExit(main())
