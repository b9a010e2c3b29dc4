"""A pass that is calibrated on a Llama of 1.1 billion parameters, with 128 windows of 512 tokens: how long it takes.

The model has the shape of TinyLlama (hidden 2048, feed-forward 5632, 22 layers, 32 heads on 4 key/value heads) and
random bfloat16 weights. With ``--quick`` it has one layer, which sees all the tokens, and the time is multiplied by 22:
what lies outside the layers (embedding, head) takes no part in it. Verification is not measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import _rows
import torch
from _memory import Watch, resident
from optimize_1b import llama

import graphwright as gw

LAYERS, WINDOWS, TOKENS = 22, 128, 512


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options of such a benchmark; ``doc`` says what it is for."""
    made: argparse.ArgumentParser = _rows.parser(doc)
    made.add_argument("--layers", type=int, help="layers of the model (default: 22, or 1 with --quick)")
    made.add_argument("--windows", type=int, default=WINDOWS, help="of calibration data (default: %(default)s)")
    made.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    return made


def run(case: str, made: Callable[[list[Any]], gw.Pass], minutes: float, options: argparse.Namespace) -> int:
    """Time the pass that ``made`` makes of the calibration data; the exit code is 1 when it misses ``minutes``."""
    torch.set_num_threads(options.threads)
    layers = options.layers or (1 if options.quick else LAYERS)
    rows = _rows.Rows()

    model = llama(layers).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 32000, (1, TOKENS), generator=generator)} for _ in range(options.windows)]
    before = resident()["own"]
    with Watch() as watch:
        start, used = time.perf_counter(), time.process_time()
        small = gw.optimize(
            model,
            [made(batches)],
            example_inputs={"input_ids": torch.arange(16).reshape(1, 16), "use_cache": False},
            verify=False,
        )
        wall, processor = time.perf_counter() - start, time.process_time() - used
    record = small.report.rows[0]
    whole = record.seconds * LAYERS / layers
    rows.add(
        f"{case}, Llama 1.1B, {layers} of {LAYERS} layers",
        "graphwright",
        pass_s=record.seconds,
        wall_s=wall,
        processor_s=processor,
        whole_model_min=whole / 60,
        windows=options.windows,
        tokens=TOKENS,
        peak_beyond_model_gb=(watch.own - before) / 1e9,
        threads=torch.get_num_threads(),
    )
    if options.windows >= WINDOWS:
        rows.require(whole <= 60 * minutes, f"{whole / 60:.0f} minutes, {minutes:.0f} allowed")
    return int(rows.finish(options.json))
