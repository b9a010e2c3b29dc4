"""The Triton kernels on a GPU: checked first, then timed beside torch, torch.compile, torchao and the GPU's limits.

Every case is compared with its reference in float64 first; one that is wrong is not timed. Times are medians of CUDA
graphs of many calls between events, on operands that take turns and that the L2 cache cannot hold. A rival that is not
installed, does not run or takes too long is a row that says why, and a target that speaks of it stays open, which
counts as missed. Takes at most eight minutes. Without a GPU it says so and exits with 2; exit code 1 when a check fails
or a target is missed.

    python benchmarks/gpu.py --json gpu.json        # pip install torchao first, for its rows

Configurations that ``python -m graphwright.backends.triton.tuning`` has chosen on this GPU are taken.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from _rows import Rows, parser
from torch.nn import functional

from graphwright.backends.triton import triton_status

HALF = torch.bfloat16
OURS = "graphwright"
# Seconds after which no further case is begun, and that a rival may take in all.
BUDGET, PATIENCE = 400, 75


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller for a dry run on another machine.

    Attributes:
        square: outputs and inputs of the linears that targets speak of.
        rows: many.
        shapes: of further linears, out and in: those of Llama 3 8B and 70B.
        linear_many: a further one with many rows.
        attention: head dim, tokens, causal.
        checked: tokens on which attention is checked.
        cache: positions that a step of attention reads.
        tokens, hidden, wide: of norms, rotation and gated activations.
        decoder: whose step is timed, after ``context`` tokens.
        decoder_checked: layers on which a step is checked.
    """

    square: int = 8192
    rows: int = 4096
    shapes: tuple[tuple[int, int], ...] = (
        *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
        *((10240, 8192), (57344, 8192), (8192, 28672)),
    )
    linear_many: tuple[int, int] = (4096, 14336)
    attention: tuple[tuple[int, int, bool], ...] = (
        *((128, 4096, True), (64, 4096, True), (128, 4096, False)),
        *((64, 16384, True), (128, 16384, True)),
    )
    checked: int = 512
    cache: int = 32768
    tokens: int = 16384
    hidden: int = 4096
    wide: int = 14336
    decoder: Any = None
    context: int = 1024
    decoder_checked: int = 2


SIZES = Sizes()
Cases = list[Callable[[], "Case"]]


@dataclass
class Case:
    """What is compared.

    Attributes:
        name: of the row.
        ours: calls whose operands take turns.
        check: largest error of the first, relative to the largest value, and its limit.
        bound_ms: the GPU's limit.
        share: of the limit that must be reached.
        rivals: makers of their calls by name; a maker may fail.
        ratios: rival -> how many times as fast as it we must be.
    """

    name: str
    ours: Sequence[Callable[[], object]]
    check: Callable[[], tuple[float, float]]
    bound_ms: float
    share: float
    rivals: dict[str, Callable[[], Sequence[Callable[[], object]]]] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference relative to the largest value; infinite where something is not finite."""
    worst = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    return float(worst) if bool(torch.isfinite(worst)) else float("inf")


def turns(call: Callable[..., object], operands: Sequence[tuple[Any, ...]]) -> list[Callable[[], object]]:
    """A call for each of the operands."""
    return [lambda given=each: call(*given) for each in operands]  # type: ignore[misc]


def nbits_cases(limits: Any, device: torch.device, sizes: Sizes, *, quick: bool) -> Cases:
    """W4A16, one row and many."""
    from _gpu_decode import random_weight
    from _gpu_timing import copies_of
    from _rival_gpu import torchao_linears

    from graphwright.backends.triton.kernels.linear_nbits import linear_nbits

    def made(rows: int, outputs: int, columns: int) -> Case:
        count = copies_of(outputs * columns // 2) if rows <= 16 else 2
        weights = [random_weight(outputs, columns, 128, device) for _ in range(count)]
        x = torch.randn(rows, columns, dtype=HALF, device=device)
        bound = max(limits.read_ms(weights[0].nbytes), limits.matmul_ms(rows * outputs * columns))

        def check() -> tuple[float, float]:
            few = x[:64]
            return error(linear_nbits(few, weights[0]), few.double() @ weights[0].dense(torch.float64).t()), 2e-2

        def bf16() -> Sequence[Callable[[], object]]:
            copies = max(2, count // 4)
            dense = [torch.randn(outputs, columns, dtype=HALF, device=device) for _ in range(copies)]
            return turns(functional.linear, [(x, each) for each in dense])

        rivals: dict[str, Callable[[], Sequence[Callable[[], object]]]] = {
            "torch bf16": bf16,
            "torchao int4": lambda: torchao_linears("int4", x, outputs, count),
        }
        if (outputs, columns) == (sizes.square, sizes.square):
            rivals["torchao int4 plain"] = lambda: torchao_linears("int4 plain", x, outputs, count)
        share, ratios = (0.8, {"torchao int4": 1.0}) if rows == 1 else (0.75 if rows > 16 else 0.0, {})
        name = f"W4A16 {rows} rows {outputs}x{columns}"
        return Case(name, turns(linear_nbits, [(x, w) for w in weights]), check, bound, share, rivals, ratios)

    square = sizes.square, sizes.square
    shapes = [(1, *square), (sizes.rows, *square)]
    if not quick:
        shapes += [(1, *shape) for shape in sizes.shapes] + [(16, *square), (sizes.rows, *sizes.linear_many)]
    return [lambda given=shape: made(*given) for shape in shapes]  # type: ignore[misc]


def integer_cases(limits: Any, device: torch.device, sizes: Sizes, *, quick: bool) -> Cases:
    """W8A8 in INT8 and FP8, activations rounded in the time that counts."""
    from _rival_gpu import torchao_linears

    from graphwright.backends.triton.kernels.epilogue import Epilogue
    from graphwright.backends.triton.kernels.linear_fp8 import linear_fp8
    from graphwright.backends.triton.kernels.linear_int8 import multiply_codes, round_rows, sums_of
    from graphwright.ir.ops.quantization import linear_int8_dynamic
    from graphwright.ir.ops.rounded_activations import linear_fp8_dynamic, linear_nbits_dynamic

    size, rows = sizes.square, sizes.rows
    x = torch.randn(rows, size, dtype=HALF, device=device)
    half = torch.randn(size, size, dtype=HALF, device=device)
    bound = limits.matmul_ms(rows * size * size) / 2  # 8-bit products are twice as fast
    bf16 = {"torch bf16": lambda: [lambda: functional.linear(x, half)] * 2}
    name = f"{rows} rows {size}x{size}"

    def int8(group: int) -> Case:
        codes = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
        shape = (size, size // group) if group else (size,)
        scales, sums = torch.rand(shape, device=device) / size, sums_of(codes)

        def ours(given: torch.Tensor = x) -> torch.Tensor:
            return multiply_codes(round_rows(given, group_size=group), codes, scales, sums, Epilogue(), HALF)

        def check() -> tuple[float, float]:
            few = x[:64]
            if not group:
                wanted = linear_int8_dynamic(few.float(), codes, scales, None, "per_token")
            else:
                packed = (codes.short() + 128).to(torch.uint8).unflatten(1, (-1, group))
                wanted = linear_nbits_dynamic(few.float(), packed, scales, None, None, 8, group, 8, "per_group")
            return error(ours(few), wanted), 1e-2

        def int_mm() -> Sequence[Callable[[], object]]:
            own = round_rows(x).codes
            return [lambda: torch._int_mm(own, codes.t())] * 2

        if group:
            return Case(f"W8A8 INT8, groups of {group}, {name}", [ours] * 2, check, bound, 0.0)
        rivals = {
            **bf16,
            "torch._int_mm, without scales": int_mm,
            "torchao int8": lambda: torchao_linears("int8", x, size, 2),
        }
        return Case(f"W8A8 INT8 {name}", [ours] * 2, check, bound, 0.0, rivals, {"torch bf16": 1.4})

    def fp8(group: int) -> Case:
        weight = torch.randn(size, size, device=device).to(torch.float8_e4m3fn)
        scales = torch.rand((size, size // group) if group else (size,), device=device) / size

        def check() -> tuple[float, float]:
            few, bytes_of = x[:64], weight.view(torch.uint8).unflatten(1, (-1, group or size))
            kind = "per_group" if group else "per_token"
            wanted = linear_fp8_dynamic(few.float(), bytes_of, scales.view(size, -1), None, group or size, kind)
            return error(linear_fp8(few, weight, scales), wanted), 1e-2

        def scaled() -> Sequence[Callable[[], object]]:
            own, column, row = (
                x.to(weight.dtype),
                torch.ones(rows, 1, device=device),
                torch.ones(1, size, device=device),
            )
            return [lambda: torch._scaled_mm(own, weight.t(), column, row, out_dtype=HALF)] * 2

        ours = [lambda: linear_fp8(x, weight, scales)] * 2
        if group:
            return Case(f"W8A8 FP8, groups of {group}, {name}", ours, check, bound, 0.0)
        rivals = {
            **bf16,
            "torch._scaled_mm, without rounding": scaled,
            "torchao fp8": lambda: torchao_linears("fp8", x, size, 2),
        }
        return Case(f"W8A8 FP8 {name}", ours, check, bound, 0.0, rivals, {"torch bf16": 1.4})

    if quick:
        return [lambda: int8(0)]
    has_fp8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    return [lambda: int8(0), *([lambda: fp8(0), lambda: fp8(128)] if has_fp8 else []), lambda: int8(128)]


def attention_cases(limits: Any, device: torch.device, sizes: Sizes, *, quick: bool) -> Cases:
    """Forward attention, and one step over a long cache."""
    from graphwright.backends.triton.kernels.attention import attention
    from graphwright.backends.triton.kernels.cached_attention import cached_attention
    from graphwright.ir.ops.attention import attention as reference
    from graphwright.ir.ops.cache import cached_attention as cached_reference

    def forward(width: int, length: int, causal: bool) -> Case:
        q, k, v = (torch.randn(1, 16, length, width, dtype=HALF, device=device) for _ in range(3))
        scale, macs = width**-0.5, 2 * 16 * length * length * width / (2 if causal else 1)

        def check() -> tuple[float, float]:
            query, key, value = (each[:, :2, -sizes.checked :] for each in (q, k, v))
            wanted = reference(query.double(), key.double(), value.double(), None, None, scale, causal, 0)
            return error(attention(query, key, value, None, scale, causal, 0), wanted), 2e-2

        def flash() -> Sequence[Callable[[], object]]:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            def call() -> object:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

            return [call] * 2

        name = f"attention head dim {width}, {length} tokens{', causal' * causal}"
        ours = [lambda: attention(q, k, v, None, scale, causal, 0)] * 2
        rival = "torch SDPA flash"
        return Case(name, ours, check, limits.matmul_ms(macs), 0.0, {rival: flash}, {rival: 0.9})

    def step() -> Case:
        length, width, sets = sizes.cache, 128, 4
        q = torch.randn(1, 32, 1, width, dtype=HALF, device=device)
        caches = [[torch.randn(1, 8, length, width, dtype=HALF, device=device) for _ in range(2)] for _ in range(sets)]
        slots, starts = torch.zeros(1, dtype=torch.int64, device=device), torch.full((1,), length - 1, device=device)

        def ours(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return cached_attention(q, keys, values, slots, starts, None, width**-0.5, 0, 0.0)

        def check() -> tuple[float, float]:
            wide = [each.double() for each in (q, *caches[0])]
            wanted = cached_reference(wide[0], wide[1], wide[2], slots, starts, None, width**-0.5, 0, 0.0)
            return error(ours(*caches[0]), wanted), 2e-2

        def sdpa() -> Sequence[Callable[[], object]]:
            def call(keys: torch.Tensor, values: torch.Tensor) -> object:
                return functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

            return turns(call, [tuple(each) for each in caches])

        bound = limits.read_ms(2 * caches[0][0].nbytes)
        return Case(
            f"decoding attention over {length}",
            turns(ours, [tuple(e) for e in caches]),
            check,
            bound,
            0.8,
            {"torch SDPA": sdpa},
        )

    wanted = sizes.attention[:1] if quick else sizes.attention
    return [step, *(lambda given=each: forward(*given) for each in wanted)]


def row_cases(limits: Any, device: torch.device, sizes: Sizes, *, quick: bool) -> Cases:
    """Norms, rotation and gated activation: as fast as a copy of what they read and write."""
    from graphwright.backends.triton.kernels import norms, pointwise
    from graphwright.backends.triton.kernels.rotary import rotary_embedding
    from graphwright.ir.ops.activation import gated_activation
    from graphwright.ir.ops.normalization import rms_norm
    from graphwright.ir.ops.position import rotary_embedding as rotary

    tokens, hidden, wide, sets = sizes.tokens, sizes.hidden, sizes.wide, 4

    def compiled(function: Callable[..., object], operands: Sequence[tuple[Any, ...]]) -> Any:
        def make() -> Sequence[Callable[[], object]]:
            quickened = torch.compile(function)
            return turns(quickened, operands)

        return {"torch.compile": make}

    def norm() -> Case:
        weight = torch.randn(hidden, dtype=HALF, device=device)
        given = [(torch.randn(tokens, hidden, dtype=HALF, device=device), weight, 1e-5) for _ in range(sets)]

        def check() -> tuple[float, float]:
            x = given[0][0]
            return error(norms.rms_norm(*given[0]), rms_norm(x.double(), weight.double(), 1e-5)), 1e-2

        bound = limits.copy_ms(2 * given[0][0].nbytes)
        return Case(
            f"RMS norm {tokens}x{hidden}", turns(norms.rms_norm, given), check, bound, 0.85, compiled(rms_norm, given)
        )

    def gated() -> Case:
        given = [tuple(torch.randn(tokens, wide, dtype=HALF, device=device) for _ in range(2)) for _ in range(2)]
        operands = [(*each, "silu") for each in given]

        def check() -> tuple[float, float]:
            few = [each[:256] for each in given[0]]
            wanted = gated_activation(few[0].double(), few[1].double(), "silu")
            return error(pointwise.gated_activation(few[0], few[1], "silu"), wanted), 1e-2

        bound = limits.copy_ms(3 * given[0][0].nbytes)
        ours = turns(pointwise.gated_activation, operands)
        return Case(f"gated SiLU {tokens}x{wide}", ours, check, bound, 0.85, compiled(gated_activation, operands))

    def rotation() -> Case:
        angle = torch.rand(1, tokens, 128, device=device)
        cos, sin = angle.cos().to(HALF), angle.sin().to(HALF)
        heads = [torch.randn(1, tokens, 32, 128, dtype=HALF, device=device).transpose(1, 2) for _ in range(sets)]
        given = [(each, cos, sin, False) for each in heads]

        def check() -> tuple[float, float]:
            wanted = rotary(heads[0].double(), cos.double(), sin.double(), False)
            return error(rotary_embedding(*given[0]), wanted), 1e-2

        bound = limits.copy_ms(2 * heads[0].nbytes + 2 * cos.nbytes)
        return Case(
            f"rotary {tokens}x32x128", turns(rotary_embedding, given), check, bound, 0.85, compiled(rotary, given)
        )

    return [norm] if quick else [norm, gated, rotation]


def decode_cases(limits: Any, device: torch.device, sizes: Sizes, *, quick: bool) -> Cases:
    """One token of a Llama-8B shape with random weights."""
    from _gpu_decode import OurStep, Shape, torch_step
    from _rival_gpu import torchao_config

    def made() -> Case:
        shape, context = sizes.decoder or Shape(), sizes.context
        ours = OurStep(shape, context, device)

        def check() -> tuple[float, float]:
            """A few layers against float64, then all of them for numbers that are finite."""
            few = OurStep(replace(shape, layers=sizes.decoder_checked), context, device)
            whole = ours()
            return max(error(few(), few.in_float64()), error(whole, whole)), 5e-2

        def torchao() -> Sequence[Callable[[], object]]:
            from torchao.quantization import quantize_

            config = torchao_config("int4", shape.group)
            model, inputs = torch_step(shape, context, device, lambda m: quantize_(m, config))
            quickened: Any = torch.compile(model, fullgraph=True)
            return [lambda: quickened(*inputs)]

        rival = "torchao int4 + torch.compile"
        bound = limits.read_ms(ours.nbytes)
        return Case("decode Llama-8B shape W4A16", [ours], check, bound, 0.7, {rival: torchao}, {rival: 1.2})

    return [] if quick else [made]


def run(
    case: Case, rows: Rows, time_of: Callable[[Sequence[Callable[[], object]]], float], patience: float = PATIENCE
) -> bool:
    """Check a case, then time it beside its rivals, each of which may take so many seconds; whether it was right."""
    from _rival_gpu import deadline

    worst, limit = case.check()
    if not worst <= limit:
        rows.require(False, f"{case.name}: relative error {worst:.2e} is above {limit:.0e}")
        return False
    ours = time_of(case.ours)
    share = case.bound_ms / ours
    rows.add(case.name, OURS, median_ms=ours, bound_ms=case.bound_ms, share_of_bound=share, relative_error=worst)
    rows.require(share >= case.share, f"{case.name}: {share:.0%} of the bound, not {case.share:.0%}")
    for name, make in case.rivals.items():
        try:
            with deadline(patience):
                theirs = time_of(make())
        except Exception as reason:  # whatever a rival raises is its row
            rows.add(case.name, named(name), failed=f"{type(reason).__name__}: {' '.join(str(reason).split())[:120]}")
            rows.require(name not in case.ratios, f"{case.name}: open, {name} did not run")
            continue
        rows.add(case.name, named(name), median_ms=theirs, bound_ms=case.bound_ms)
        wanted = case.ratios.get(name, 0.0)
        rows.require(theirs / ours >= wanted, f"{case.name}: {theirs / ours:.2f} × {name}, not {wanted:.2f} ×")
    return True


# What targets speak of comes first.
FAMILIES = (decode_cases, nbits_cases, attention_cases, row_cases, integer_cases)


def named(rival: str) -> str:
    """With its version."""
    package = rival.split()[0].split(".")[0]
    try:
        return f"{rival} ({package} {version(package)})"
    except PackageNotFoundError:
        return f"{rival} ({package} is not installed)"


def main() -> int:
    """The command line."""
    options = parser(__doc__).parse_args()
    status = triton_status()
    if not torch.cuda.is_available() or not status.available or status.interpreted:
        why = "torch sees no GPU" if status.available and not status.interpreted else status.message
        print(f"this benchmark needs a GPU: {why}", file=sys.stderr)
        return 2
    from _gpu_timing import Limits, median_ms

    from graphwright.backends.triton.tuning import load_choices

    device, started, rows = torch.device("cuda"), time.perf_counter(), Rows()
    tuned = load_choices(device)
    limits = Limits()
    name = torch.cuda.get_device_name(device)
    rows.add(
        "limits",
        name,
        copy_tb_per_s=limits.copy / 1e12,
        read_tb_per_s=limits.read / 1e12,
        matmul_tflops=2 * limits.matmul / 1e12,
        tuned_configurations=len(tuned),
    )
    makers: list[Callable[[], Case]] = []
    for family in FAMILIES:
        makers += family(limits, device, SIZES, quick=options.quick)
    for place, make in enumerate(makers):
        spent = time.perf_counter() - started
        if spent > BUDGET:
            rows.require(False, f"{BUDGET} s were spent before the last {len(makers) - place} cases had run")
            break
        run(make(), rows, median_ms, min(PATIENCE, BUDGET + PATIENCE - spent))
        torch.cuda.empty_cache()
        rows.write(options.json)
    return int(rows.finish(options.json))


if __name__ == "__main__":
    sys.exit(main())
