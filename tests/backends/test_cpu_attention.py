"""The C++ attention and softmax: right to a derived bound on every instruction set, and the same for any threads."""

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.backends.cpu import features, native_status
from graphwright.backends.cpu.kernels.attention import Attention, Softmax, TorchAttention
from graphwright.ir.errors import BackendError
from graphwright.ir.ops.attention import attention

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)

UNIT = 2.0**-24
NAN, INF = float("nan"), float("inf")


def isas() -> list[str]:
    return [isa.name for isa in features().instruction_sets if isa.usable and isa.name in ("scalar", "avx2", "avx512")]


@dataclass(frozen=True)
class Case:
    """Sizes and masks of one attention."""

    queries: int
    keys: int
    width: int
    value_width: int
    batch: int = 1
    key_heads: int = 1
    groups: int = 1
    causal: bool = False
    window: int = 0
    mask: str = ""
    bias: tuple[int, int, int, int] | None = None  # axes it has
    is_bool: bool = False
    stored: torch.dtype = torch.float32


# Around tiles of 6 rows, blocks of 128 keys and parts of 256; every path: few rows and many, whole and partial vectors.
CASES = [
    Case(1, 1, 1, 1),
    Case(2, 5, 3, 3, batch=2, mask="some"),
    Case(5, 5, 16, 16, causal=True),
    Case(6, 64, 64, 64, key_heads=2),
    Case(7, 13, 33, 16, batch=2, groups=2, causal=True, mask="some"),
    Case(13, 7, 16, 33, causal=True),
    Case(63, 63, 80, 80, causal=True, window=5),
    Case(64, 65, 64, 64, batch=3, groups=3, mask="one batch"),
    Case(65, 130, 16, 128, key_heads=2, bias=(1, 1, 1, 1)),
    Case(130, 130, 128, 64, causal=True, bias=(0, 1, 1, 1)),
    Case(130, 300, 64, 64, window=40, causal=True, mask="some"),
    Case(40, 260, 8, 8, window=3, bias=(1, 0, 0, 1), is_bool=True),
    Case(12, 150, 16, 16, batch=2, mask="padding", bias=(1, 0, 1, 0)),
    Case(9, 20, 16, 16, batch=2, key_heads=2, groups=2, bias=(0, 0, 1, 1), is_bool=True),
    Case(9, 20, 16, 16, batch=2, groups=2, bias=(1, 1, 0, 0), is_bool=True, mask="some"),
    Case(1, 700, 64, 64, key_heads=2, mask="padding"),
    Case(1, 513, 80, 33, groups=3, causal=True),
    Case(1, 600, 64, 64, groups=8, causal=True, window=50),
    Case(2, 300, 33, 80, groups=2, causal=True, bias=(0, 1, 0, 1)),
    Case(4, 270, 16, 16, batch=2, causal=True, bias=(1, 1, 1, 1), is_bool=True),
    Case(1, 300, 64, 64, key_heads=2, groups=4, stored=torch.bfloat16),
    Case(1, 300, 64, 64, key_heads=2, groups=4, stored=torch.int8, mask="some"),
    Case(30, 140, 72, 24, groups=2, causal=True, stored=torch.bfloat16),
    Case(30, 140, 72, 24, groups=2, causal=True, stored=torch.int8),
    Case(1, 40, 70, 20, stored=torch.int8),
    Case(3, 40, 70, 20, stored=torch.bfloat16, mask="some"),
]


@dataclass
class Inputs:
    """Tensors of a case; ``key`` and ``value`` as stored, with scales where they are bytes."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_mask: torch.Tensor | None
    bias: torch.Tensor | None
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    def exact(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value in float64."""
        key, value = self.key.double(), self.value.double()
        if self.key_scales is not None and self.value_scales is not None:
            key, value = key * self.key_scales.double()[..., None], value * self.value_scales.double()[..., None]
        return self.query.double(), key, value


def inputs_of(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    batch, heads = case.batch, case.key_heads * case.groups
    query = normal(batch, heads, case.queries, case.width) * 2
    key = normal(batch, case.key_heads, case.keys, case.width)
    value = normal(batch, case.key_heads, case.keys, case.value_width)
    mask = bias = None
    if case.mask == "padding":  # all of the second batch
        lengths = torch.tensor([[case.keys // 3], [0]])[:batch]
        mask = torch.arange(case.keys) < lengths
    elif case.mask:
        mask = torch.rand(1 if case.mask == "one batch" else batch, case.keys, generator=generator) > 0.4
    if case.bias is not None:
        full = batch, heads, case.queries, case.keys
        bias = normal(*(size if has else 1 for size, has in zip(full, case.bias, strict=True))) * 3
        bias = bias > 0 if case.is_bool else bias.masked_fill(bias > 5, -INF)
    if case.stored == torch.int8:
        codes = [(x * 40).round().clamp(-127, 127).to(torch.int8) for x in (key, value)]
        scales = [torch.rand(x.shape[:3], generator=generator) / 40 + 0.01 for x in (key, value)]
        return Inputs(query, codes[0], codes[1], mask, bias, scales[0], scales[1])
    return Inputs(query, key.to(case.stored), value.to(case.stored), mask, bias)


def run(case: Case, given: Inputs, isa: str) -> torch.Tensor:
    kernel = Attention(isa, case.width**-0.5, case.causal, case.window)
    tensors = given.query, given.key, given.value, given.key_mask, given.bias
    return kernel.attend(*tensors, given.key_scales, given.value_scales)


def expected(case: Case, given: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and how far a float32 one may be from it.

    With u = 2^-24, scale c, bias b and exact weights w: a score is a sum of D products, of a query that was scaled,
    with relative error (D + 6) u of c Σ|q||k| + |b| (four roundings of the scaled query, one of a byte's scale, one of
    the bias). Call M the largest of these sums of sizes in a row. In a weight 2^(score - greatest) the difference, at
    most 2 M, is rounded once, and so are those between the greatest scores of blocks, which add up to at most 2 M
    again; the power itself is good to 4 u, and so is each block's factor, which is multiplied once. The sum over T keys
    and the two roundings of the division add T + 2. All of this concerns the weighted values, and again the sum of the
    weights. Weights below 2^-127 are lost: 1e-36 stands for them.
    """
    query, key, value = given.exact()
    bias = given.bias if given.bias is None or case.is_bool else given.bias.double()
    scale, rest = case.width**-0.5, (case.causal, case.window)
    wanted = attention(query, key, value, given.key_mask, bias, scale, *rest)
    sizes = attention(query, key, value.abs(), given.key_mask, bias, scale, *rest)
    largest = scale * query.abs() @ key.abs().repeat_interleave(case.groups, dim=1).transpose(-1, -2)
    if bias is not None and not case.is_bool:
        largest = largest + bias.abs().masked_fill(bias.isinf(), 0.0)
    most = largest.amax(-1, keepdim=True)
    blocks = -(-case.keys // 128)
    relative = UNIT * ((case.width + 6 + 4) * most + case.keys + 5 * blocks + 6)
    return wanted, 2.01 * relative * sizes + 1e-36


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("isa", isas())
def test_attention(case: Case, isa: str) -> None:
    given = inputs_of(case)
    found = run(case, given, isa)
    wanted, bound = expected(case, given)
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    assert ((found.double() - wanted).abs() <= bound).all()
    empty = (wanted == 0).all(-1)
    assert (found[empty] == 0).all(), "queries without keys give zeros"


@pytest.mark.parametrize("isa", isas())
def test_every_length_around_the_tiles(isa: str) -> None:
    lengths = (1, 2, 3, 4, 5, 6, 7, 12, 13, 63, 64, 65, 130)
    for index, (queries, keys) in enumerate(itertools.product(lengths, lengths)):
        case = Case(queries, keys, (1, 3, 16, 20)[index % 4], (20, 16, 1, 3, 7)[index % 5], causal=index % 3 == 0)
        given = inputs_of(case, index)
        wanted, bound = expected(case, given)
        assert ((run(case, given, isa).double() - wanted).abs() <= bound).all(), case


def test_nothing_to_attend_or_to_ask() -> None:
    for isa in isas():
        kernel = Attention(isa, 1.0, causal=False, window=0)
        for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)):
            x = torch.randn(shape)
            assert kernel(x, x, x, None, None).shape == shape
        query, nothing = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 0, 4)
        assert torch.equal(kernel(query, nothing, nothing, None, None), torch.zeros(2, 2, 3, 4))
        # Without any features all scores are 0: the mean of the values.
        flat, value = torch.randn(1, 1, 3, 0), torch.randn(1, 1, 5, 4)
        mean = value.mean(2, keepdim=True).expand(1, 1, 3, 4)
        torch.testing.assert_close(kernel(flat, torch.randn(1, 1, 5, 0), value, None, None), mean)
        assert kernel(query, query, torch.randn(2, 2, 3, 0), None, None).shape == (2, 2, 3, 0)


@pytest.mark.parametrize("isa", isas())
def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for case in CASES:
            given = inputs_of(case)
            if case.stored != torch.int8:
                given.value[0, 0, case.keys // 2, 0] = NAN
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(run(case, given, isa).view(torch.int32))
            assert all(torch.equal(found, results[0]) for found in results), case
    finally:
        torch.set_num_threads(before)


def test_several_python_threads_at_once() -> None:
    cases = [case for case in CASES if case.queries in (1, 65, 130)]
    given = [inputs_of(case) for case in cases]
    wanted = [run(case, each, isas()[-1]) for case, each in zip(cases, given, strict=True)]
    bad: list[int] = []

    def work(index: int) -> None:
        for _ in range(40):
            if not torch.equal(run(cases[index], given[index], isas()[-1]), wanted[index]):
                bad.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not bad


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("isa", isas())
def test_values_that_are_not_finite(isa: str, queries: int) -> None:
    case = Case(queries, 150, 20, 20, batch=2)
    clean = inputs_of(case)
    wanted = run(case, clean, isa)

    def changed(name: str, place: tuple[int, ...], value: float, mask: torch.Tensor | None = None) -> torch.Tensor:
        given = inputs_of(case)
        getattr(given, name)[place] = value
        given.key_mask = mask
        return run(case, given, isa)

    for value in (NAN, INF):
        found = changed("query", (0, 0, 0, 3), value)
        assert found[0, 0, 0].isnan().all()
        assert torch.equal(found[0, 0, 1:], wanted[0, 0, 1:]), "one query spoils its own row only"
        assert torch.equal(found[1], wanted[1])
    assert changed("key", (0, 0, 140, 3), NAN)[0].isnan().all(), "all queries see the key"
    found = changed("value", (0, 0, 3, 7), NAN)
    assert found[0, 0, :, 7].isnan().all()
    assert torch.equal(found[0, 0, :, :7], wanted[0, 0, :, :7])
    assert changed("value", (0, 0, 3, 7), INF)[0, 0, :, 7].isinf().all()

    # What a mask hides may be anything.
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[0, 60:70], mask[0, 145:] = False, False
    hidden = changed("query", (0, 0, 0, 0), 1.0, mask)
    for name, value, key in itertools.product(("key", "value"), (NAN, INF), (60, 69, 149)):
        given = inputs_of(case)
        given.query[0, 0, 0, 0] = 1.0
        given.key_mask = mask
        getattr(given, name)[0, 0, key] = value
        assert torch.equal(run(case, given, isa), hidden), (name, value, key)


@pytest.mark.parametrize("isa", isas())
def test_later_keys_do_not_matter(isa: str) -> None:
    case = Case(60, 60, 16, 16, causal=True)
    given = inputs_of(case)
    wanted = run(case, given, isa)
    given.key[:, :, 30:] = NAN
    given.value[:, :, 30:] = 1e30
    found = run(case, given, isa)
    assert torch.equal(found[:, :, :30], wanted[:, :, :30])
    assert found[:, :, 30:].isnan().all()


@pytest.mark.parametrize("isa", isas())
def test_scores_of_every_size(isa: str) -> None:
    # One key takes all: weights of the others vanish, and nothing overflows.
    query = torch.tensor([1e18, -1e18, 1e-30, 0.0]).view(1, 1, 4, 1).repeat(1, 1, 3, 1)
    key = torch.tensor([1e18, -1e18, 3.0]).view(1, 1, 3, 1)
    value = torch.eye(3).view(1, 1, 3, 3)
    found = Attention(isa, 1.0, causal=False, window=0)(query, key, value, None, None)
    wanted = attention(query.double(), key.double(), value.double(), None, None, 1.0, False, 0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_inputs_of_every_layout() -> None:
    case = Case(40, 40, 24, 24, batch=2, key_heads=2, groups=2, causal=True, mask="some", bias=(1, 1, 1, 1))
    given, isa = inputs_of(case), isas()[-1]
    wanted = run(case, given, isa)
    assert wanted.is_contiguous()

    def swapped(x: torch.Tensor, a: int, b: int) -> torch.Tensor:
        return x.transpose(a, b).contiguous().transpose(a, b)

    for a, b in ((1, 2), (2, 3), (0, 1)):
        given = inputs_of(case)
        given.query, given.key, given.value = (swapped(x, a, b) for x in (given.query, given.key, given.value))
        assert given.bias is not None
        given.bias = swapped(given.bias, a, b)
        assert torch.equal(run(case, given, isa), wanted)
    given = inputs_of(case)
    assert given.key_mask is not None
    given.key_mask = swapped(given.key_mask, 0, 1)
    assert torch.equal(run(case, given, isa), wanted)
    tensors = given.query, given.key, given.value, given.key_mask, given.bias
    joined = Attention(isa, 24**-0.5, causal=True, window=0, is_by_position=True)(*tensors)
    assert torch.equal(joined, wanted)
    assert joined.transpose(1, 2).is_contiguous()
    misaligned = torch.empty(given.key.numel() + 1)[1:].view(given.key.shape).copy_(given.key)
    given.key = misaligned
    assert torch.equal(run(case, given, isa), wanted)


def test_floats_of_every_dtype() -> None:
    case = Case(9, 20, 24, 24)
    given, kernel = inputs_of(case), Attention(isas()[-1], 0.2, causal=False, window=0)
    for dtype in (torch.bfloat16, torch.float16):
        tensors = [x.to(dtype) for x in (given.query, given.key, given.value)]
        found = kernel(*tensors, None, None)
        assert found.dtype == dtype
        assert torch.equal(found, kernel(*(x.float() for x in tensors), None, None).to(dtype))
    mixed = kernel(given.query, given.key.bfloat16(), given.value, None, None)
    assert torch.equal(mixed, kernel(given.query, given.key.bfloat16().float(), given.value, None, None))
    with_gradient = given.query.clone().requires_grad_()
    assert not kernel(with_gradient, given.key, given.value, None, None).requires_grad


def test_inputs_that_do_not_fit() -> None:
    x, codes = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8, dtype=torch.int8)
    scales, none = torch.ones(2, 4, 3), None
    bad: list[tuple[tuple[Any, ...], str]] = [
        ((x[0], x, x), "batch, heads, length, width"),
        ((x, x, x[0]), "batch, heads, length, width"),
        ((x, x[0], x), "four axes"),
        ((x.to("meta"), x, x), "on meta"),
        ((x.int(), x, x), "takes floating tensors"),
        ((x, x.int(), x), "takes floating tensors"),
        ((x, codes, x), "takes floating tensors"),
        ((x, x[:1], x[:1]), "key does not fit query"),
        ((x, x[..., :7], x), "key does not fit query"),
        ((x, x, x[:, :, :2]), "value does not fit key"),
        ((x, x[:, :3], x[:, :3]), "multiple of key heads"),
        ((x, x, x, torch.ones(3, 3, dtype=torch.bool)), "key_mask must be"),
        ((x, x, x, torch.ones(2, 2, dtype=torch.bool)), "key_mask must be"),
        ((x, x, x, none, torch.ones(3, 2)), "bias cannot be broadcast"),
        ((x, x, x, none, torch.ones(1, 1, 1, 1, 1)), "more than four axes"),
        ((x, codes, codes), "bytes need scales"),
        ((x, codes, codes, none, none, scales, scales[:1]), "bytes need scales"),
        ((x, x, x, none, none, scales, scales), "only bytes have scales"),
    ]
    kernel = Attention("scalar", 1.0, causal=False, window=0)
    for arguments, message in bad:
        with pytest.raises(BackendError, match=message):
            kernel.attend(*arguments)


# -- torch's own operator and softmax ----------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", isas())
def test_torch_attention(isa: str) -> None:
    for queries, keys, causal in ((5, 9, True), (9, 5, True), (7, 7, True), (5, 9, False)):
        query, key, value = torch.randn(2, 4, queries, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 6)
        some = [torch.rand(queries, keys) > 0.7, torch.randn(2, 1, 1, keys), torch.randn(1, keys)]
        some[0][0] = False  # a query without keys
        for mask in [None] if causal else some:
            found = TorchAttention(isa, 8**-0.5, causal)(query, key, value, mask)
            exact = None if mask is None else mask if mask.dtype == torch.bool else mask.double()
            wanted = functional.scaled_dot_product_attention(
                query.double(), key.double(), value.double(), exact, is_causal=causal, enable_gqa=True
            )
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("isa", isas())
def test_softmax(isa: str) -> None:
    """A difference and its product with log2 e have three roundings, a power of 2 is good to 4 u; the same again,
    averaged, for the sum of N, which with the division is rounded N + 2 times."""
    kernel = Softmax(isa)
    for columns in (1, 2, 7, 15, 16, 17, 31, 33, 100, 1000):
        x = torch.randn(5, columns) * torch.tensor([1.0, 10.0, 40.0, 1000.0, 1e-4])[:, None]
        x[2, : columns // 2] = -INF
        wanted = torch.softmax(x.double(), -1)
        difference = (x.double() - x.double().amax(-1, keepdim=True)).abs().masked_fill(x.isinf(), 0.0)
        each = UNIT * (3 * difference + 4)
        bound = 1.01 * wanted * (each + (wanted * each).sum(-1, keepdim=True) + (columns + 2) * UNIT) + 1e-37
        assert ((kernel(x).double() - wanted).abs() <= bound).all(), columns


@pytest.mark.parametrize("isa", isas())
def test_softmax_of_rows_that_are_not_finite(isa: str) -> None:
    x = torch.randn(5, 37)
    x[0], x[1, 3], x[2, 36], x[3, :30] = -INF, NAN, INF, -INF
    torch.testing.assert_close(Softmax(isa)(x), torch.softmax(x, -1), equal_nan=True)
    for row in range(5):
        assert Softmax(isa)(x)[row].isnan().any() == (row < 3)
    for shape in ((0, 3), (3, 0), (2, 3, 4)):
        y = torch.randn(shape).transpose(0, 1)
        torch.testing.assert_close(Softmax(isa)(y), torch.softmax(y, -1))
    half = torch.randn(3, 40).bfloat16()
    assert torch.equal(Softmax(isa)(half), torch.softmax(half.float(), -1).bfloat16())
    assert Softmax(isa, torch.float32)(half).dtype == torch.float32
    for bad in (torch.zeros(3, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(BackendError, match="takes floating CPU tensors"):
            Softmax(isa)(bad)


# -- lowering ----------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def uses(model: gw.OptimizedModel, *ops: str) -> list[tuple[str, str]]:
    return [(use.kernel.split()[0], use.reason) for use in model.explain() if use.op in ops]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_models_run_it(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    else:
        options = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, use_cache=False)).eval()
    ids = torch.randint(3, 99, (2, 11))
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(11) < torch.tensor([[11], [7]])).long()}
    for passes in ([gw.Cleanup(), gw.FuseAll()], []):
        small = gw.optimize(model, passes, example_inputs=inputs, target="cpu")
        found = uses(small, "graphwright.attention", "aten.scaled_dot_product_attention")
        assert found == [("attention", "")] * 2
        with torch.no_grad():
            wanted = model(**inputs)
        torch.testing.assert_close(small(**inputs)[0], wanted[0], rtol=1e-4, atol=1e-5)


class Parts(nn.Module):
    """Attention by hand, whose weights are used elsewhere too, so that it stays in parts; then torch's operator."""

    def forward(self, x: torch.Tensor) -> Any:
        weights = torch.softmax(x @ x.transpose(-1, -2), dim=-1)
        columns = torch.softmax(x, dim=2)
        attended = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        one = functional.scaled_dot_product_attention(x[0], x[0], x[0])
        plain = torch.ops.aten._softmax.default(x, 3, False)
        return weights @ x, weights.sum(), columns, attended, attended.view(-1, 6, 8), one, plain


def test_what_has_no_kernel_runs_in_pytorch_and_says_why() -> None:
    x = torch.randn(2, 3, 6, 8)
    small = gw.optimize(Parts(), [], example_inputs=x, target="cpu")
    assert uses(small, "aten.softmax.int") == [("softmax", ""), ("torch", "it runs over another axis than the last")]
    assert uses(small, "aten._softmax") == [("softmax", "")]
    assert uses(small, "aten.scaled_dot_product_attention") == [
        ("attention", ""),
        ("torch", "query, key and value must have four axes"),
    ]
    for found, wanted in zip(small(x), Parts()(x), strict=True):
        torch.testing.assert_close(found, wanted)
    double = gw.optimize(Parts().double(), [], example_inputs=x.double(), target="cpu")
    reasons = set(uses(double, "aten.softmax.int", "aten.scaled_dot_product_attention"))
    assert reasons == {("torch", "the kernels compute in float32")}


def test_the_label_names_the_instruction_set() -> None:
    kernel = Attention(isas()[-1], 1 / math.sqrt(8), causal=True, window=0)
    assert kernel.label == f"attention {isas()[-1]} (float32, flash)"
    assert "causal True" in repr(kernel)
