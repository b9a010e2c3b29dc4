"""Decoding with adapters kept beside the weights, relative to none: a Llama of 1.1 billion parameters in INT4, one row.

TinyLlama's shape and random weights, a session of the executor for each kind of adapter, all in this process. They
take turns with every token, and what counts is the median of the ratios of neighbouring steps, to the faster of two
sessions without an adapter; the ratio of the slower one shows what such a ratio is worth. Targets are those of the
issue "Adapters"; the paper's ratios (Edalati et al. 2022, table of inference latency, adapters merged where they can
be) stand beside ours. Also: the time to insert adapters into the traced model's q and v, 3 seconds allowed. Exit code 1
when a target is missed.

With ``--quick`` there are LoRA and KronA^B_res only, and the model has 2 layers and a head that is as much smaller.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from _bounds import Bounds
from _decoder_models import FEED_FORWARD, HEAD_SIZE, HIDDEN, KEY_VALUE_HEADS, LAYERS, VOCABULARY
from _rows import Rows, parser
from optimize_1b import llama

import graphwright as gw

THREADS, POSITIONS, CONTEXT = 2, 1024, 64
INSERT_S = 3.0
# One pair of shapes for all: 2048 = 32 · 64 = 64 · 32.
SHAPE = (32, 64)
NONE = "no adapter"
QUERY_AND_VALUE = ["*.q_proj", "*.v_proj"]


@dataclass
class System:
    """The model with an adapter.

    Attributes:
        insert: puts it into the traced model.
        target: allowed ratio to none.
        paper: the ratio of the paper.
        quick: whether it is one of the decisive cases.
    """

    name: str
    insert: gw.InsertAdapters | None = None
    target: float | None = None
    paper: float | None = None
    quick: bool = False
    trained: int = 0
    session: Any = None
    seconds: list[float] = field(default_factory=list)


def main() -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, help="turns of each system (default: 300, or 100 with --quick)")
    options.add_argument("--layers", type=int, help=f"layers of the model (default: {LAYERS}, or 2 with --quick)")
    arguments = options.parse_args()
    torch.set_num_threads(THREADS)
    rows = Rows()
    layers = arguments.layers or (2 if arguments.quick else LAYERS)
    model = llama(layers).to(torch.bfloat16)
    if arguments.quick:
        _shrink_head(model, layers)
    step = gw.load_decoder(model)
    insertion(rows, step, layers)
    systems = [each for each in everyone() if not arguments.quick or each.quick]
    for system in systems:
        prepare(step, system)
    measure(systems, arguments.rounds or (100 if arguments.quick else 300))
    report(rows, systems, layers, model.config.vocab_size)
    return int(rows.finish(arguments.json))


def everyone() -> list[System]:
    """None, none again, and the adapters that have targets."""
    lora = gw.InsertAdapters(gw.LoRA(rank=8, alpha=16), where=QUERY_AND_VALUE)
    krona = gw.InsertAdapters(gw.KronA(a=SHAPE), where=QUERY_AND_VALUE)
    block, kept = (gw.InsertAdapters(gw.KronABlock(a=SHAPE, residual=residual)) for residual in (False, True))
    return [
        System(NONE, quick=True),
        System(f"{NONE}, again"),
        System("LoRA r=8, q and v", lora, 1.05, 1.00, quick=True),
        System("KronA, q and v", krona, 1.08, 1.00),
        System("KronA^B, every FFN", block, 1.15, 1.27),
        System("KronA^B_res, every FFN", kept, 1.18, 1.36, quick=True),
    ]


def insertion(rows: Rows, step: gw.Program, layers: int) -> None:
    """Time to insert a LoRA into q and v, and into every linear."""
    for what, where in (("q and v", QUERY_AND_VALUE), ("every linear", None)):
        insert = gw.InsertAdapters(gw.LoRA(rank=8), where=where)
        spent = []
        for _ in range(3):
            program = step.clone()
            start = time.perf_counter()
            insert.run(program)
            spent.append(time.perf_counter() - start)
        case, seconds = f"insert LoRA r=8 into {what}, {layers} layers", statistics.median(spent)
        rows.add(case, _name("LoRA"), insert_s=seconds, allowed_s=None if where is None else INSERT_S)
        if where is not None:  # the places that have a target; all linears are shown beside them
            rows.require(seconds <= INSERT_S, f"{case}: {seconds:.1f} s, {INSERT_S:.0f} allowed")


def prepare(step: gw.Program, system: System) -> None:
    """Put the adapter in, quantise the base, lower it and open a session."""
    program = step.clone()
    if system.insert is not None:
        system.insert.run(program)
        added = gw.adapter_tensors(program, system.insert.adapter_name)
        system.trained = sum(value.numel() for value in added.values())
        for index, value in enumerate(added.values()):  # as if trained: zeros would be no adapter
            with torch.no_grad():
                value.normal_(0, 0.02, generator=torch.Generator().manual_seed(index))
    quantize = gw.QuantizeLinears(bits=4, group_size=128, lm_head=True, clip_search=False)
    backend = gw.CpuBackend(compute="int8", keep_weights=False)
    passes = [gw.PrepareDecoder(length=POSITIONS), quantize]
    small: Any = gw.optimize(program, passes, target=backend, verify=False)
    in_python = [use.node for use in small.explain() if use.kernel in ("torch", "reference")]
    if in_python:
        raise SystemExit(f"{system.name}: {in_python} run in Python, so this would not measure the kernels")
    system.session = small.session(slots=1, capacity=POSITIONS)


def measure(systems: list[System], rounds: int) -> None:
    """A token of each in turn, at one position; the first turns do not count."""
    zero, row, start = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([CONTEXT])
    prompt = torch.arange(CONTEXT).unsqueeze(0)
    for system in systems:
        system.session.step(prompt, zero, zero, row)
    for turn in range(-5, rounds):
        token = torch.tensor([[turn % 1000]])
        for system in systems:
            begin = time.perf_counter()
            system.session.step(token, zero, start, row)
            if turn >= 0:
                system.seconds.append(time.perf_counter() - begin)


def report(rows: Rows, systems: list[System], layers: int, vocabulary: int) -> None:
    """Rows and targets."""
    read = [Bounds(THREADS).read_gb_per_s() or float("nan") for _ in range(5)]
    key_value = KEY_VALUE_HEADS * HEAD_SIZE
    base = vocabulary * HIDDEN + layers * HIDDEN * (2 * HIDDEN + 2 * key_value + 3 * FEED_FORWARD)
    case = f"decode one row, INT4 g128, {layers} layers"
    unadapted = [system for system in systems if system.insert is None]
    base_seconds = min((system.seconds for system in unadapted), key=statistics.median)
    for system in systems:
        ratios = [own / none for own, none in zip(system.seconds, base_seconds, strict=True)]
        ratio, middle = statistics.median(ratios), 1e3 * statistics.median(system.seconds)
        size = base * (0.5 + 2 / 128) + 2 * system.trained
        rows.add(
            case,
            _name(system.name),
            median_ms=middle,
            bound_ms=size / statistics.median(read) / 1e6,
            ratio=ratio,
            allowed_ratio=system.target,
            paper_ratio=system.paper,
            trained_parameters=system.trained,
        )
        if system.target is not None:
            rows.require(ratio <= system.target, f"{case}: {system.name}: {ratio:.3f} of none, {system.target} allowed")


def _name(what: str) -> str:
    return f"graphwright {version('graphwright')}, {what}"


def _shrink_head(model: Any, layers: int) -> None:
    """A vocabulary that takes the share of the time that it has in the whole model."""
    config, rows = model.config, -(-VOCABULARY * layers // LAYERS // 64) * 64
    config.vocab_size = rows
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight = torch.nn.Parameter(module.weight.detach()[:rows].clone())
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = rows


if __name__ == "__main__":
    raise SystemExit(main())
