"""The C++ decoding step of attention: caches and results right to derived bounds on every instruction set."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from graphwright.backends.cpu import features, native_status
from graphwright.backends.cpu.kernels.decoder_attention import DecoderAttention
from graphwright.ir.errors import BackendError
from graphwright.ir.ops.cache import cached_attention
from graphwright.ir.ops.position import rotary_embedding

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)

UNIT = 2.0**-24
NAN = float("nan")


def isas() -> list[str]:
    return [isa.name for isa in features().instruction_sets if isa.usable and isa.name in ("scalar", "avx2", "avx512")]


@dataclass(frozen=True)
class Case:
    """Sizes of a step, and what attention adds to its scores."""

    starts: tuple[int, ...]
    length: int = 1
    key_heads: int = 2
    groups: int = 1
    width: int = 16
    value_width: int = 0  # 0: like width
    rotated: int = 0
    interleaved: bool = False
    window: int = 0
    softcap: float = 0.0
    slopes: bool = False
    stored: torch.dtype = torch.float32

    @property
    def capacity(self) -> int:
        """With room beyond what is written."""
        return max(self.starts) + self.length + 3


# Around tiles of 6 rows, blocks of 128 keys, parts of 256 and 64 rows; every stored type, few rows and many.
CASES = [
    Case((0,)),
    Case((0,), width=1, key_heads=1),
    Case((0, 1), length=2, width=8, rotated=8),
    Case((31, 0, 128), length=3, groups=2, width=33, value_width=20, rotated=8),
    Case((127,), length=2, groups=8, width=64, rotated=64),
    Case((128, 129), groups=8, width=64, rotated=64),
    Case((500, 3), groups=8, width=64, rotated=32, interleaved=True),
    Case((255,), groups=8, width=80, value_width=33, rotated=64, stored=torch.bfloat16),
    Case((256, 0), groups=2, width=128, rotated=128, stored=torch.bfloat16),
    Case((500,), groups=8, width=64, rotated=64, stored=torch.int8),
    Case((254, 509, 0, 31), length=5, key_heads=1, groups=2, width=64, rotated=64),
    Case((254, 509), length=5, key_heads=1, groups=8, width=33, stored=torch.int8),
    Case((250,), length=8, groups=1, width=64, rotated=64, stored=torch.bfloat16),
    Case((129, 500), length=8, groups=8, width=64, rotated=64, window=100),
    Case((129, 500), length=1, groups=4, width=64, rotated=64, window=100),
    Case((700,), length=1, key_heads=1, groups=3, width=24, window=1),
    Case((300, 1), length=2, groups=4, width=16, window=700, softcap=2.0),
    Case((300, 1), length=2, groups=4, width=16, slopes=True),
    Case((31,), length=17, groups=8, width=64, rotated=64),
    Case((0, 127), length=17, groups=8, width=80, value_width=40, rotated=20, interleaved=True, stored=torch.int8),
    Case((129,), length=65, key_heads=1, groups=1, width=128, rotated=64, stored=torch.bfloat16),
    Case((0,), length=150, groups=2, width=33, rotated=32, window=40),
    Case((40,), length=150, groups=2, width=64, rotated=64, softcap=5.0, slopes=True),
    Case((500,), length=100, key_heads=1, groups=3, width=8, rotated=8, stored=torch.int8),
    Case((9000, 10), groups=2, key_heads=1, width=8, rotated=8),  # parts are larger than others
]


@dataclass
class Step:
    """Tensors of a case, views into something wider as linears write them, and caches with NaN beyond the tokens."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    slopes: torch.Tensor | None
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None
    before: list[torch.Tensor] = field(default_factory=list)

    def caches(self) -> list[torch.Tensor]:
        """All that a step may write to."""
        both = [self.keys, self.values, self.key_scales, self.value_scales]
        return [x for x in both if x is not None]

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they are stored, in float64."""
        keys, values = self.keys.double(), self.values.double()
        if self.key_scales is not None and self.value_scales is not None:
            return keys * self.key_scales.double()[..., None], values * self.value_scales.double()[..., None]
        return keys, values


def step_of(case: Case, seed: int = 0) -> Step:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    batch, heads, value_width = len(case.starts), case.key_heads * case.groups, case.value_width or case.width
    widths = [heads * case.width, case.key_heads * case.width, case.key_heads * value_width]
    joint = normal(batch, case.length, sum(widths))
    parts = joint.split(widths, dim=-1)
    query, key, value = (
        part.unflatten(-1, (count, -1)).transpose(1, 2)
        for part, count in zip(parts, (heads, case.key_heads, case.key_heads), strict=True)
    )
    cos = sin = None
    if case.rotated:
        angles = torch.rand(1 if batch == 2 else batch, case.length, case.rotated, generator=generator) * 100
        cos, sin = angles.cos(), angles.sin()
    slots = torch.randperm(batch + 2, generator=generator)[:batch]
    shape = (batch + 2, case.key_heads, case.capacity)
    keys, values = normal(*shape, case.width), normal(*shape, value_width)
    scales: list[torch.Tensor | None] = [None, None]
    if case.stored == torch.int8:
        keys, values = ((x * 40).round().clamp(-127, 127) for x in (keys, values))
        both = [torch.rand(shape, generator=generator) / 40 + 0.01 for _ in range(2)]
        for scale, (slot, start) in itertools.product(both, zip(slots, case.starts, strict=True)):
            scale[slot, :, start:] = NAN
        scales = [*both]
    else:
        for cache, (slot, start) in itertools.product((keys, values), zip(slots, case.starts, strict=True)):
            cache[slot, :, start:] = NAN
    slopes = torch.rand(heads, generator=generator) / 4 if case.slopes else None
    step = Step(
        *(query, key, value, cos, sin, keys.to(case.stored), values.to(case.stored)),
        *(slots, torch.tensor(case.starts), slopes, *scales),
    )
    step.before = [x.clone() for x in step.caches()]
    return step


def kernel_of(case: Case, isa: str, slopes: torch.Tensor | None) -> DecoderAttention:
    return DecoderAttention(isa, case.width**-0.5, case.window, case.softcap, slopes, case.interleaved)


def run(case: Case, step: Step, isa: str) -> torch.Tensor:
    found: torch.Tensor = kernel_of(case, isa, step.slopes)(
        *(step.query, step.key, step.value, step.cos, step.sin, step.keys, step.values),
        *(step.key_scales, step.value_scales, step.slots, step.starts),
    )
    return found


def turned(case: Case, step: Step, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, and the sum of the sizes of the two products in each feature."""
    x = x.double()
    if step.cos is None or step.sin is None:
        return x, x.abs()
    exact = rotary_embedding(x, step.cos.double(), step.sin.double(), case.interleaved)
    # A turned pair is (-b, a): of sizes with a negative sine, the first member is a sum; of a positive one, the second.
    cos, sin = step.cos.double().abs(), step.sin.double().abs()
    sums = [rotary_embedding(x.abs(), cos, sign * sin, case.interleaved) for sign in (1, -1)]
    return exact, torch.maximum(*sums)


def expected(case: Case, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64 on the caches as they are after the step, and how far a float32 one may be from it.

    The bound of ``test_cpu_attention.expected``, where it is derived, with three roundings more for a turned query,
    whose sizes are sums of two products; a dozen for a softcap (a quotient, tanh, a product), whose slope is at most
    1; and what slopes add to the size of a score, which is rounded three times.
    """
    query, sizes = turned(case, step, step.query)
    keys, values = step.exact()
    scale, rest = case.width**-0.5, (case.window, case.softcap)
    where = step.slots, step.starts
    slopes = None if step.slopes is None else step.slopes.double()
    wanted = cached_attention(query, keys, values, *where, slopes, scale, *rest)
    weighted = cached_attention(query, keys, values.abs(), *where, slopes, scale, *rest)
    written = torch.arange(case.capacity) < (step.starts + case.length)[:, None]
    own = keys[step.slots].abs().masked_fill(~written[:, None, :, None], 0.0)
    largest = scale * sizes @ own.repeat_interleave(case.groups, dim=1).transpose(-1, -2)
    if slopes is not None:
        reach = torch.arange(case.capacity) - step.starts[:, None]
        reach = reach.abs().masked_fill(~written, 0) + case.length
        largest = largest + slopes.view(1, -1, 1, 1) * reach[:, None, None, :]
    most = largest.amax(-1, keepdim=True)
    count = max(case.starts) + case.length
    roundings = case.width + 6 + 4 + 3 + (12 if case.softcap else 0)
    relative = UNIT * (roundings * most + count + 5 * -(-count // 128) + 6)
    return wanted, 2.01 * relative * weighted + 1e-36


def expect_caches(case: Case, step: Step) -> None:
    """New rows are in their places, rounded as they are stored; all else is what it was, to the last bit."""
    is_new = torch.zeros(step.keys.shape[0], 1, case.capacity, dtype=torch.bool)
    for slot, start in zip(step.slots, case.starts, strict=True):
        is_new[slot, :, start : start + case.length] = True
    for before, after in zip(step.before, step.caches(), strict=True):
        kept = ~is_new.view(is_new.shape + (1,) * (after.dim() - 3)).expand(after.shape)
        bits = {4: torch.int32, 2: torch.int16, 1: torch.int8}[after.element_size()]
        assert torch.equal(before.view(bits)[kept], after.view(bits)[kept])
    for cache, scales, (exact, sizes), is_turned in (
        (step.exact()[0], step.key_scales, turned(case, step, step.key), step.cos is not None),
        (step.exact()[1], step.value_scales, (step.value.double(), step.value.double().abs()), False),
    ):
        for row, (slot, start) in enumerate(zip(step.slots, case.starts, strict=True)):
            place = slice(start, start + case.length)
            bound = 3 * UNIT * sizes[row] if is_turned else torch.zeros_like(sizes[row])
            if case.stored == torch.bfloat16:
                bound = bound + 2.0**-8 * (exact[row].abs() + bound)
            if scales is not None:
                top = exact[row].abs().amax(-1)
                torch.testing.assert_close(scales[slot, :, place].double(), top / 127, rtol=1e-6, atol=0.0)
                bound = bound + 0.501 * top[..., None] / 127
            assert ((cache[slot, :, place] - exact[row]).abs() <= bound).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("isa", isas())
def test_a_step(case: Case, isa: str) -> None:
    step = step_of(case)
    found = run(case, step, isa)
    expect_caches(case, step)
    wanted, bound = expected(case, step)
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    assert found.transpose(1, 2).is_contiguous()
    assert ((found.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("isa", isas())
def test_every_length_start_and_width(isa: str) -> None:
    lengths, starts, widths = (1, 2, 3, 5, 8, 17), (0, 1, 31, 127, 128, 129, 500), (1, 8, 33, 64, 80, 128)
    stored = (torch.float32, torch.bfloat16, torch.int8)
    for index, (length, start, width) in enumerate(itertools.product(lengths, starts, widths)):
        case = Case(
            (start, (start + 40) % 130)[: 1 + index % 2],
            length,
            1 + index % 3 % 2,
            (1, 2, 8)[index % 3],
            width,
            rotated=min(width // 2 * 2, (0, 2, 128)[index // 2 % 3]),
            interleaved=index % 5 == 0,
            window=(0, 0, 33)[index // 3 % 3],
            stored=stored[index // 5 % 3],
        )
        step = step_of(case, index)
        found = run(case, step, isa)
        expect_caches(case, step)
        wanted, bound = expected(case, step)
        assert ((found.double() - wanted).abs() <= bound).all(), case


@pytest.mark.parametrize("isa", isas())
def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for case in CASES:
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                step = step_of(case)
                found = run(case, step, isa)
                results.append([found, *(x.nan_to_num(7.0) for x in step.caches())])
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), case
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", isas())
def test_a_row_does_not_depend_on_the_others(isa: str) -> None:
    for case in CASES:
        step = step_of(case)
        together = run(case, step, isa)
        for row, start in enumerate(case.starts):
            alone, own = replace(case, starts=(start,)), slice(row, row + 1)
            one = step_of(case)
            for name in ("query", "key", "value", "slots", "starts"):
                setattr(one, name, getattr(one, name)[own])
            if one.cos is not None and one.sin is not None and len(one.cos) > 1:
                one.cos, one.sin = one.cos[own], one.sin[own]
            assert torch.equal(run(alone, one, isa), together[own]), case


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("isa", isas())
def test_tokens_one_by_one_are_tokens_at_once(isa: str, stored: torch.dtype) -> None:
    case = Case((120,), length=20, groups=4, width=64, rotated=64, stored=stored)
    whole, steps = step_of(case), step_of(case)
    wanted = run(case, whole, isa)
    for index in range(case.length):
        one = slice(index, index + 1)
        assert steps.cos is not None
        assert steps.sin is not None
        found = kernel_of(case, isa, None)(
            *(x[:, :, one] for x in (steps.query, steps.key, steps.value)),
            *(steps.cos[:, one], steps.sin[:, one], steps.keys, steps.values, steps.key_scales, steps.value_scales),
            *(steps.slots, steps.starts + index),
        )
        torch.testing.assert_close(found, wanted[:, :, one], rtol=1e-5, atol=1e-5)
    for a, b in zip(whole.caches(), steps.caches(), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("isa", isas())
def test_values_that_are_not_finite(isa: str) -> None:
    for stored in (torch.float32, torch.bfloat16, torch.int8):
        case = Case((40,), length=1, groups=2, width=20, stored=stored)
        step = step_of(case)
        wanted = run(case, step, isa)
        step = step_of(case)
        step.value[0, 1, 0, 3] = NAN
        found = run(case, step, isa)
        assert torch.equal(found[:, :2], wanted[:, :2]), "one head spoils its own group only"
        assert found[:, 2:, :, 3].isnan().all()
        step = step_of(case)
        step.key[0, 1, 0, 3] = NAN
        assert run(case, step, isa)[:, 2:].isnan().all()


def test_caches_of_every_layout() -> None:
    for stored in (torch.float32, torch.bfloat16, torch.int8):
        case, isa = Case((40, 7), length=3, groups=2, width=24, rotated=24, stored=stored), isas()[-1]
        step = step_of(case)
        wanted = run(case, step, isa)
        other = step_of(case)
        other.keys, other.values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (other.keys, other.values))
        if other.key_scales is not None and other.value_scales is not None:
            scales = (other.key_scales, other.value_scales)
            other.key_scales, other.value_scales = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in scales)
        other.query = other.query.contiguous()
        assert torch.equal(run(case, other, isa), wanted)
        assert torch.equal(other.keys.nan_to_num(7.0), step.keys.nan_to_num(7.0))


def test_nothing_to_do() -> None:
    case = Case((3, 5), length=2)
    for isa in isas():
        step = step_of(case)
        kernel = kernel_of(case, isa, None)
        empty = [x[:0] for x in (step.query, step.key, step.value)]
        rest = (None, None, step.keys, step.values, None, None)
        assert kernel(*empty, *rest, step.slots[:0], step.starts[:0]).shape == (0, 2, 2, 16)
        short = [x[:, :, :0] for x in (step.query, step.key, step.value)]
        assert kernel(*short, *rest, step.slots, step.starts).shape == (2, 2, 0, 16)
        assert torch.equal(step.keys.nan_to_num(7.0), step.before[0].nan_to_num(7.0))


def test_what_does_not_fit() -> None:
    case = Case((3, 5), length=2, groups=2, rotated=8)
    step = step_of(case)
    given: dict[str, Any] = {name: getattr(step, name) for name in DecoderAttention.inputs}
    codes = torch.zeros(step.keys.shape, dtype=torch.int8)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"slots": torch.tensor([0, 4])}, "row 1 is in slot 4 of a cache that has 4"),
        ({"slots": torch.tensor([-1, 2])}, "row 0 is in slot -1"),
        ({"slots": torch.tensor([2, 2])}, "rows 0 and 1 are both in slot 2"),
        ({"starts": torch.tensor([0, 9])}, "row 1 begins at position 9 and brings 2 tokens to a cache of capacity 10"),
        ({"starts": torch.tensor([-1, 0])}, "row 0 begins at position -1"),
        ({"slots": torch.tensor([0, 1], dtype=torch.int32)}, "takes float32, int8, int64"),
        ({"slots": torch.tensor([0])}, "slots must be int64"),
        ({"starts": torch.tensor([0])}, "starts must be int64"),
        ({"query": step.query[0]}, "must have four axes"),
        ({"query": step.query[:, :3]}, "multiple of key heads"),
        ({"query": step.query[..., :7]}, "key does not fit"),
        ({"key": step.key[:, :, :1]}, "key does not fit"),
        ({"value": step.value[:, :1]}, "value does not fit"),
        ({"values": step.values[:, :, :4]}, "values do not fit keys"),
        ({"values": step.values.to(torch.bfloat16)}, "values do not fit keys"),
        ({"keys": step.keys.double()}, "caches must be float32, bfloat16 or int8"),
        ({"keys": step.keys.to("meta")}, "on meta"),
        ({"keys": codes, "values": codes}, "bytes need scales"),
        ({"key_scales": torch.ones(4, 2, 10), "value_scales": torch.ones(4, 2, 10)}, "only bytes have scales"),
        ({"cos": None}, "cos and sin belong together"),
        ({"cos": torch.zeros(3, 2, 8)}, r"cos must be \[batch or 1"),
        ({"cos": torch.zeros(1, 2, 7)}, r"cos must be \[batch or 1"),
        ({"sin": torch.zeros(1, 2, 6)}, "sin does not fit cos"),
    ]
    kernel = kernel_of(case, "scalar", None)
    for changes, message in bad:
        with pytest.raises(BackendError, match=message):
            kernel(*{**given, **changes}.values())
    with pytest.raises(BackendError, match="one slope for each query head"):
        kernel_of(case, "scalar", torch.ones(3))(*given.values())
    for options in ({"window": -1}, {"softcap": -1.0}):
        with pytest.raises(ValueError, match="must not be negative"):
            DecoderAttention("scalar", 1.0, **options)


def test_the_label_names_the_instruction_set() -> None:
    assert kernel_of(Case((0,)), isas()[-1], None).label == f"decoder_attention {isas()[-1]} (float32, flash)"
