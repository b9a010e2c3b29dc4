"""The C++ norms, rotary embeddings and lookups: right to derived bounds, equal on every instruction set and thread."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import graphwright as gw
from graphwright.backends.cpu import features, native_status
from graphwright.backends.cpu.kernels.embedding import Embedding, PackedEmbedding
from graphwright.backends.cpu.kernels.norms import LayerNorm, RmsNorm
from graphwright.backends.cpu.kernels.rotary import Rotary
from graphwright.ir.errors import BackendError
from graphwright.ir.ops.normalization import rms_norm
from graphwright.ir.ops.position import rotary_embedding
from graphwright.ir.ops.quantization import embedding_nbits, pack

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)

WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 768, 1000]
ROWS = [0, 1, 2, 5, 200]
HALF_ULP = 2.0**-24
EPS = 1e-5


def isas() -> list[str]:
    """Usable instruction sets with kernels of their own."""
    usable = [isa.name for isa in features().instruction_sets if isa.usable]
    return [isa for isa in usable if Rotary(isa, False).label.endswith(f" {isa}")]


def rows_of(count: int, columns: int) -> torch.Tensor:
    """Rows of many sizes, some far from 0, cut out of something wider."""
    generator = torch.Generator().manual_seed(1000 * count + columns)
    size = torch.logspace(-3, 3, max(count, 2))[:count, None]
    offset = torch.randn(count, 1, generator=generator) * torch.tensor([0.0, 5.0, 300.0])[torch.arange(count) % 3, None]
    return (size * (torch.randn(count, columns + 3, generator=generator) + offset))[:, 1 : columns + 1]


def equal(results: list[Any]) -> bool:
    """To the last bit, NaN where the first has NaN."""
    return all(torch.equal(found.nan_to_num(7.0), results[0].nan_to_num(7.0)) for found in results)


# -- norms -------------------------------------------------------------------------------------------------------------


def norm_bound(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, centred: bool) -> torch.Tensor:
    """How far rounding may move a norm of ``x``, float64.

    A sum of n terms in 64 parts has a relative error (to the sum of sizes) of n/64 + 6 half units. That moves the mean
    by ``shift`` and every deviation with it; the mean square has that error, two roundings of each term, the division
    and ``eps``, half of which is left after the square root. The rest are single roundings.
    """
    terms = -(-x.shape[-1] // 64) + 6
    mean = x.mean(-1, keepdim=True) if centred else torch.zeros(len(x), 1, dtype=torch.float64)
    shift = (terms * x.abs().mean(-1, keepdim=True) + mean.abs()) * HALF_ULP if centred else mean
    deviation = x - mean
    square = deviation.square().mean(-1, keepdim=True) + EPS
    off = (terms + 6) * HALF_ULP + shift * (2 * deviation.abs().mean(-1, keepdim=True) * HALF_ULP + shift) / square
    scaled = (deviation.abs() * (off / 2 + 6 * HALF_ULP) + 2 * shift) / square.sqrt()
    return (
        scaled * weight.abs() + 2 * HALF_ULP * (deviation / square.sqrt() * weight).abs() + HALF_ULP * bias.abs()
    ) * (1 + 1e-5) + 2.0**-149


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms(kind: str, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight, bias = torch.randn(2, columns, generator=generator)
    one, nothing = torch.ones(columns), torch.zeros(columns)
    for count in ROWS:
        x, residual = rows_of(count, columns), rows_of(count, columns).flip(0)
        for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
            if kind == "layer":
                alone = [LayerNorm(isa, (columns,), w, b, EPS)(x) for isa in isas()]
                added = [LayerNorm(isa, (columns,), w, b, EPS, residual=True)(x, residual) for isa in isas()]
            elif b is None:
                alone = [RmsNorm(isa, w, EPS)(x) for isa in isas()]
                added = [RmsNorm(isa, w, EPS, residual=True)(x, residual) for isa in isas()]
            else:
                continue
            assert equal(alone), f"{isas()} differ"
            assert equal([y for y, _ in added])
            assert all(torch.equal(total, x + residual) for _, total in added)
            for given, found in ((x, alone[0]), (x + residual, added[0][0])):
                wide, scale, shift = given.double(), (one if w is None else w).double(), nothing if b is None else b
                if kind == "layer":
                    wanted = functional.layer_norm(wide, (columns,), scale, shift.double(), EPS)
                else:
                    wanted = rms_norm(wide, scale, EPS)
                allowed = norm_bound(wide, scale, shift.double(), kind == "layer")
                assert ((found.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_rows_that_are_not_finite(kind: str) -> None:
    x = torch.randn(7, 70)
    x[1, 3], x[2, 69], x[3, 0], x[4] = float("nan"), float("inf"), float("-inf"), 0.0
    for isa in isas():
        found = (LayerNorm(isa, (70,)) if kind == "layer" else RmsNorm(isa, None, EPS))(x)
        wanted = functional.layer_norm(x, (70,)) if kind == "layer" else rms_norm(x, None, EPS)
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_norms_of_every_layout() -> None:
    isa, x, weight = isas()[-1], torch.randn(2, 3, 4, 10), torch.randn(10)
    kernel = RmsNorm(isa, weight, EPS)
    for given in (
        x,
        x.transpose(1, 2),
        x[:, ::2],
        x[..., 5:].repeat(1, 1, 1, 2).movedim(-1, 1).movedim(1, -1),
        x[0, 0, 0],
    ):
        wanted = rms_norm(given, weight, EPS)
        found = kernel(given)
        torch.testing.assert_close(found, wanted)
        assert found.stride() == wanted.stride()
    moved = torch.randn(2, 10, 3, 4).movedim(1, -1)
    assert kernel(moved).stride() == rms_norm(moved, weight, EPS).stride()
    torch.testing.assert_close(kernel(moved), rms_norm(moved, weight, EPS))
    for total, wanted in zip(
        RmsNorm(isa, None, EPS, residual=True)(moved, moved), (rms_norm(2 * moved, None, EPS), 2 * moved)
    ):
        torch.testing.assert_close(total, wanted)
        assert total.stride() == wanted.stride()
    several = LayerNorm(isa, (4, 10), torch.ones(4, 10), None)
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.testing.assert_close(several(given), functional.layer_norm(given, (4, 10)))
        assert several(given).is_contiguous()
    half = LayerNorm(isa, (10,))(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, functional.layer_norm(x.bfloat16().float(), (10,)).bfloat16())


def test_norms_refuse_what_does_not_fit() -> None:
    kernel = LayerNorm("scalar", (4, 6))
    for x in (torch.ones(3, 6), torch.ones(2, 24), torch.ones(6)):
        with pytest.raises(BackendError, match=r"normalises \[4, 6\]"):
            kernel(x)
    with pytest.raises(BackendError, match="takes floating CPU tensors"):
        kernel(torch.ones(4, 6, dtype=torch.int32))
    with pytest.raises(BackendError, match="takes a residual"):
        kernel(torch.ones(4, 6), torch.ones(4, 6))
    with pytest.raises(BackendError, match="takes a residual"):
        LayerNorm("scalar", (6,), residual=True)(torch.ones(4, 6), torch.ones(6))


def test_the_number_of_threads_changes_nothing() -> None:
    before, isa = torch.get_num_threads(), isas()[-1]
    x = torch.randn(2, 8, 60, 64)
    cos, sin = torch.randn(2, 1, 60, 64)
    table, indices = torch.randn(90, 300), torch.randint(0, 90, (400,))
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: LayerNorm(isa, (64,))(x),
        lambda: RmsNorm(isa, None, EPS, residual=True)(x, x)[0],
        lambda: Rotary(isa, False)(x, cos, sin),
        lambda: Embedding(table)(indices),
    ]
    try:
        for call in calls:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(call())
            assert equal(results)
    finally:
        torch.set_num_threads(before)


# -- rotary embedding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("width", "rotated"), [(2, 2), (8, 6), (16, 16), (34, 34), (64, 64), (80, 32), (128, 128), (9, 0)]
)
def test_rotary(width: int, rotated: int, interleaved: bool) -> None:
    for batch, heads, positions in ((1, 1, 1), (2, 3, 5), (2, 4, 0), (1, 8, 200)):
        x = torch.randn(batch, positions, heads, width).transpose(1, 2)
        for repeats in (1, batch):
            cos, sin = torch.randn(2, repeats, positions, rotated)
            results = [Rotary(isa, interleaved)(x, cos, sin) for isa in isas()]
            assert equal(results)
            assert results[0].is_contiguous()
            wanted = rotary_embedding(x.double(), cos.double(), sin.double(), interleaved)
            kept = x.double() * functional.pad(cos.double(), (0, width - rotated), value=1.0).unsqueeze(1)
            # Two products and their sum, each rounded once.
            allowed = 2 * HALF_ULP * (1 + HALF_ULP) * (kept.abs() + (wanted - kept).abs()) + 2.0**-149
            assert ((results[0].double() - wanted).abs() <= allowed).all()
            assert torch.equal(results[0][..., rotated:], x[..., rotated:])
            assert torch.equal(Rotary(isas()[-1], interleaved)(x.contiguous(), cos, sin), results[0])


def test_rotary_of_other_layouts_and_types() -> None:
    kernel = Rotary(isas()[-1], False)
    x, cos, sin = torch.randn(2, 3, 16, 5).transpose(-1, -2), *torch.randn(2, 2, 16, 5).transpose(-1, -2)
    torch.testing.assert_close(kernel(x, cos, sin), rotary_embedding(x, cos, sin, False))
    half = x.bfloat16(), cos.bfloat16(), sin.bfloat16()
    found = kernel(*half)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found, rotary_embedding(half[0].float(), half[1].float(), half[2].float(), False).bfloat16()
    )
    x[0, 1, 2, 3], x[1, 2, 3, 4] = float("nan"), float("inf")
    wanted = rotary_embedding(x, cos, sin, False)
    torch.testing.assert_close(kernel(x, cos, sin), wanted, equal_nan=True)
    with pytest.raises(BackendError, match="cannot take x, cos and sin"):
        kernel(x, cos[:, :3], sin[:, :3])
    with pytest.raises(BackendError, match="cannot take x, cos and sin"):
        kernel(x, torch.ones(1, 5, 32), torch.ones(1, 5, 32))


# -- lookups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_embedding(dtype: torch.dtype) -> None:
    for columns in WIDTHS:
        table = torch.randn(50, columns, dtype=torch.float64).to(dtype)
        table[3, 0] = float("nan")
        kernel = Embedding(table.t().contiguous().t())
        for count in ROWS:
            indices = torch.randint(0, 50, (2, count))
            assert equal([kernel(indices), functional.embedding(indices, table)])
            assert equal([kernel(indices.t().int()), functional.embedding(indices.t(), table)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_embedding(bits: int, symmetric: bool) -> None:
    for columns, group in [(1, 8), (7, 8), (16, 16), (33, 16), (64, 32), (100, 128), (1000, 32)]:
        groups = -(-columns // group)
        zeros = None if symmetric else torch.randint(0, 2**bits, (40, groups), dtype=torch.uint8)
        codes = torch.randint(0, 2**bits, (40, columns), dtype=torch.uint8)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            stored = pack(codes, bits, group, zeros), torch.randn(40, groups).to(dtype), zeros
            for count in ROWS:
                indices = torch.randint(0, 40, (count,))
                results = [PackedEmbedding(isa, *stored, bits, group, columns)(indices) for isa in isas()]
                assert equal([embedding_nbits(indices, *stored, bits, group, columns), *results])


def test_indices_outside_a_table() -> None:
    codes, scales = torch.zeros(5, 1, 4, dtype=torch.uint8), torch.ones(5, 1)
    kernels = [Embedding(torch.ones(5, 3)), PackedEmbedding("scalar", codes, scales, None, 8, 4, 4)]
    for kernel in kernels:
        for wrong in (5, -1, 2**62, -(2**63)):
            with pytest.raises(BackendError, match=f"index {wrong} is not in a table of 5 rows"):
                kernel(torch.tensor([[0, 1], [wrong, 9]]))
        with pytest.raises(BackendError, match="takes indices, not torch.float32"):
            kernel(torch.ones(3))


def test_the_extension_refuses_tables_that_do_not_fit() -> None:
    from graphwright.backends.cpu import _native

    good: dict[str, Any] = {
        "isa": "scalar",
        "bits": 4,
        "columns": 10,
        "group": 4,
        "codes": np.zeros((5, 3, 2), np.uint8),
        "scales": np.ones((5, 3), np.float32),
        "zeros": None,
    }
    table = _native.PackedTable(**good)
    with pytest.raises(ValueError, match="y has the wrong shape"):
        table.run(np.zeros(2, np.int64), np.zeros((3, 10), np.float32), 1)
    for name, value, message in [
        ("bits", 3, "bits must be"),
        ("group", 5, "whole bytes"),
        ("columns", 20, "codes has the wrong size"),
        ("scales", np.ones((5, 2), np.float32), "scales has the wrong size"),
        ("zeros", np.ones((4, 3), np.uint8), "zeros has the wrong size"),
    ]:
        with pytest.raises(ValueError, match=message):
            _native.PackedTable(**{**good, name: value})


# -- lowering ----------------------------------------------------------------------------------------------------------

OURS = {
    "aten.layer_norm",
    "aten.gelu",
    "aten.silu",
    "aten.relu",
    "aten.tanh",
    "aten.sigmoid",
    "aten.embedding",
    "graphwright.embedding_nbits",
    "graphwright.gated_activation",
    "graphwright.rms_norm",
    "graphwright.rotary_embedding",
}
SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def model_of(name: str, **settings: Any) -> torch.nn.Module:
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, name.replace("Model", "") + "Config")(**SMALL, **settings)
    config._attn_implementation = "sdpa"
    if name != "BertModel":
        config.use_cache = False
    model: torch.nn.Module = getattr(transformers, name)(config).eval()
    return model


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("BertModel", {}, {"aten.embedding", "aten.layer_norm", "aten.gelu", "aten.tanh"}),
        ("BertModel", {"hidden_act": "gelu_pytorch_tanh"}, {"aten.embedding", "aten.layer_norm", "aten.gelu"}),
        (
            "LlamaModel",
            {"num_key_value_heads": 2},
            {"aten.embedding", "graphwright.rms_norm", "graphwright.rotary_embedding", "graphwright.gated_activation"},
        ),
    ],
)
def test_models_leave_none_of_these_to_pytorch(name: str, settings: dict[str, Any], expected: set[str]) -> None:
    model = model_of(name, **settings)
    example = {"input_ids": torch.randint(0, 90, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    small = gw.optimize(model, [gw.Cleanup(), gw.FuseAll()], example_inputs=example, target="cpu")
    uses = [use for use in small.explain() if use.op in OURS]
    assert expected <= {use.op for use in uses}
    assert not [use for use in uses if use.kernel in ("torch", "reference")]
    for length in (9, 13):
        ids = torch.randint(0, 90, (3, length))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        wanted = model(**given).last_hidden_state
        torch.testing.assert_close(small(**given).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendError, match="index 90 is not in a table of 90 rows"):
        small(input_ids=torch.full((2, 9), 90), attention_mask=example["attention_mask"])


def test_packed_tables_are_lowered() -> None:
    example = torch.randint(0, 90, (2, 9))
    for bits in (4, 8):
        model = torch.nn.Sequential(torch.nn.Embedding(90, 64), torch.nn.SiLU())
        passes = [gw.QuantizeEmbeddings(bits=bits)]
        plain = gw.optimize(model, passes, example_inputs=example)
        small = gw.optimize(plain, [], target="cpu")
        assert {use.op for use in small.explain()} >= {"graphwright.embedding_nbits", "aten.silu"}
        assert not [use for use in small.explain() if use.kernel in ("torch", "reference")]
        torch.testing.assert_close(small(example), plain(example), rtol=1e-6, atol=1e-7)


def test_what_stays_in_pytorch_says_why() -> None:
    class Wide(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return functional.layer_norm(torch.relu(x), (4,), weight.abs())

    example = torch.randn(3, 4), torch.ones(4)
    small = gw.optimize(Wide(), [], example_inputs=example, target="cpu")
    assert {use.op: use.reason for use in small.explain() if use.op in OURS} == {
        "aten.relu": "",
        "aten.layer_norm": "its weight is computed, not stored",
    }
    wide = gw.optimize(torch.nn.Tanh(), [], example_inputs=torch.randn(3).double(), target="cpu")
    assert [use.reason for use in wide.explain()] == ["the kernels compute in float32, not in float64"]
