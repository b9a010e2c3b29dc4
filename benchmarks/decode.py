"""Decoding and prefill of a Llama of 1.1 billion parameters in INT4, beside llama.cpp, onnxruntime-genai and OpenVINO.

TinyLlama's shape, two threads; every system in a process of its own, all loaded at once, taking turns with a pause
before each. A step reads all weights and the cache, so its bound is their bytes over the read bandwidth, which is
measured between the turns; a prefill's is its operations over the INT8 peak. What a system says is checked. A rival
that cannot be installed or run is a row that says why. Exit code 1 when a target is missed. The first time, building
llama.cpp and making the models takes half an hour.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _bounds import Bounds
from _decoder_models import (
    CACHE_ROW,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    LAYERS,
    MODELS,
    POSITIONS,
    VOCABULARY,
    WEIGHTS,
    expected,
    folder,
    follower,
    made,
    packed_bytes,
    prompt,
)
from _rivals import Rival, RivalError
from _rows import Rows, parser

THREADS = 2
CAPACITY = 1024
PAUSE = 0.1
OURS = "graphwright"
LLAMACPP = ["llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6"]
LLAMACPP_BUILD = {
    "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF",
    "CMAKE_BUILD_PARALLEL_LEVEL": "2",
}
# Its builder needs the others.
GENAI = ["onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "torch==2.13.0", "transformers==5.23.0"]
GENAI += ["onnx_ir==1.1.0", "onnx==1.23.2"]
OPENVINO = ["openvino-genai==2026.4.1.0", "nncf==3.4.0", "optimum-intel==2.2.0", "torch==2.13.0"]
# Of ours; the targets are for the first.
CACHES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}

# Share of the read bandwidth; speed over the fastest rival at 50 and at 70 GB/s, by columns to a scale.
BANDWIDTH_TARGET = 0.9
DECODE_TARGETS = {128: (1.08, 1.3), 32: (1.15, 1.4)}
PREFILL_TARGETS = {512: 1.4, 32: 1.4}
FOUR_TARGET = 3.3
LOOKUP_TARGET = 2.0
MEMORY_TARGET, MEMORY_BESIDES = 1.1, 200.0
LOAD_TARGET = 2000.0
# Of the logits after a prompt, with the original's; rivals reach 0.987 to 0.995.
COSINE_TARGET = 0.985
# What is not spent in kernels: of the time of a token, and of a model that holds next to nothing.
OVERHEAD_TARGET, OVERHEAD_US = 0.02, 60.0


@dataclass(frozen=True)
class Task:
    """Prompts of a length, continued."""

    sequences: int
    length: int
    tokens: int


SHORT, LONG = Task(1, 32, 65), Task(1, 512, 33)
MIDDLE, FOUR = Task(1, 128, 1), Task(4, 32, 33)


@dataclass
class System:
    """A way to run the model.

    Attributes:
        group: columns to a scale.
        cache: bytes of a number in the cache.
        bytes: of the weights that a step reads; ours are those of the file.
        label: tells systems of one file apart.
    """

    name: str
    group: int
    cache: float
    environment: str
    requirements: list[str]
    worker: str
    source: dict[str, Any]
    target: Path
    bytes: float = float("nan")
    label: str = ""
    build: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rival: Rival | None = None
    found: dict[str, float] = field(default_factory=dict)
    steps: dict[Task, list[float]] = field(default_factory=lambda: defaultdict(list))
    first: dict[Task, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def ours(self) -> bool:
        """Whether it is graphwright."""
        return self.name.startswith(OURS)

    def start(self, label: str) -> Rival:
        """A process of it."""
        return Rival(self.environment, self.requirements, self.worker, build=self.build, label=label)

    def make(self) -> None:
        """Its model, if it is not there."""

        def make(target: Path) -> None:
            maker = self.start("make")
            try:
                maker.ask("make", self.name, target=str(target), **self.source)
            finally:
                maker.close()

        made(self.target, make)
        if self.ours:
            self.bytes = packed_bytes(self.target)

    def open(self) -> None:
        """Start it and take the time to its first token, the memory for one sequence, and what it says."""
        self.make()
        _read(self.target)
        beginning = time.perf_counter()
        self.rival = self.start(self.target.stem + self.label)
        self.rival.ask("peak", self.name)  # it answers when it has imported what it needs
        imported = time.perf_counter()
        options = {"threads": THREADS, "capacity": CAPACITY, **self.settings}
        self.rival.ask("load", self.name, model=str(self.target), **options)
        self.generate(Task(1, 32, 1), seed=1000)
        self.found["load_ms"] = 1e3 * (time.perf_counter() - imported)
        self.found["process_ms"] = 1e3 * (time.perf_counter() - beginning)
        self.generate(LONG, seed=1000)
        self.found["peak_mb"] = self.rival.ask("peak", self.name)
        checked = prompt(32)
        found = np.array(self.rival.ask("logits", self.name, prompt=checked))
        wanted = expected(checked).astype(np.float64)
        self.found["cosine"] = float(found @ wanted / np.sqrt((found @ found) * (wanted @ wanted)))

    def generate(self, task: Task, seed: int) -> list[float]:
        """Seconds until each token.

        Raises:
            RivalError: it says something else than the model.
        """
        assert self.rival is not None
        prompts = [prompt(task.length, 10 * seed + task.sequences + index) for index in range(task.sequences)]
        answer = self.rival.ask("generate", self.name, prompts=prompts, tokens=task.tokens)
        for given, said in zip(prompts, answer["tokens"], strict=True):
            if said != [follower(token) for token in [given[-1], *said[:-1]]] or len(said) != task.tokens:
                raise RivalError(f"it says {said} after {given[-1]}")
        seconds: list[float] = answer["seconds"]
        return seconds

    def run(self, task: Task, seed: int) -> None:
        """Take a turn that counts."""
        seconds = self.generate(task, seed)
        self.first[task].append(seconds[0])
        self.steps[task].extend(float(step) for step in np.diff(seconds))

    def bound_ms(self, task: Task, gb_per_s: float) -> float:
        """The time to read what a step reads."""
        rows = task.length + task.tokens / 2
        read: float = self.bytes + task.sequences * rows * CACHE_ROW * self.cache
        return read / gb_per_s / 1e6


def main() -> int:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7, help="turns of each system")
    options.add_argument("--remake", action="store_true", help="make our own models again")
    arguments = options.parse_args()
    rows, bounds = Rows(), Bounds(THREADS)
    # Before there are rivals, whose threads look for work for a while; often, as two threads may share a core at first.
    peaks = max(bounds.int8_tops(4) or 0.0 for _ in range(12)), max(bounds.float32_tflops() or 0.0 for _ in range(12))
    everyone = [*ours(), *rivals()]
    if arguments.remake:
        for path in MODELS.glob("*.packed"):
            path.unlink()
    if arguments.quick:
        everyone = [everyone[0], next(system for system in everyone if system.environment == "genai")]
    tasks = [SHORT] if arguments.quick else [SHORT, LONG, MIDDLE, FOUR]
    running: list[System] = []
    for system in everyone:
        try:
            system.open()
            running.append(system)
        except RivalError as error:
            _give_up(rows, system, error)
    measure(rows, bounds, peaks, running, tasks, rounds=3 if arguments.quick else arguments.rounds)
    if not arguments.quick:
        overhead(rows, running)
        lookup(rows, running)
    for system in running:
        assert system.rival is not None
        system.rival.close()
    return int(rows.finish(arguments.json))


def ours() -> list[System]:
    """graphwright: groups of 128 and 32; the cache in every way for the first."""
    return [_ours(group, cache) for group in (128, 32) for cache in (CACHES if group == 128 else ["float32"])]


def _ours(group: int, cache: str, width: int = HIDDEN) -> System:
    return System(
        name=f"{OURS} {version('graphwright')} INT4 g{group}, {cache} cache",
        group=group,
        cache=CACHES[cache],
        environment=OURS,
        requirements=[],
        worker="_ours_decode.py",
        source={"source": str(folder(width)), "group": group, "positions": POSITIONS},
        target=MODELS / f"graphwright-{width}-g{group}.packed",
        label=f"-{cache}",
        settings={"cache": cache},
    )


def rivals() -> list[System]:
    """All of them, with heads in INT4 like ours."""
    source = str(folder())
    found = []
    for group in (128, 32):
        found.append(
            System(
                name=f"{GENAI[0]} INT4 b{group}",
                group=group,
                bytes=WEIGHTS * (0.5 + 4 / group),  # its scales are fp32
                cache=4,
                environment="genai",
                requirements=GENAI,
                worker="_rival_genai.py",
                source={"source": source, "group": group},
                target=MODELS / f"genai-b{group}",
            )
        )
        # Groups of activations as it chooses them are faster where weights have groups of 32.
        dynamic = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128} if group == 128 else {}
        found.append(
            System(
                name=f"{OPENVINO[0]} INT4 g{group}",
                group=group,
                bytes=WEIGHTS * (0.5 + 2 / group),
                cache=1,
                environment="openvino-genai",
                requirements=OPENVINO,
                worker="_rival_openvino_genai.py",
                source={"source": source, "group": group},
                target=MODELS / f"openvino-g{group}",
                settings={"settings": dynamic},
            )
        )
    for kind in ("Q4_0", "Q4_K"):
        found.append(
            System(
                name=f"{LLAMACPP[0]} {kind}",
                group=32,
                bytes=WEIGHTS * 4.5 / 8,
                cache=2,
                environment="llamacpp",
                requirements=LLAMACPP,
                worker="_rival_llamacpp.py",
                source={"source": source, "type": kind},
                target=MODELS / f"llama-{kind}.gguf",
                build=LLAMACPP_BUILD,
            )
        )
    return found


def measure(
    rows: Rows,
    bounds: Bounds,
    peaks: tuple[float, float],
    running: list[System],
    tasks: Sequence[Task],
    rounds: int,
) -> None:
    """All tasks of all systems, in turns, and the targets."""
    read: list[float] = []
    for index in range(rounds):
        for task in tasks:
            for system in list(running):
                time.sleep(PAUSE)
                read.append(bounds.read_gb_per_s() or float("nan"))
                try:
                    system.run(task, seed=1 + index)
                except RivalError as error:
                    running.remove(system)
                    _give_up(rows, system, error)
    if not running:
        return
    bandwidth = statistics.median(read)
    int8, float32 = (peak or float("nan") for peak in peaks)
    for task in tasks:
        if task.tokens > 1:
            decoding(rows, running, task, bandwidth)
        if task.sequences == 1:
            prefill(rows, running, task, int8, float32)
    four(rows, running)
    resources(rows, running)


def decoding(rows: Rows, running: Sequence[System], task: Task, bandwidth: float) -> None:
    """A token after another."""
    case = f"decode, context {task.length}" + (f", {task.sequences} sequences" if task.sequences > 1 else "")
    for system in running:
        median, bound = 1e3 * statistics.median(system.steps[task]), system.bound_ms(task, bandwidth)
        found = {"gb_per_s": bandwidth * bound / median, "read_gb_per_s": bandwidth, "cosine": system.found["cosine"]}
        speed = 1e3 * task.sequences / median
        rows.add(case, system.name, median_ms=median, bound_ms=bound, tokens_per_s=speed, **found)
    if task.sequences > 1:
        return
    for group, ends in DECODE_TARGETS.items():
        mine = _ours_among(running, group)
        # Larger groups are less to read: against smaller ones of a rival they would have it easy.
        others = [system for system in running if not system.ours and (group == 128 or system.group == group)]
        if mine is None:
            continue
        if not others:
            rows.require(False, f"{case}, g{group}: nothing to compare with")
            continue
        median = statistics.median(mine.steps[task])
        share = mine.bound_ms(task, bandwidth) / median / 1e3
        if group == 128:
            text = f"{case}, g{group}: {share:.0%} of the read bandwidth, {BANDWIDTH_TARGET:.0%} wanted"
            rows.require(share >= BANDWIDTH_TARGET, text)
        wanted = float(np.interp(bandwidth, (50, 70), ends))
        fastest = min(others, key=lambda system: statistics.median(system.steps[task]))
        ratio = statistics.median(fastest.steps[task]) / median
        rows.add(case, f"{mine.name} over {fastest.name}", speedup=ratio)
        text = f"{case}, g{group}: {ratio:.2f} x the fastest rival, {wanted:.2f} wanted at {bandwidth:.0f} GB/s"
        rows.require(ratio >= wanted, text)


def prefill(rows: Rows, running: Sequence[System], task: Task, int8: float, float32: float) -> None:
    """From a prompt to the first token."""
    case = f"prefill, {task.length} tokens"
    linears = 2.0 * (task.length * (WEIGHTS - VOCABULARY * HIDDEN) + VOCABULARY * HIDDEN)
    attention = 2.0 * LAYERS * task.length**2 * HEADS * HEAD_SIZE
    bound = 1e-9 * (linears / int8 + attention / float32)
    for system in running:
        median = 1e3 * statistics.median(system.first[task])
        tops = (linears + attention) / median / 1e9
        rows.add(case, system.name, median_ms=median, bound_ms=bound, tops=tops, peak_tops=int8)
    for group in DECODE_TARGETS:
        mine = _ours_among(running, group)
        others = [system for system in running if not system.ours]
        if mine is None or task.length not in PREFILL_TARGETS:
            continue
        if not others:
            rows.require(False, f"{case}, g{group}: nothing to compare with")
            continue
        fastest = min(others, key=lambda system: statistics.median(system.first[task]))
        ratio = statistics.median(fastest.first[task]) / statistics.median(mine.first[task])
        rows.add(case, f"{mine.name} over {fastest.name}", speedup=ratio)
        wanted = PREFILL_TARGETS[task.length]
        rows.require(ratio >= wanted, f"{case}, g{group}: {ratio:.2f} x the fastest rival, {wanted} wanted")


def four(rows: Rows, running: Sequence[System]) -> None:
    """Tokens of four sequences in the time of those of one."""
    for system in running:
        if FOUR not in system.steps:
            continue
        ratio = 4 * statistics.median(system.steps[SHORT]) / statistics.median(system.steps[FOUR])
        rows.add("four sequences over one, tokens per second", system.name, ratio=ratio)
        if system.ours and system.cache == CACHES["float32"]:
            text = f"{system.name}: four sequences give {ratio:.2f} x the tokens of one, {FOUR_TARGET} wanted"
            rows.require(ratio >= FOUR_TARGET, text)


def resources(rows: Rows, running: Sequence[System]) -> None:
    """Memory and the time to the first token, of a file that the system has in memory."""
    for system in running:
        load, peak = system.found["load_ms"], system.found["peak_mb"]
        rows.add("load to first token", system.name, median_ms=load, from_start_ms=system.found["process_ms"])
        size, cache = _size(system.target) / 1e6, CAPACITY * CACHE_ROW * system.cache / 1e6
        bound = MEMORY_TARGET * (size + cache + MEMORY_BESIDES)
        rows.add("memory, one sequence", system.name, peak_mb=peak, model_mb=size, cache_mb=cache)
        if system.ours:
            rows.require(load <= LOAD_TARGET, f"{system.name}: {load:.0f} ms to the first token, {LOAD_TARGET} allowed")
            cosine = system.found["cosine"]
            rows.require(cosine >= COSINE_TARGET, f"{system.name}: a cosine of {cosine:.4f}, {COSINE_TARGET} wanted")
            rows.require(peak <= bound, f"{system.name}: a peak of {peak:.0f} MB, {bound:.0f} allowed")


def overhead(rows: Rows, running: Sequence[System]) -> None:
    """What of a step is not spent in kernels, of this model and of one of as many layers that holds next to nothing."""
    mine = _ours_among(running, 128)
    if mine is None or mine.rival is None:
        return
    small = _ours(32, "float32", width=HEAD_SIZE)
    try:
        found = mine.rival.ask("overhead", mine.name, steps=40)
        small.make()
        small.rival = small.start("narrow")
        options = {"threads": THREADS, "capacity": CAPACITY, **small.settings}
        small.rival.ask("load", small.name, model=str(small.target), **options)
        narrow = small.rival.ask("overhead", small.name, steps=400)
        small.rival.close()
    except RivalError as error:
        _give_up(rows, small, error, "overhead")
        return
    share = found["besides_us"] / found["step_us"]
    rows.add("overhead", mine.name, median_us=found["besides_us"], step_us=found["step_us"])
    text = f"overhead: {share:.2%} of the time of a token, {OVERHEAD_TARGET:.0%} allowed"
    rows.require(share <= OVERHEAD_TARGET, text)
    case, spent = f"overhead, {LAYERS} layers of width {HEAD_SIZE}", narrow["besides_us"]
    rows.add(case, small.name, median_us=spent, step_us=narrow["step_us"])
    rows.require(spent <= OVERHEAD_US, f"{case}: {spent:.0f} microseconds, {OVERHEAD_US:.0f} allowed")


def lookup(rows: Rows, running: Sequence[System], tokens: int = 128, rounds: int = 3) -> None:
    """Drafts looked up in a text that repeats itself, against one token after another."""
    mine = _ours_among(running, 128)
    if mine is None or mine.rival is None:
        return
    case, text = "prompt lookup, a text that repeats itself", [prompt(1)[0]]
    while len(text) < 2 * tokens:
        text.append(follower(text[-1]))
    times: dict[str | None, list[float]] = {None: [], "prompt-lookup": []}
    try:
        for _ in range(rounds):
            for draft, found in times.items():
                time.sleep(PAUSE)
                found.append(mine.rival.ask("lookup", mine.name, prompt=text, tokens=tokens, draft=draft))
    except RivalError as error:
        _give_up(rows, mine, error, case)
        return
    plain, drafted = (statistics.median(found) for found in times.values())
    rows.add(case, mine.name, median_ms=1e3 * drafted / tokens, plain_ms=1e3 * plain / tokens, speedup=plain / drafted)
    rows.require(plain >= LOOKUP_TARGET * drafted, f"{case}: {plain / drafted:.2f} x plain, {LOOKUP_TARGET} wanted")


def _ours_among(running: Sequence[System], group: int) -> System | None:
    """What the targets are for; none where it was not asked for, or has said why it does not run."""
    return next((system for system in running if system.ours and system.group == group), None)


def _give_up(rows: Rows, system: System, error: RivalError, case: str = "decoder") -> None:
    if system.rival is not None:
        system.rival.close()
    rows.add(case, system.name, error=str(error))
    if system.ours:
        rows.require(False, f"{case}: {system.name}: {error}")


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _read(path: Path) -> None:
    for file in _files(path):
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


if __name__ == "__main__":
    raise SystemExit(main())
