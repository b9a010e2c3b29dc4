"""Lowering a Llama of 1.1 billion parameters in INT4 to the CPU kernels, saving it packed, and loading it again.

The model is that of optimize_1b.py. Loading is timed in a process of its own which has imported torch, graphwright and
transformers (whose output type the model returns) and nothing else. Targets: 10 seconds to lower and pack, 1 to load.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _rows
import torch
from optimize_1b import llama

import graphwright as gw

LOWER, LOAD = 10.0, 1.0
THREADS = 2


def main() -> int:
    """Run the benchmark; the exit code is 1 when a target is missed."""
    parser = _rows.parser(__doc__)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.load is not None:
        print(json.dumps(load(options.load)))
        return 0
    rows, layers = _rows.Rows(), 4 if options.quick else 22
    inputs = {"input_ids": torch.arange(16).reshape(1, 16), "use_cache": False}
    passes = [gw.Cleanup(), gw.FuseAll(), gw.QuantizeLinears(bits=4, group_size=128, clip_search=False)]
    program = gw.optimize(llama(layers), passes, example_inputs=inputs, verify=False)
    backend = gw.CpuBackend(compute="int8")
    lowering = []
    for _ in range(3):
        start = time.perf_counter()
        backend.lower(program)
        lowering.append(time.perf_counter() - start)
    small = gw.optimize(program, [], example_inputs=inputs, target=backend, verify=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.packed"
        start = time.perf_counter()
        small.save_packed(path)
        saving = time.perf_counter() - start
        found = [loaded_elsewhere(path) for _ in range(3)]
        size = path.stat().st_size
    wanted = small(**inputs).logits.double()
    rows.require(all(each["sum"] == float(wanted.sum()) for each in found), "the loaded model gives other logits")
    lower, load_s = sorted(lowering)[1], sorted(each["load_s"] for each in found)[1]
    rows.add(
        f"Llama 1.1B, {layers} layers, INT4 g128",
        "graphwright",
        lower_s=lower,
        save_s=saving,
        load_s=load_s,
        first_call_s=sorted(each["first_call_s"] for each in found)[1],
        file_gb=size / 1e9,
        threads=THREADS,
    )
    if not options.quick:
        rows.require(lower <= LOWER, f"lowering takes {lower:.1f} s, {LOWER:.0f} allowed")
        rows.require(load_s <= LOAD, f"loading takes {load_s:.2f} s, {LOAD:.0f} allowed")
    return int(rows.finish(options.json))


def loaded_elsewhere(path: Path) -> dict[str, float]:
    """What :func:`load` finds in a fresh process."""
    run = subprocess.run([sys.executable, __file__, "--load", str(path)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def load(path: Path) -> dict[str, float]:
    """Seconds to load a packed model and to call it for the first time."""
    start = time.perf_counter()
    model = gw.load_packed(path)
    loaded = time.perf_counter()
    logits = model(input_ids=torch.arange(16).reshape(1, 16), use_cache=False).logits
    called = time.perf_counter()
    return {
        "load_s": loaded - start,
        "first_call_s": called - loaded,
        "sum": float(logits.double().sum()),
    }


if __name__ == "__main__":
    raise SystemExit(main())
