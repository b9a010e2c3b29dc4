"""Attention that takes the views around it in: the same results, and only where the views are what they seem."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.backends.cpu import native_status
from graphwright.backends.cpu.kernels.heads import HeadsAttention
from graphwright.ir.errors import BackendError

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Block(nn.Module):
    """Attention with four heads of eight, between functions that split and join them."""

    def __init__(
        self, split: Callable[[torch.Tensor, Block], Tensors], join: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.qkv, self.q = nn.Linear(32, 96), nn.Linear(32, 32)
        self.split, self.join = split, join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x, self)
        return self.join(functional.scaled_dot_product_attention(q, k, v))


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(*x.shape[:2], 4, 8).transpose(1, 2)


def from_one(x: torch.Tensor, block: Block) -> Tensors:
    q, k, v = block.qkv(x).split([32, 32, 32], dim=-1)
    return heads(q), heads(k), heads(v)


def from_other_parts(x: torch.Tensor, block: Block) -> Tensors:
    k, q, v = block.qkv(x).split([32, 32, 32], dim=2)
    return heads(q), heads(v), heads(k)


def from_several(x: torch.Tensor, block: Block) -> Tensors:
    return heads(block.q(x)), heads(x), block.q(x).view(*x.shape[:2], 4, 8).cumsum(1).transpose(1, 2)


def from_features_first(x: torch.Tensor, block: Block) -> Tensors:  # heads are the inner dimension
    q, k, v = (part.view(*x.shape[:2], 8, 4).permute(0, 3, 1, 2) for part in block.qkv(x).chunk(3, dim=-1))
    return q, k, v


def split_along_positions(x: torch.Tensor, block: Block) -> Tensors:
    y = block.q(x)
    q, k = torch.cat((y, y), 1).split([x.shape[1], x.shape[1]], dim=1)
    return heads(q), heads(k), heads(y)


def joined(y: torch.Tensor) -> torch.Tensor:
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], 32)


def joined_and_used(y: torch.Tensor) -> torch.Tensor:
    return joined(y).cumsum(1) + y.sum((1, 3)).unsqueeze(-1)


def left_apart(y: torch.Tensor) -> torch.Tensor:
    return y.cumsum(2)


def joined_the_other_way(y: torch.Tensor) -> torch.Tensor:
    return y.reshape(y.shape[0], y.shape[2], 32)  # mixes heads and positions


SPLITS = [from_one, from_other_parts, from_several, from_features_first, split_along_positions]
JOINS = [joined, joined_and_used, left_apart, joined_the_other_way]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("join", JOINS)
def test_views_around_attention(
    split: Callable[[torch.Tensor, Block], Tensors], join: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    torch.manual_seed(0)
    model, x = Block(split, join).eval(), torch.randn(3, 5, 32)
    small = gw.optimize(model, [gw.Cleanup(), gw.FuseAll()], example_inputs=(x,), target="cpu", verify=False)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    other = torch.randn(2, 7, 32)
    torch.testing.assert_close(small(other), model(other), rtol=1e-4, atol=1e-5)
    uses = [use for use in small.explain() if use.op in ("aten.transpose.int", "aten.reshape", "aten.view")]
    if split in (from_one, from_other_parts) and join is joined:
        assert uses
        assert all("attention" in use.kernel for use in uses), uses
    if split is from_features_first and join is left_apart:
        assert all("attention" not in use.kernel for use in uses), uses


def test_what_does_not_fit() -> None:
    isa = next(use.kernel.split()[1] for use in small_block().explain() if use.kernel.startswith("attention"))
    kernel = HeadsAttention(isa, 1.0, False, 0, ((0, 4, 8), (0, 4, 8), (0, 4, 8)), True)
    x = torch.randn(2, 5, 32)
    assert kernel(x, x, x, None, None).shape == (2, 5, 32)
    assert kernel(x[:, :0], x[:, :0], x[:, :0], None, None).shape == (2, 0, 32)
    with pytest.raises(BackendError, match="float32 CPU tensors"):
        kernel(x.double(), x, x, None, None)
    with pytest.raises(BackendError, match="attention kernel"):
        kernel(x, x[..., :16], x, None, None)
    with pytest.raises(BackendError, match="attention kernel"):
        kernel(x, x, x[:1], None, None)


def small_block() -> gw.OptimizedModel:
    model, x = Block(from_one, joined).eval(), torch.randn(1, 4, 32)
    return gw.optimize(model, [gw.Cleanup(), gw.FuseAll()], example_inputs=(x,), target="cpu", verify=False)
