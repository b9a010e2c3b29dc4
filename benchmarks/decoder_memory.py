"""Memory of optimising a decoder folder, and of running what comes out, each in a process of its own.

The folder has the shape of TinyLlama (1.1 billion parameters) with random bfloat16 weights in five shards, made once
under build/. Targets: a peak of the whole process, Python and torch included, of at most 0.6 times the stored weights
when it becomes INT4 and 1.3 times otherwise; 1.1 times (packed weights + cache + 200 MB) when it runs; and 2 seconds
from the packed file to the first token, imports not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _rows
import torch
from _memory import Watch, resident

INT4, OTHER, RUNNING, BESIDE, FIRST_TOKEN = 0.6, 1.3, 1.1, 200e6, 2.0
THREADS, CAPACITY, PROMPT = 2, 2048, 16
BUILD = _rows.REPOSITORY / "build" / "decoder_memory"


def main() -> int:
    """Run the benchmark; the exit code is 1 when a target is missed."""
    parser = _rows.parser(__doc__)
    parser.add_argument("--layers", type=int, help="layers of the model (default: 22, or 4 with --quick)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.worker is not None:
        what, folder, layers = options.worker
        print(json.dumps(WORKERS[what](Path(folder), int(layers))))
        return 0
    layers = options.layers or (4 if options.quick else 22)
    rows, whole = _rows.Rows(), layers == 22
    folder = BUILD / f"llama-{layers}"
    if not (folder / "config.json").is_file():
        run("make", folder, layers)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    case = f"Llama, {layers} layers, {stored / 1e9:.2f} GB of bfloat16"
    names = {"int4": "INT4 g128, verified", "int4-unverified": "INT4 g128, not verified", "fused": "fused, verified"}
    for what, name in names.items():
        found = run(what, folder, layers)
        ratio, allowed = found["peak"] / stored, OTHER if what == "fused" else INT4
        rows.add(
            f"{case}: {name}",
            "graphwright",
            wall_s=found["wall"],
            save_s=found["save"],
            peak_gb=found["peak"] / 1e9,
            base_gb=found["base"] / 1e9,
            own_peak_gb=found["own"] / 1e9,
            file_peak_gb=found["files"] / 1e9,
            peak_over_stored=ratio,
            growth_over_stored=(found["peak"] - found["base"]) / stored,
            threads=THREADS,
        )
        if whole:
            rows.require(ratio <= allowed, f"{name}: peak {ratio:.2f} of the stored weights, {allowed} allowed")
    found = sorted((run("run", folder, layers) for _ in range(3)), key=lambda each: each["first"])[1]
    packed = packed_file(folder).stat().st_size
    limit = RUNNING * (packed + found["cache"] + BESIDE)
    rows.add(
        f"{case}: running INT4",
        "graphwright",
        load_s=found["load"],
        first_token_s=found["first"],
        peak_gb=found["peak"] / 1e9,
        base_gb=found["base"] / 1e9,
        packed_gb=packed / 1e9,
        cache_gb=found["cache"] / 1e9,
        peak_over_limit=found["peak"] / limit,
        threads=THREADS,
    )
    if whole:
        rows.require(found["peak"] <= limit, f"running takes {found['peak'] / 1e9:.2f} GB, {limit / 1e9:.2f} allowed")
        rows.require(found["first"] <= FIRST_TOKEN, f"first token after {found['first']:.1f} s, {FIRST_TOKEN} allowed")
    return int(rows.finish(options.json))


def run(what: str, folder: Path, layers: int) -> dict[str, float]:
    """What a worker finds in a fresh process."""
    command = [sys.executable, __file__, "--worker", what, str(folder), str(layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def packed_file(folder: Path) -> Path:
    """Where the INT4 model lies."""
    return folder / "packed.safetensors.int4"


# -- in a process of its own -------------------------------------------------------------------------------------------


def make(folder: Path, layers: int) -> dict[str, float]:
    """Write the folder, in five shards."""
    from optimize_1b import llama

    torch.set_default_dtype(torch.bfloat16)
    model = llama(layers)
    size = sum(value.nbytes for value in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 5 + (64 << 20))
    return {}


def optimize(folder: Path, *, int4: bool, verify: bool) -> dict[str, float]:
    """Seconds, and bytes: before (``base``), at the peak, and the largest of what is its own and of files."""
    from transformers import LlamaForCausalLM  # noqa: F401  # here, so that the base has it

    import graphwright as gw

    passes: list[Any] = [gw.PrepareDecoder(length=CAPACITY)]
    if int4:
        # A search for the best clip takes minutes on a busy machine and no memory.
        passes.append(gw.QuantizeLinears(bits=4, group_size=128, clip_search=False))
    base = resident()["peak"]
    with Watch() as watch:
        start = time.perf_counter()
        small = gw.optimize(folder, passes, target="cpu", verify=verify)
        wall = time.perf_counter() - start
        start = time.perf_counter()
        packed = packed_file(folder) if int4 else folder / "packed.fused"
        small.save_packed(packed)
        save = time.perf_counter() - start
    if not int4:
        packed.unlink()  # as large as the folder, and not used again
    peak = resident()["peak"]
    return {"wall": wall, "save": save, "base": base, "peak": peak, "own": watch.own, "files": watch.files}


def run_packed(folder: Path, layers: int) -> dict[str, float]:
    """Seconds to load, and to the first token of a prompt, loading included; bytes of the process and its cache."""
    import graphwright as gw

    load_packed = gw.load_packed  # imports it, so that the base has it
    base = resident()["peak"]
    start = time.perf_counter()
    model: Any = load_packed(packed_file(folder))
    load = time.perf_counter() - start
    session = model.session(slots=1, capacity=CAPACITY)
    zero, tokens = torch.zeros(1, dtype=torch.int64), torch.arange(PROMPT).unsqueeze(0)
    token = session.step(tokens, zero, zero, torch.tensor([[PROMPT - 1]]))[:, -1].argmax(-1, keepdim=True)
    first = time.perf_counter() - start
    for place in range(PROMPT, PROMPT + 16):
        logits = session.step(token, zero, torch.tensor([place]), torch.tensor([[0]]))
        token = logits[:, -1].argmax(-1, keepdim=True)
    cache = 2 * layers * CAPACITY * 4 * 64 * 4  # keys and values of 4 heads of 64 floats
    return {"load": load, "first": first, "base": base, "peak": resident()["peak"], "cache": cache}


WORKERS = {
    "make": make,
    "int4": lambda folder, layers: optimize(folder, int4=True, verify=True),
    "int4-unverified": lambda folder, layers: optimize(folder, int4=True, verify=False),
    "fused": lambda folder, layers: optimize(folder, int4=False, verify=True),
    "run": run_packed,
}


if __name__ == "__main__":
    raise SystemExit(main())
