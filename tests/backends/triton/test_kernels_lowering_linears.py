"""Every kind of linear that a pass makes gets its kernel from ``target="cuda"``, and gives what the reference gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.backends.triton.oracle import check, random
from torch import nn

import graphwright as gw
from graphwright.backends.triton import TritonBackend
from graphwright.backends.triton.nodes import rounded_linears, sparse_linears

CPU = TritonBackend("cpu")


class Two(nn.Module):
    """Two linears with an activation, a gate and a residual around them."""

    def __init__(self, dtype: torch.dtype = torch.float32, size: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = x + self.second(nn.functional.silu(self.first(x)))
        return total


def made(*passes: gw.Pass, dtype: torch.dtype = torch.float32, size: int = 64, model: Any = None) -> Any:
    given = random(2, 3, size, dtype=dtype)
    base = Two(dtype, size) if model is None else model
    return gw.optimize(base.eval(), [gw.Cleanup(), *passes], example_inputs=(given,), target=CPU, verify=False), given


def kernels(small: Any, op: str) -> list[str]:
    return [use.kernel for use in small.explain() if use.op == f"graphwright.{op}"]


def agree(small: Any, x: torch.Tensor, roundings: float = 30) -> None:
    with torch.no_grad():
        check(small(x), small.body(x)[0], roundings=roundings)


# The reference and the kernels round activations at the same places; a last bit may move a code.
ROUNDED: dict[str, tuple[str, dict[str, Any], str]] = {
    "int8 rows": ("linear_int8_dynamic", {"bits": 8, "activations": "int8"}, "linear_int8 W8A8 per_token"),
    "int8 groups": (
        "linear_nbits_dynamic",
        {"bits": 8, "activations": "int8", "group_size": 32},
        "linear_int8 W8A8 per_group 32",
    ),
    "int8 one group": (
        "linear_nbits_dynamic",
        {"bits": 8, "activations": "int8", "group_size": 64},
        "linear_int8 W8A8 per_group 64",
    ),
    "fp8 rows": ("linear_fp8_dynamic", {"dtype": "fp8_e4m3", "activations": "fp8"}, "linear_fp8 W8A8 per_token"),
    "fp8 groups": (
        "linear_fp8_dynamic",
        {"dtype": "fp8_e4m3", "activations": "fp8", "group_size": 32},
        "linear_fp8 W8A8 per_group, groups of 32",
    ),
    "fp8 groups, rows of activations": (
        "linear_fp8_dynamic",
        {"dtype": "fp8_e4m3", "activations": "fp8", "group_size": 32, "activation_ranges": "per_token"},
        "linear_fp8 W8A8 per_token, groups of 32",
    ),
    "fp8 blocks": (
        "linear_fp8_dynamic",
        {"dtype": "fp8_e4m3", "activations": "fp8", "block": (32, 64)},
        "linear_fp8 W8A8 per_group",
    ),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_8_bit_weights_and_activations(name: str) -> None:
    op, options, label = ROUNDED[name]
    small, x = made(gw.QuantizeLinears(**options))
    agree(small, x, roundings=2000)
    found = kernels(small, op)
    assert len(found) == 2
    assert all(each.startswith(f"triton {label}") and "[" in each for each in found), found
    # Straight through the rounding, as the reference has it.
    leaf, slope = x.clone().requires_grad_(), random(2, 3, 64, seed=5)
    (gradient,) = torch.autograd.grad(small._executable(leaf)[0], leaf, slope)
    (wanted,) = torch.autograd.grad(small.body(leaf)[0], leaf, slope)
    check(gradient, wanted, roundings=20000)


def test_static_grids_pass_no_gradient_beyond_their_ends() -> None:
    grids = {"activations": "int8", "activation_ranges": "static", "calibration": [random(40, 3, 64, seed=1) / 4]}
    small, x = made(gw.QuantizeLinears(bits=8, **grids), model=nn.Sequential(nn.Linear(64, 32)))
    leaf, slope = x.clone().requires_grad_(), random(2, 3, 32)
    (found,) = torch.autograd.grad(small._executable(leaf)[0], leaf, slope)
    (wanted,) = torch.autograd.grad(small.body(leaf)[0], leaf, slope)
    assert 0 < int((wanted == 0).sum()) < wanted.numel()
    assert torch.equal(found == 0, wanted == 0)
    check(found, wanted, roundings=100)


def test_fp8_says_which_gpus_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    quantise = gw.QuantizeLinears(dtype="fp8_e4m3", activations="fp8")
    monkeypatch.setattr(rounded_linears, "architecture", lambda device: 86)
    small, x = made(quantise)
    uses = [use for use in small.explain() if use.op == "graphwright.linear_fp8_dynamic"]
    reason = "need compute capability 8.9, this GPU has 8.6; INT8 activations work there"
    assert all(use.kernel == "reference" and reason in use.reason for use in uses)
    with torch.no_grad():
        assert torch.equal(small(x), small.body(x)[0])
    monkeypatch.setattr(rounded_linears, "architecture", lambda device: 942)
    assert all(kernel.startswith("triton linear_fp8") for kernel in kernels(made(quantise)[0], "linear_fp8_dynamic"))


def test_codebooks_say_what_has_kernels() -> None:
    small, _ = made(gw.QuantizeLinears(dtype="fp8_e4m3"))
    (use, _) = (use for use in small.explain() if use.op == "graphwright.linear_codebook")
    assert (use.kernel, "activations='fp8'" in use.reason) == ("reference", True)
    small, _ = made(gw.QuantizeLinears(dtype="nf4", group_size=32))
    (use, _) = (use for use in small.explain() if use.op == "graphwright.linear_codebook")
    assert (use.kernel, "integers of 2 to 8 bits have" in use.reason) == ("reference", True)


BASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "W4": ("linear_nbits", {"bits": 4, "group_size": 32}, 60),
    "W8": ("linear_nbits", {"bits": 8, "group_size": 32}, 60),
    "INT8": ("linear_int8_dynamic", {"bits": 8, "activations": "int8"}, 2000),
    "FP8": ("linear_fp8_dynamic", {"dtype": "fp8_e4m3", "activations": "fp8"}, 2000),
}


def stirred(program: gw.Program) -> None:
    with torch.no_grad():
        for place, (_, parameter) in enumerate(gw.adapter_parameters(program)):
            parameter.copy_(random(*parameter.shape, seed=place) * 0.1)


@pytest.mark.parametrize("name", BASES)
def test_a_low_rank_branch_is_part_of_the_linear(name: str) -> None:
    op, options, roundings = BASES[name]
    small, x = made(gw.QuantizeLinears(**options), gw.InsertAdapters(gw.LoRA(rank=4, alpha=16)))
    stirred(small)
    agree(small, x, roundings)
    uses = small.explain()
    branches = [use for use in uses if use.kernel.startswith("low-rank branch of")]
    assert [use.op for use in branches] == ["aten.linear", "aten.add.Tensor"] * 2
    assert not [use for use in uses if use.op in ("aten.add.Tensor", "aten.silu") and use.kernel == "torch"]
    assert all("[" in kernel for kernel in kernels(small, op))


class Scaled(nn.Module):
    """A branch that is scaled afterwards; one that something else reads too; one of a high rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.left = nn.Linear(64, 64), nn.Linear(64, 64)
        self.down, self.up = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)
        self.wide, self.broad = nn.Linear(64, 80, bias=False), nn.Linear(80, 64, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        beside = self.up(self.down(x))
        return self.base(x) + self.up(self.down(x)) * 0.5, self.left(x) + beside, beside


def test_which_branches_are_taken_in() -> None:
    passes = gw.QuantizeLinears(bits=4, group_size=32, where="re:base|left")
    x = random(3, 64)
    small = gw.optimize(Scaled().eval(), [passes], example_inputs=(x,), target=CPU, verify=False)
    with torch.no_grad():
        for found, wanted in zip(small(x), small.body(x)):
            check(found, wanted, roundings=60)
    branches = [use for use in small.explain() if use.kernel.startswith("low-rank branch of")]
    assert [use.op for use in branches] == ["aten.linear", "aten.mul.Tensor", "aten.add.Tensor"]

    class High(Scaled):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self.base(x) + self.broad(self.wide(x)),)

    high = gw.optimize(High().eval(), [passes], example_inputs=(x,), target=CPU, verify=False)
    with torch.no_grad():
        check(high(x)[0], high.body(x)[0], roundings=60)
    assert not [use for use in high.explain() if use.kernel.startswith("low-rank branch of")]


@pytest.mark.parametrize("name", BASES)
def test_adapters_train_on_a_quantised_base(name: str) -> None:
    _, options, roundings = BASES[name]
    small, x = made(gw.QuantizeLinears(**options), gw.InsertAdapters(gw.LoRA(rank=4, alpha=16)))
    parameters, target = [parameter for _, parameter in gw.adapter_parameters(small)], random(2, 3, 64, seed=9)
    start = [parameter.detach().clone() for parameter in parameters]

    def trained(run: Any) -> tuple[list[float], list[torch.Tensor]]:
        with torch.no_grad():
            for parameter, value in zip(parameters, start):
                parameter.copy_(value)
        optimizer, losses = torch.optim.SGD(parameters, lr=1.0), []
        for _ in range(3):
            loss = (run(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, [parameter.detach().clone() for parameter in parameters]

    losses, values = trained(small)
    wanted_losses, wanted_values = trained(lambda x: small.body(x)[0])
    assert losses[2] < 0.95 * losses[0]
    assert max(abs(a - b) for a, b in zip(losses, wanted_losses, strict=True)) < 1e-3
    for found, wanted in zip(values, wanted_values, strict=True):
        check(found, wanted, roundings=100 * roundings)


def test_a_bias_that_trains_gets_its_gradient() -> None:
    for options in ({"bits": 4, "group_size": 32}, {"bits": 8, "activations": "int8"}):
        small, x = made(gw.QuantizeLinears(**options))
        bias = small.tensors()["second.bias"].requires_grad_()
        small(x).sum().backward()
        torch.testing.assert_close(bias.grad, torch.full((64,), 6.0))


def pruned(pattern: str, dtype: torch.dtype, *passes: gw.Pass, **options: Any) -> tuple[Any, torch.Tensor]:
    small, x = made(gw.PruneLinears(pattern=pattern, **options), *passes, gw.CompressLinears(), dtype=dtype)
    return small, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_pruned_in_blocks(dtype: torch.dtype) -> None:
    small, x = pruned("32x32", dtype, sparsity=0.75)
    agree(small, x)
    found = kernels(small, "linear_sparse")
    assert len(found) == 2
    assert all(each.startswith("triton linear_blocks 32x32, 25% of them stored") for each in found), found
    assert all("linear_blocks [" in each for each in found)
    leaf, slope = x.clone().requires_grad_(), random(2, 3, 64, seed=5, dtype=dtype)
    (gradient,) = torch.autograd.grad(small._executable(leaf)[0], leaf, slope)
    (wanted,) = torch.autograd.grad(small.body(leaf)[0], leaf, slope)
    check(gradient, wanted, roundings=40)


def test_weights_of_which_two_of_four_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    small, x = pruned("2:4", torch.float16)
    (kernel, _) = kernels(small, "linear_sparse")
    assert kernel.startswith("torch dense linear (blocks of 64 store 100%; 2:4 needs a weight on a GPU"), kernel
    agree(small, x)
    # torch's product is CUDA's; what is given to it, and what becomes of its gradient, shows with a dense stand-in.
    seen: list[torch.Tensor] = []

    def stand_in(weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight)
        return weight

    monkeypatch.setattr(sparse_linears, "refusal_of_two_of_four", lambda weight: None)
    monkeypatch.setattr(sparse_linears, "two_of_four", stand_in)
    small, x = pruned("2:4", torch.float16)
    assert all(int(weight.unflatten(1, (-1, 4)).count_nonzero(-1).max()) == 2 for weight in seen)
    assert kernels(small, "linear_sparse") == ["torch semi-structured 2:4 linear"] * 2
    agree(small, x)
    leaf, slope = x.clone().requires_grad_(), random(2, 3, 64, seed=5).half()
    (gradient,) = torch.autograd.grad(small._executable(leaf)[0], leaf, slope)
    (wanted,) = torch.autograd.grad(small.body(leaf)[0], leaf, slope)
    check(gradient, wanted, roundings=40)


def test_other_sparse_weights_take_the_dense_kernels() -> None:
    small, x = pruned("unstructured", torch.float32, sparsity=0.6)
    agree(small, x)
    assert all(each.startswith("torch dense linear (blocks of 64") for each in kernels(small, "linear_sparse"))
    for bits in (4, 8):
        small, x = pruned("unstructured", torch.float32, gw.QuantizeLinears(bits=bits, group_size=32), sparsity=0.6)
        agree(small, x, roundings=60)
        for each in kernels(small, "linear_sparse"):
            assert each.startswith(f"triton linear_nbits W{bits}")
            assert ", zeros stored as codes: linear_nbits [" in each


def test_sparse_weights_train_and_are_laid_out_again() -> None:
    small, x = pruned("32x32", torch.float32, sparsity=0.75)
    values, slope = small.tensors()["second.weight_values"], random(2, 3, 64, seed=5)
    assert values.requires_grad
    (found,) = torch.autograd.grad(small(x), values, slope)
    (wanted,) = torch.autograd.grad(small.body(x)[0], values, slope)
    check(found, wanted)
    uses = [use for use in small.explain() if use.op == "graphwright.linear_sparse"]
    assert all(use.kernel == "reference" and "launched nothing" in use.reason for use in uses)
    agree(small, x)
    with torch.no_grad():
        values.mul_(2)
        before = small.body(x)[0]
        check(small(x), before, roundings=30)
    assert kernels(small, "linear_sparse")[1].startswith("triton linear_blocks")
