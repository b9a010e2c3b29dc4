"""A decoding step of a Llama decoder with random weights: on our kernels, and as torch's modules for rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from graphwright.backends.triton.kernels import norms, pointwise
from graphwright.backends.triton.kernels.cached_attention import append, cached_attention
from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.linear_nbits import fused_linear_nbits
from graphwright.backends.triton.kernels.nbits_weight import NbitsWeight, repack
from graphwright.backends.triton.kernels.rotary import rotary_embedding
from graphwright.ir.ops.cache import cache_append
from graphwright.ir.ops.cache import cached_attention as cached_reference
from graphwright.ir.ops.normalization import rms_norm
from graphwright.ir.ops.position import rotary_embedding as rotary_reference

HALF = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, by default those of Llama 3 8B."""

    hidden: int = 4096
    feed_forward: int = 14336
    layers: int = 32
    heads: int = 32
    key_heads: int = 8
    width: int = 128
    vocabulary: int = 128256
    group: int = 128


def random_weight(outputs: int, columns: int, group: int, device: torch.device, bits: int = 4) -> NbitsWeight:
    """Random codes, and scales that keep results of the size of inputs."""
    groups = columns // group
    qweight = torch.randint(0, 256, (outputs, groups, group * bits // 8), dtype=torch.uint8, device=device)
    size = 1.0 / (2 ** (bits - 2) * columns**0.5)
    scales = (torch.rand(outputs, groups, device=device) * size).half()
    return repack(qweight, scales, None, bits, group, columns)


class OurStep:
    """One token after ``context`` others, W4A16, bfloat16 caches, everything on our kernels but the embedding."""

    def __init__(self, shape: Shape, context: int, device: torch.device) -> None:
        self.shape, s = shape, shape
        merged = (s.heads + 2 * s.key_heads) * s.width
        sizes = [(merged, s.hidden), (s.hidden, s.heads * s.width)]
        sizes += [(2 * s.feed_forward, s.hidden), (s.hidden, s.feed_forward)]
        self.layers = [[random_weight(*size, s.group, device) for size in sizes] for _ in range(s.layers)]
        self.head = random_weight(s.vocabulary, s.hidden, s.group, device)
        self.norm = torch.ones(s.hidden, dtype=HALF, device=device)
        self.embedding = torch.randn(s.vocabulary, s.hidden, dtype=HALF, device=device)
        cache = (1, s.key_heads, context + 1, s.width)
        self.caches = [[torch.randn(cache, dtype=HALF, device=device) for _ in range(2)] for _ in range(s.layers)]
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.slots = torch.zeros(1, dtype=torch.int64, device=device)
        self.starts = torch.full((1,), context, dtype=torch.int64, device=device)
        angle = torch.rand(1, 1, s.width, device=device)
        self.cos, self.sin = angle.cos().to(HALF), angle.sin().to(HALF)

    @property
    def nbytes(self) -> int:
        """That a step must read."""
        weights = sum(weight.nbytes for layer in self.layers for weight in layer) + self.head.nbytes
        return weights + sum(cache.nbytes for pair in self.caches for cache in pair)

    def __call__(self) -> torch.Tensor:
        """Logits ``[1, 1, V]``."""
        s, x = self.shape, functional.embedding(self.token, self.embedding)
        cuts = [s.heads * s.width, s.key_heads * s.width, s.key_heads * s.width]
        with torch.no_grad():
            for (qkv, out, up, down), (keys, values) in zip(self.layers, self.caches):
                merged = fused_linear_nbits(norms.rms_norm(x, self.norm, 1e-5), qkv, Epilogue())
                query, key, value = (
                    part.view(1, 1, -1, s.width).transpose(1, 2) for part in merged.split(cuts, dim=-1)
                )
                query, key = (rotary_embedding(part, self.cos, self.sin, False) for part in (query, key))
                append(keys, None, key, self.slots, self.starts)
                append(values, None, value, self.slots, self.starts)
                seen = cached_attention(query, keys, values, self.slots, self.starts, None, s.width**-0.5, 0, 0.0)
                joined = seen.transpose(1, 2).reshape(1, 1, -1)
                x = fused_linear_nbits(joined, out, Epilogue(residual=x))
                gate, linear = fused_linear_nbits(norms.rms_norm(x, self.norm, 1e-5), up, Epilogue()).chunk(2, -1)
                x = fused_linear_nbits(pointwise.gated_activation(gate, linear, "silu"), down, Epilogue(residual=x))
            return fused_linear_nbits(norms.rms_norm(x, self.norm, 1e-5), self.head, Epilogue())

    def in_float64(self) -> torch.Tensor:
        """What a step must give, by the dialect's references; caches stay as they are."""
        s, x = self.shape, functional.embedding(self.token, self.embedding).double()
        weight, angles = self.norm.double(), (self.cos.double(), self.sin.double())
        cuts = [s.heads * s.width, s.key_heads * s.width, s.key_heads * s.width]

        def linear(x: torch.Tensor, packed: NbitsWeight) -> torch.Tensor:
            return x @ packed.dense(torch.float64).t()

        for (qkv, out, up, down), caches in zip(self.layers, self.caches):
            parts = linear(rms_norm(x, weight, 1e-5), qkv).split(cuts, dim=-1)
            query, key, value = (part.view(1, 1, -1, s.width).transpose(1, 2) for part in parts)
            query, key = (rotary_reference(part, *angles, False) for part in (query, key))
            keys, values = (
                cache_append(cache.double(), new, self.slots, self.starts) for cache, new in zip(caches, (key, value))
            )
            seen = cached_reference(query, keys, values, self.slots, self.starts, None, s.width**-0.5, 0, 0.0)
            x = x + linear(seen.transpose(1, 2).reshape(1, 1, -1), out)
            gate, other = linear(rms_norm(x, weight, 1e-5), up).chunk(2, -1)
            x = x + linear(functional.silu(gate) * other, down)
        return linear(rms_norm(x, weight, 1e-5), self.head)


class _Layer(nn.Module):
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, shape: Shape, context: int) -> None:
        super().__init__()
        s = self.shape = shape
        self.qkv = nn.Linear(s.hidden, (s.heads + 2 * s.key_heads) * s.width, bias=False)
        self.out = nn.Linear(s.heads * s.width, s.hidden, bias=False)
        self.up = nn.Linear(s.hidden, 2 * s.feed_forward, bias=False)
        self.down = nn.Linear(s.feed_forward, s.hidden, bias=False)
        self.first, self.second = nn.RMSNorm(s.hidden), nn.RMSNorm(s.hidden)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(1, s.key_heads, context + 1, s.width))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        s = self.shape
        cuts = [s.heads * s.width, s.key_heads * s.width, s.key_heads * s.width]
        parts = self.qkv(self.first(x)).split(cuts, dim=-1)
        query, key, value = (part.view(1, 1, -1, s.width).transpose(1, 2) for part in parts)
        query, key = (part * cos + part.roll(s.width // 2, -1) * sin for part in (query, key))
        self.keys[:, :, -1:] = key
        self.values[:, :, -1:] = value
        seen = functional.scaled_dot_product_attention(query, self.keys, self.values, enable_gqa=True)
        x = x + self.out(seen.transpose(1, 2).reshape(1, 1, -1))
        gate, up = self.up(self.second(x)).chunk(2, -1)
        total: torch.Tensor = x + self.down(functional.silu(gate) * up)
        return total


def torch_step(
    shape: Shape, context: int, device: torch.device, change: Callable[[nn.Module], object]
) -> tuple[nn.Module, tuple[Any, ...]]:
    """The same decoder of torch's modules in bfloat16, after ``change`` (a quantiser, say), and its inputs."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(_Layer(shape, context) for _ in range(shape.layers))
            self.norm, self.head = nn.RMSNorm(shape.hidden), nn.Linear(shape.hidden, shape.vocabulary, bias=False)

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, cos, sin)
            logits: torch.Tensor = self.head(self.norm(x))
            return logits

    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(HALF)
        try:
            model = Step().eval().requires_grad_(False)
            inputs = tuple(torch.rand(1, 1, size) for size in (shape.hidden, shape.width, shape.width))
        finally:
            torch.set_default_dtype(default)
    change(model)
    return model, inputs
