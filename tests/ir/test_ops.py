"""The float operators of the dialect against arithmetic written out anew, their shapes, gradients and registration."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from graphwright.ir import ops
from graphwright.ir.errors import ProgramError
from graphwright.ir.ops.activation import ACTIVATIONS
from graphwright.ir.parser import parse

DOUBLE = torch.float64


def run(name: str, *operands: Any) -> torch.Tensor:
    result: torch.Tensor = ops.get(name).target(*operands)
    return result


def random(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


# -- attention ---------------------------------------------------------------------------------------------------------


def attention_by_hand(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    key_mask: np.ndarray | None,
    bias: np.ndarray | None,
    scale: float,
    causal: bool,
    window: int,
) -> np.ndarray:
    """One query after another, one key after another."""
    batch, heads, length, _ = query.shape
    shared, keys = key.shape[1], key.shape[2]
    result = np.zeros((batch, heads, length, value.shape[3]))
    wide = None if bias is None else np.broadcast_to(bias, (batch, heads, length, keys))
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // shared)
            for i in range(length):
                scores: dict[int, float] = {}
                for j in range(keys):
                    allowed = key_mask is None or bool(key_mask[b % key_mask.shape[0], j])
                    allowed = allowed and (not causal or j <= i + keys - length)
                    allowed = allowed and (window == 0 or j > i + keys - length - window)
                    score = scale * float(query[b, h, i] @ key[b, group, j])
                    if wide is not None and wide.dtype == bool:
                        allowed = allowed and bool(wide[b, h, i, j])
                    elif wide is not None:
                        score += float(wide[b, h, i, j])
                    if allowed and score > -math.inf:
                        scores[j] = score
                if scores:
                    top = max(scores.values())
                    total = sum(math.exp(score - top) for score in scores.values())
                    for j, score in scores.items():
                        result[b, h, i] += math.exp(score - top) / total * value[b, group, j]
    return result


@settings(max_examples=40)
@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.integers(1, 5),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from(["none", "keys", "one row of keys"]),
    st.sampled_from(["none", "float", "bool", "per query", "with -inf"]),
    st.integers(0, 1000),
)
def test_attention_is_what_it_says(
    batch: int,
    heads: tuple[int, int],
    length: int,
    keys: int,
    causal: bool,
    window: int,
    masked: str,
    biased: str,
    seed: int,
) -> None:
    query = random(batch, heads[0], length, 4, seed=seed)
    key, value = random(batch, heads[1], keys, 4, seed=seed + 1), random(batch, heads[1], keys, 3, seed=seed + 2)
    rows = {"keys": batch, "one row of keys": 1}.get(masked)
    key_mask = None if rows is None else random(rows, keys, seed=seed + 3) > -0.3
    bias = {
        "none": None,
        "float": random(batch, heads[0], length, keys, seed=seed + 4),
        "bool": random(batch, 1, length, keys, seed=seed + 4) > -0.5,
        "per query": random(length, keys, seed=seed + 4),
        "with -inf": random(1, 1, length, keys, seed=seed + 4).masked_fill(
            random(1, 1, length, keys, seed=seed + 5) > 0.5, -math.inf
        ),
    }[biased]
    found = run("attention", query, key, value, key_mask, bias, 0.7, causal, window)
    masks = [None if item is None else item.numpy() for item in (key_mask, bias)]
    expected = attention_by_hand(query.numpy(), key.numpy(), value.numpy(), masks[0], masks[1], 0.7, causal, window)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_agrees_with_torch(dtype: torch.dtype) -> None:
    query, key, value = (random(2, 4, 7, 8, seed=seed, dtype=dtype) for seed in range(3))
    found = run("attention", query, key, value, None, None, 8**-0.5, True, 0)
    assert found.dtype == dtype
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, expected, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=2e-3)


def test_a_query_with_nothing_to_attend_gives_zeros_and_no_gradient() -> None:
    query, key, value = (random(2, 1, 3, 4, seed=seed).requires_grad_() for seed in range(3))
    mask = torch.tensor([[True, True, False], [False, False, False]])
    found = run("attention", query, key, value, mask, None, 0.5, False, 0)
    assert not found[1].any()
    assert found[0].all()
    found.square().sum().backward()
    for operand in (query, key, value):
        assert operand.grad is not None
        assert operand.grad.isfinite().all()
        assert not operand.grad[1].any()


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (((2, 3, 4), (2, 1, 3, 4), (2, 1, 3, 4)), "must be"),
        (((2, 3, 5, 4), (2, 2, 6, 4), (2, 2, 6, 4)), "query heads must be a multiple of key heads"),
        (((2, 4, 5, 4), (2, 2, 6, 4), (2, 4, 6, 4)), "key and value need the same number of heads"),
        (((2, 4, 5, 4), (2, 2, 6, 3), (2, 2, 6, 4)), "query and key need the same head dim"),
        (((2, 4, 5, 4), (2, 2, 6, 4), (2, 2, 7, 4)), "key and value need the same length"),
    ],
)
def test_shapes_attention_refuses(shapes: Any, says: str) -> None:
    lines = [f'%{name} = input "{name}" : f32{list(shape)}' for name, shape in zip("qkv", shapes)]
    call = "%y = graphwright.attention(%q, %k, %v, None, None, 1.0, False, 0)"
    with pytest.raises(ProgramError, match=says):
        parse("program P() {\n" + "\n".join([*lines, call, "return %y"]) + "\n}")


# -- norms, rotary embedding, gates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm(width: int, weighted: bool) -> None:
    x, weight = random(2, 3, width), random(width, seed=1) if weighted else None
    expected = np.empty((2, 3, width))
    for place in np.ndindex(2, 3):
        row = x[place].numpy()
        factor = 1 / math.sqrt(sum(float(v) ** 2 for v in row) / width + 0.1)
        expected[place] = row * factor * (1.0 if weight is None else weight.numpy())
    np.testing.assert_allclose(run("rms_norm", x, weight, 0.1).numpy(), expected, rtol=1e-12)


def test_rms_norm_computes_in_float32_at_least() -> None:
    x = (300 * random(4, 16)).half()
    found = run("rms_norm", x, None, 1e-6)
    assert found.dtype == torch.float16
    assert found.isfinite().all(), "squares of 300 do not fit into half precision"
    torch.testing.assert_close(found.float(), run("rms_norm", x.float(), None, 1e-6), rtol=1e-3, atol=1e-3)
    assert not run("rms_norm", torch.zeros(2, 4), None, 1e-6).any()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotary_embedding(interleaved: bool, width: int, rows: int) -> None:
    x, angle = random(2, 3, 5, 8), random(rows, 5, width // 2, seed=1)
    repeated = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    found = run("rotary_embedding", x, repeated.cos(), repeated.sin(), interleaved)
    expected = x.numpy().copy()
    for b, h, s, pair in np.ndindex(2, 3, 5, width // 2):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
        turn = float(angle[b % rows, s, pair])
        number = complex(x[b, h, s, first], x[b, h, s, second]) * complex(math.cos(turn), math.sin(turn))
        expected[b, h, s, first], expected[b, h, s, second] = number.real, number.imag
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)
    if rows == 1:
        norms = x[..., :width].norm(dim=-1)
        torch.testing.assert_close(found[..., :width].norm(dim=-1), norms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation(activation: str) -> None:
    gate, up = random(3, 5), random(3, 5, seed=1)

    def curve(x: float) -> float:
        if activation == "silu":
            return x / (1 + math.exp(-x))
        if activation == "gelu":
            return x * (1 + math.erf(x / math.sqrt(2))) / 2
        if activation == "gelu_tanh":
            return x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        return max(x, 0.0)

    expected = np.vectorize(curve)(gate.numpy()) * up.numpy()
    np.testing.assert_allclose(run("gated_activation", gate, up, activation).numpy(), expected, rtol=1e-12)


def test_an_unknown_activation_is_refused_when_the_program_is_made() -> None:
    with pytest.raises(ProgramError, match="activation 'swish' is not one of silu, gelu, gelu_tanh, relu"):
        parse(
            """program P() {
              %x = input "x" : f32[2]
              %y = graphwright.gated_activation(%x, %x, "swish")
              return %y
            }"""
        )


# -- every definition --------------------------------------------------------------------------------------------------

MASK = torch.tensor([[True, True, False, True, True]])
CALLS: dict[str, tuple[Any, ...]] = {
    "attention": (
        *(random(1, 4, 3, 2), random(1, 2, 5, 2, seed=1), random(1, 2, 5, 3, seed=2)),
        *(MASK, random(4, 3, 5, seed=3), 0.5, True, 4),
    ),
    "rms_norm": (random(2, 3), random(3, seed=1), 0.1),
    "rotary_embedding": (random(1, 2, 3, 4), random(1, 3, 4, seed=1), random(1, 3, 4, seed=2), False),
    "gated_activation": (random(2, 3), random(2, 3, seed=1), "gelu"),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name: str) -> None:
    definition, operands = ops.get(name), list(CALLS[name])
    places = [item.name for item in definition.target._schema.arguments]
    wanted = [place for place, item in enumerate(places) if item in definition.differentiable]
    assert wanted
    for place in wanted:
        operands[place] = operands[place].clone().requires_grad_()

    def function(*changed: torch.Tensor) -> torch.Tensor:
        call = list(operands)
        for place, value in zip(wanted, changed, strict=True):
            call[place] = value
        result: torch.Tensor = definition.target(*call)
        return result

    assert torch.autograd.gradcheck(function, [operands[place] for place in wanted])


@pytest.mark.parametrize("name", CALLS)
def test_only_the_gradients_asked_for_are_computed(name: str) -> None:
    definition, operands = ops.get(name), list(CALLS[name])
    names = [item.name for item in definition.target._schema.arguments]
    for one in definition.differentiable:
        call = [value.clone() if isinstance(value, torch.Tensor) else value for value in operands]
        place = names.index(one)
        call[place].requires_grad_()
        definition.target(*call).sum().backward()
        assert call[place].grad is not None
        assert all(value.grad is None for value in call if isinstance(value, torch.Tensor) and value is not call[place])


@pytest.mark.parametrize("name", CALLS)
def test_torch_finds_nothing_wrong_with_the_registration(name: str) -> None:
    torch.library.opcheck(ops.get(name).target, CALLS[name])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_shape_rule_agrees_with_the_reference(name: str, dtype: torch.dtype) -> None:
    operands = [
        value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in CALLS[name]
    ]
    found = run(name, *operands)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in operands]
        fake = run(name, *fakes)
    assert (fake.shape, fake.dtype) == (found.shape, found.dtype)
    assert found.dtype == dtype


@pytest.mark.parametrize("name", CALLS)
def test_results_are_new_tensors(name: str) -> None:
    found = run(name, *CALLS[name])
    pointers = {value.untyped_storage().data_ptr() for value in CALLS[name] if isinstance(value, torch.Tensor)}
    assert found.untyped_storage().data_ptr() not in pointers


@pytest.mark.parametrize("name", sorted(ops.DIALECT))
def test_definitions_are_complete(name: str) -> None:
    definition = ops.get(name)
    assert definition.name == name
    assert definition.qualified_name == f"graphwright.{name}"
    schema = definition.target._schema
    names = [item.name for item in schema.arguments]
    assert set(definition.differentiable) <= set(names)
    assert not schema.is_mutable
    assert definition.reference.__doc__
    assert ops.is_dialect(definition.target)
    assert ops.definition_of(definition.target) is definition
    assert list(definition.reference.__code__.co_varnames[: len(names)]) == names, "named as in the schema"


def test_what_is_not_in_the_dialect() -> None:
    with pytest.raises(ProgramError, match=r"the dialect has no operator 'gelu'\n  -> it has apply_mask, attention, "):
        ops.get("gelu")
    assert not ops.is_dialect(torch.ops.aten.relu.default)
    assert ops.definition_of(torch.ops.aten.relu.default) is None
    assert not ops.is_dialect(len)


def test_nothing_is_registered_before_it_is_asked_for() -> None:
    script = (
        "import torch\nfrom graphwright.ir import ops, parser, program, cost\n"
        "assert not hasattr(torch.ops.graphwright, 'rms_norm')\n"
        "ops.get('rms_norm')\n"
        "assert not hasattr(torch.ops.graphwright, 'rms_norm')\n"
        "ops.get('rms_norm').target\n"
        "assert hasattr(torch.ops.graphwright, 'rms_norm')\n"
        "assert not hasattr(torch.ops.graphwright, 'attention')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
