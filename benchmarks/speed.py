"""Pipelined decoding (SPEED) of decoders that repeat their layers, against ordinary decoding of deep and shallow ones.

    OMP_NUM_THREADS=1 python speed.py [--quick] [--json FILE] [--parts trained stages weights]

- ``trained``: the decoders that ``_shared_decoders.py`` trains on E2E, or the same shapes with random weights where
  there are none (their rows say so). Are the answers to all test prompts those of ordinary decoding, how often do
  predictions change, and how fast is it beside twelve separate layers and beside the shallow network of as many
  distinct ones?
- ``stages``: hidden 2048, feed-forward 5632, 4 distinct layers used 3 times. What a stage of 3 rows costs beside one of
  1; and the speedup over ordinary decoding where predictions are replayed: really run, then replaced by known ones that
  change as often as asked. ``bound_x`` is what the bytes read allow: (3 g + c) / (g + c) over the stages that flips
  cost, for g bytes of a group and c of the classifier, which both read once for each token. The time of replacing
  itself is left out: it is the benchmark's.
- ``weights``: bytes of the layers' weights beside those of as many separate layers, saved, packed, in memory and in
  ONNX.

Two systems that are compared run one after the other, many times; what is shown is the median of the ratios, which a
machine that others use disturbs least. With one thread the rows of ``stages`` have the ratios of processor time too
(``cpu_x_of_...``), which does not count the time that others had.
"""

from __future__ import annotations

import importlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _repeated_decoders import ReplayedPredictions, lowered, repeated_model
from _rows import Rows, parser

import graphwright as gw
from graphwright.frontends.generation.prompt_cache import PromptCache

PARTS = ("trained", "stages", "weights")
SMALL = {"vocabulary": 1024, "hidden": 256, "feed_forward": 512, "heads": 4}
WIDE = {"hidden": 2048, "feed_forward": 5632, "heads": 32, "tied": False}  # a tied head is not quantised
SHAPES = {"4x3": (4, 3), "2x6": (2, 6), "3x4": (3, 4)}
PAPER = {"2x6": "13-17", "4x3": "6-14"}  # percent of predictions that change after the first group


def main() -> int:
    """Run the parts that are asked for."""
    options = parser(__doc__)
    options.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    given = options.parse_args()
    rows = Rows()
    for part in given.parts:
        {"trained": trained, "stages": stages, "weights": weights}[part](rows, given.quick)
        rows.write(given.json)
    return int(rows.finish(given.json))


# -- trained decoders --------------------------------------------------------------------------------------------------


def trained(rows: Rows, quick: bool) -> None:
    """Answers, flips and speed of the small decoders."""
    deep, deep_kind = _small("12x1")
    prompts, end = _prompts(quick)
    given: dict[str, Any] = {"max_new_tokens": 56, "stop_tokens": end, "batch_size": 1}
    for name in ["4x3"] if quick else SHAPES:
        groups, _ = SHAPES[name]
        shared, kind = _small(name)
        shallow, _ = _small(f"{groups}x1")
        wanted = shared.generate(prompts, **given)
        found = shared.generate(prompts, pipeline=True, **given)
        differ = sum(a != b for a, b in zip(wanted.tokens, found.tokens, strict=True))
        made = found.pipeline
        rows.add(
            f"{name} on E2E, {kind}: {len(prompts)} test prompts",
            "pipelined",
            answers_that_differ=differ,
            first_flip_percent=100 * made.first_flip_rate,
            paper_first_flip_percent=PAPER.get(name),
            flip_percent_by_repetition="/".join(f"{100 * each:.1f}" for each in made.flip_rates),
            tokens_per_stage=made.tokens_per_stage,
            occupancy=made.occupancy,
        )
        rows.require(differ == 0, f"{name}: {differ} answers differ from ordinary decoding's")
        systems: dict[str, tuple[Any, bool]] = {
            f"12 separate layers, {deep_kind}": (deep, False),
            f"{groups} layers": (shallow, False),
            f"{name} ordinary": (shared, False),
            f"{name} pipelined": (shared, True),
        }
        rates: dict[str, list[float]] = {system: [] for system in systems}
        for prompt in prompts[: 20 if quick else 100]:
            answers = {
                system: decoder.generate([prompt], pipeline=pipeline, **given)
                for system, (decoder, pipeline) in systems.items()
            }
            if min(answer.counts.new_tokens for answer in answers.values()) < 4:
                continue  # too short to time
            for system, answer in answers.items():
                rates[system].append(answer.counts.rate)
        baseline, network, _, ours = rates
        for system in systems:
            rows.add(
                f"{name} on E2E, {kind}: speed",
                system,
                tokens_per_s=statistics.median(rates[system]),
                x_of_12_layers=_ratio(rates[system], rates[baseline]),
                x_of_shallow=_ratio(rates[system], rates[network]),
            )
        if name == "4x3" and made.first_flip_rate <= 0.14:
            gained, close = _ratio(rates[ours], rates[baseline]), _ratio(rates[ours], rates[network])
            rows.require(gained >= 2.5, f"4x3: {gained:.2f} x the 12-layer baseline instead of 2.5")
            rows.require(close >= 0.75, f"4x3: {close:.2f} x the shallow network instead of 0.75")


def _small(name: str) -> tuple[Any, str]:
    """A decoder on the CPU, and whether it is trained."""
    step, kind = _trained_step(name), "trained"
    if step is None:
        groups, repeats = map(int, name.split("x"))
        step, kind = gw.load_decoder(repeated_model(groups, repeats, **SMALL), check=False), "random weights"
    return gw.optimize(step, [gw.PrepareDecoder(length=512)], target="cpu", verify=False), kind


def _trained_step(name: str) -> Any:
    """The step that ``_shared_decoders.py`` has trained, if it has."""
    try:
        return importlib.import_module("_shared_decoders").trained_step(name)
    except (ModuleNotFoundError, SystemExit) as reason:
        print(f"{name}: random weights, because {reason}", flush=True)
        return None


def _prompts(quick: bool) -> tuple[list[list[int]], list[int]]:
    """E2E's test prompts in the trained decoders' tokens, and the token that ends an answer."""
    try:
        task = importlib.import_module("_shared_decoders").SmallE2e(quick=False)
    except ModuleNotFoundError:
        random = torch.Generator().manual_seed(0)
        return torch.randint(0, SMALL["vocabulary"], (20, 30), generator=random).tolist(), []
    found = [each.prompt for each in task._read("testset_w_refs.csv")]
    return found[::16] if quick else found, [task.end]


# -- stages at 1.1 B width ---------------------------------------------------------------------------------------------


def stages(rows: Rows, quick: bool) -> None:
    """What stages cost, and what replayed predictions gain."""
    cases = [("INT4", 1024)] if quick else [("INT4", 1024), ("FP32", 1024), ("INT4", 32000)]
    for kind, vocabulary in cases:
        decoder = lowered(repeated_model(4, 3, vocabulary=vocabulary, **WIDE), kind)
        title = f"2048 wide, 4x3, {kind}, {vocabulary} tokens"
        _stage_costs(rows, title, decoder, 40 if quick else 100)
        pairs = 3 if kind == "FP32" else 7  # a pair takes 15 seconds in FP32
        for flips in (0.05,) if quick else (0.0, 0.05, 0.10, 0.15):
            for until in (1,) if quick or flips == 0 or kind == "FP32" else (1, 2):
                _replayed(rows, title, decoder, flips, until, pairs)


def _stage_costs(rows: Rows, title: str, decoder: Any, count: int) -> None:
    session = decoder.pipeline_session(slots=1, capacity=64)

    def run(number: int) -> tuple[float, float]:
        given = (
            torch.full((number, 1), 3),
            torch.zeros(number, 1, session.width),
            torch.arange(number),
            torch.zeros(number, dtype=torch.int64),
            torch.full((number,), 32),
            torch.zeros(number, 1, dtype=torch.int64),
        )
        start, spent = time.perf_counter(), time.process_time()
        session.stage(*given)
        return time.perf_counter() - start, time.process_time() - spent

    for number in (1, 2, 3):
        run(number)
    seconds: dict[int, list[float]] = {number: [] for number in (1, 2, 3)}
    processor: dict[int, list[float]] = {number: [] for number in (1, 2, 3)}
    for _ in range(count):
        for number in seconds:
            passed, spent = run(number)
            seconds[number].append(passed)
            processor[number].append(spent)
    costs = {number: _ratio(found, seconds[1]) for number, found in seconds.items()}
    for number, found in seconds.items():
        rows.add(
            f"{title}: stage of {number} rows",
            "graphwright",
            median_ms=1e3 * statistics.median(found),
            x_of_one_row=costs[number],
            **_alone("cpu_x_of_one_row", processor[number], processor[1]),
        )
    rows.require(costs[3] <= 1.15, f"{title}: a stage of 3 rows costs {costs[3]:.3f} x one row instead of 1.15")


def _replayed(rows: Rows, title: str, decoder: Any, flips: float, until: int, pairs: int) -> None:
    tokens, prompt = 128, [5, 6, 7, 8]
    ordinary, pipelined, made = list[float](), list[float](), None
    processor: tuple[list[float], list[float]] = [], []
    plain = decoder.prompt_cache(capacity=144)
    inner = decoder.pipeline_session(slots=1, capacity=144)
    replays = ReplayedPredictions(inner, flips, until)
    replayed = PromptCache(replays, decoder)
    given: dict[str, Any] = {"max_new_tokens": tokens, "stop_tokens": []}
    for pair in range(-1, pairs):
        times = [time.process_time()]
        first = decoder.generate([prompt], cache=plain, **given)
        times.append(time.process_time())
        replays.replacing_seconds = 0.0
        second = decoder.generate([prompt], cache=replayed, pipeline=True, **given)
        times.append(time.process_time())
        if pair >= 0:  # the first brings weights and plans into place
            ordinary.append(first.counts.rate)
            counts, replacing = second.counts, replays.replacing_seconds
            pipelined.append((counts.new_tokens - counts.first_tokens) / (counts.seconds - replacing))
            processor[0].append(times[1] - times[0])
            processor[1].append(times[2] - times[1] - replacing)
        made = second.pipeline
    assert made is not None
    group, head = _bytes(decoder)
    speedup = _ratio(pipelined, ordinary)
    rows.add(
        f"{title}: replayed predictions, {100 * flips:g} % wrong for {until} repetitions",
        "pipelined",
        tokens_per_s=statistics.median(pipelined),
        x_of_ordinary=speedup,
        **_alone("cpu_x_of_ordinary", *processor),
        bound_x=(3 * group + head) / (group + head) * made.tokens_per_stage,
        first_flip_percent=100 * made.first_flip_rate,
        tokens_per_stage=made.tokens_per_stage,
    )
    if flips == 0.05 and until == 1 and head < group / 8:
        rows.require(speedup >= 2.6, f"{title}: {speedup:.2f} x at 5 % flips instead of 2.6")


def _bytes(decoder: Any) -> tuple[int, int]:
    """Bytes of the packed weights of a group of layers, and of the classifier."""
    sizes = {"head": 0, "layers": 0}
    seen: set[int] = set()
    logits = decoder._executable.program.output.args[0][0]
    for node, call in decoder._executable.lowered.calls.items():
        packed = getattr(call.kernel, "packed", None)
        if packed is None or id(packed) in seen:
            continue
        seen.add(id(packed))
        tensors = [value for value in vars(packed).values() if isinstance(value, torch.Tensor)]
        owner = "head" if node is logits else "layers"
        sizes[owner] += sum(each.nbytes for each in tensors)
    return sizes["layers"], sizes["head"]


# -- bytes -------------------------------------------------------------------------------------------------------------


def weights(rows: Rows, quick: bool) -> None:
    """Bytes of weights, the table of embeddings left out, which is the classifier too and not in a layer."""
    names = ["4x3"] if quick else list(SHAPES)
    deep = _sizes(repeated_model(12, 1, **SMALL))
    for name in names:
        groups, repeats = SHAPES[name]
        for place, size in _sizes(repeated_model(groups, repeats, **SMALL)).items():
            ratio = size / deep[place]
            rows.add(f"{name}: layers' weights {place}", "graphwright", mb=size / 2**20, x_of_separate=ratio)
            # Headers, norms and tables of positions are small but not nothing.
            good = abs(ratio - 1 / repeats) <= 0.02
            rows.require(good, f"{name}: layers {place} take {ratio:.3f} of separate ones, not 1/{repeats}")


def _sizes(model: Any) -> dict[str, int]:
    decoder: Any = gw.optimize(
        gw.load_decoder(model, check=False), [gw.PrepareDecoder(length=64)], target="cpu", verify=False
    )
    table = SMALL["vocabulary"] * SMALL["hidden"] * 4
    found = {"in memory": sum(each.nbytes for each in decoder.tensors().values()) - table}
    found["as kernels have them"] = _bytes(decoder)[0]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        decoder.save(base / "program")
        decoder.save_packed(base / "packed")
        decoder.export_onnx(base / "step.onnx")
        found["saved"] = (base / "program" / "model.safetensors").stat().st_size - table
        # The packed file has the table of embeddings, and the classifier once more as its kernel wants it.
        found["saved packed"] = (base / "packed").stat().st_size - 2 * table
        found["in ONNX"] = sum(each.stat().st_size for each in base.glob("step.onnx*")) - table
    return found


def _alone(name: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The ratio of processor times, where only one thread computes: others look for work, which counts."""
    return {name: _ratio(ours, theirs)} if torch.get_num_threads() == 1 else {}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of what neighbouring runs gave."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
