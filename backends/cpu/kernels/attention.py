"""Attention that never holds the matrix of scores, and softmax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site, floats
from graphwright.ir.errors import BackendError
from graphwright.ir.names import op_name

_IN_FLOAT32 = "the kernels compute in float32"


class Attention(Kernel):
    """``graphwright.attention`` (see :mod:`graphwright.ir.ops.attention`) in blocks of keys (Dao et al. 2022).

    It computes in float32. Keys and values may be float32, bfloat16 or, for :meth:`attend`, int8 with scales; they are
    read as they are stored. Keys that ``key_mask`` hides may hold NaN. A NaN or infinity among the values of keys that
    lie beyond a causal limit or window reaches some of the rows that cannot see them; in the reference it reaches all.

    Args:
        isa: instruction set of the kernel.
        scale: factor on the scores.
        causal: queries see no later keys.
        window: how many keys back they see, or 0.
        is_from_end: positions are counted from the last query and key, not from the first.
        is_by_position: results lie in memory as ``[B, S, H, Dv]``, so that joining the heads copies nothing.
    """

    inputs: tuple[str, ...] = ("query", "key", "value", "key_mask", "bias")

    def __init__(
        self,
        isa: str,
        scale: float,
        causal: bool,
        window: int,
        *,
        is_from_end: bool = True,
        is_by_position: bool = False,
    ) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self.scale, self.causal, self.window = scale, causal, window
        self.is_from_end, self.is_by_position = is_from_end, is_by_position
        self.kernel = _native.Attention(isa, scale, causal, window)
        self.label = f"attention {self.isa} (float32, flash)"

    @property
    def isa(self) -> str:
        """The instruction set of the kernel: one that has none of its own takes its parent's."""
        return self.kernel.isa

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The operator. Inputs may have any strides; what has no contiguous last axis is copied.

        Raises:
            BackendError: shapes or dtypes do not fit, or a tensor is not on the CPU.
        """
        return self.attend(query, key, value, key_mask, bias)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The operator on a cache of keys and values that may be int8.

        Args:
            query: ``[B, Hq, S, D]``, floating.
            key, value: ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``, floating, or int8 codes.
            key_mask: bool ``[B or 1, T]``, or ``None``.
            bias: floating or bool, broadcastable to ``[B, Hq, S, T]``, or ``None``.
            key_scales, value_scales: ``[B, Hkv, T]`` where keys and values are int8: value = code * scale.

        Returns:
            ``[B, Hq, S, Dv]`` of query's dtype.

        Raises:
            BackendError: shapes or dtypes do not fit, or a tensor is not on the CPU.
        """
        try:
            queries, (keys, values) = rows(query), _stored(key, value)
            if queries.ndim != 4 or values.ndim != 4:
                raise ValueError("query, key and value must be [batch, heads, length, width]")
            (batch, heads, length, _), width = queries.shape, values.shape[3]
            if self.is_by_position:
                result = torch.empty((batch, length, heads, width)).transpose(1, 2)
            else:
                result = torch.empty((batch, heads, length, width))
            self.compute(queries, keys, values, result.numpy(), key_mask, bias, key_scales, value_scales)
        except (TypeError, ValueError) as error:  # numpy's, of tensors that are not on the CPU, and the kernel's
            given = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in (query, key, value))
            raise BackendError(f"{error} (query, key and value are {given})", where="attention kernel") from None
        return result if query.dtype == torch.float32 else result.to(query.dtype)

    def compute(
        self,
        queries: npt.NDArray[np.float32],
        keys: npt.NDArray[Any],
        values: npt.NDArray[Any],
        result: npt.NDArray[np.float32],
        key_mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
    ) -> None:
        """The same on arrays of any strides whose last axis is contiguous; ``result`` is ``[B, Hq, S, Dv]``.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        self.kernel.run(
            queries,
            keys,
            values,
            result,
            None if key_mask is None else _booleans(key_mask),
            None if bias is None else _booleans(bias) if bias.dtype == torch.bool else floats(bias),
            None if key_scales is None else floats(key_scales),
            None if value_scales is None else floats(value_scales),
            self.is_from_end,
            torch.get_num_threads(),
        )

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return f"scale {self.scale:g}, causal {self.causal}, window {self.window}, {self.isa}"


class TorchAttention(Attention):
    """``aten.scaled_dot_product_attention``: one mask, and positions are counted from the first."""

    inputs = ("query", "key", "value", "attn_mask")

    def __init__(self, isa: str, scale: float, causal: bool, *, is_by_position: bool = False) -> None:
        super().__init__(isa, scale, causal, 0, is_from_end=False, is_by_position=is_by_position)

    def forward(  # type: ignore[override]
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The operator; errors as in :meth:`Attention.attend`."""
        return self.attend(query, key, value, None, attn_mask)


class Softmax(Kernel):
    """Softmax over the last axis, in float32.

    Args:
        isa: instruction set of the kernel.
        dtype: of the result; ``None`` is the input's.
    """

    inputs = ("self",)

    def __init__(self, isa: str, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self.dtype = dtype
        self._kernel = _native.Softmax(isa)
        self.label = f"softmax {self._kernel.isa} (float32)"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., N]``, floating, of any strides.

        Raises:
            BackendError: it is not a floating tensor on the CPU, or has no axis.
        """
        if not x.dtype.is_floating_point or not x.is_cpu or x.dim() == 0:
            raise BackendError(
                f"takes floating CPU tensors with an axis, not {x.dtype} {list(x.shape)} on {x.device}",
                where="softmax kernel",
            )
        result = torch.empty(x.shape)
        self._kernel.run(floats(x.contiguous()), result.numpy(), torch.get_num_threads())
        dtype = self.dtype or x.dtype
        return result if dtype == torch.float32 else result.to(dtype)


def rows(x: torch.Tensor) -> npt.NDArray[np.float32]:
    """Floats whose last axis is contiguous."""
    if not x.dtype.is_floating_point:
        raise ValueError("takes floating tensors, and keys and values that are both int8")
    return floats(x if x.stride(-1) == 1 else x.contiguous())


def _stored(key: torch.Tensor, value: torch.Tensor) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Keys and values as the kernel reads them: bfloat16 as integers, which numpy has; other floats as float32."""
    dtype = key.dtype
    if dtype != torch.float32 and dtype == value.dtype and dtype in (torch.bfloat16, torch.int8):
        return words(key), words(value)
    return rows(key), rows(value)


def words(x: torch.Tensor) -> npt.NDArray[Any]:
    """Values as they are stored, their last axis contiguous: bfloat16 as integers."""
    x = x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
    words: npt.NDArray[Any] = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return words


def _booleans(x: torch.Tensor) -> npt.NDArray[np.bool_]:
    """A mask as numpy has it."""
    booleans: npt.NDArray[np.bool_] = (x if x.dtype == torch.bool else x.to(torch.bool)).numpy()
    return booleans


def _is_joined(node: fx.Node) -> bool:
    """Whether heads are moved behind positions by all that read a result, so that its memory may have that order."""
    swaps = {("aten.transpose.int", (1, 2)), ("aten.transpose.int", (2, 1)), ("aten.permute", (0, 2, 1, 3))}
    return all((op_name(user), _axes(user)) in swaps for user in node.users)


def _axes(node: fx.Node) -> tuple[Any, ...]:
    axes = node.args[1:] if len(node.args) == 3 else node.args[1] if len(node.args) == 2 else ()
    return (
        tuple(axis % 4 if isinstance(axis, int) else axis for axis in axes) if isinstance(axes, (tuple, list)) else ()
    )


def _attention(site: Site) -> Kernel | str:
    if site.value("query").dtype == torch.float64:
        return _IN_FLOAT32
    given = site.arguments
    return Attention(site.isa, given["scale"], given["causal"], given["window"], is_by_position=_is_joined(site.node))


def _attention_int8(site: Site) -> str:
    return "the attention kernels round keys and values to INT8, not queries and probabilities"


def _torch_attention(site: Site) -> Kernel | str:
    given, heads = site.arguments, [site.value(name) for name in ("query", "key", "value")]
    query, key, value = heads
    if query.dtype == torch.float64:
        return _IN_FLOAT32
    if given["dropout_p"] != 0.0:
        return "it drops attention weights at random"
    if any(x.dim() != 4 for x in heads):
        return "query, key and value must have four axes"
    if not _same(query.shape[0], key.shape[0], value.shape[0]):
        return "key or value is broadcast along the batch"
    if not _same(key.shape[1], value.shape[1]) or not (given["enable_gqa"] or _same(query.shape[1], key.shape[1])):
        return "key or value is broadcast along the heads"
    width, scale = query.shape[3], given["scale"]
    if isinstance(scale, fx.Node) or (scale is None and not isinstance(width, int)):
        return "the scale is computed"
    factor = scale if scale is not None else 1.0 / math.sqrt(max(width, 1))
    return TorchAttention(site.isa, float(factor), given["is_causal"], is_by_position=_is_joined(site.node))


def _same(*sizes: Any) -> bool:
    # As text: comparing symbols would ask for their values.
    return len({str(size) for size in sizes}) == 1


def _softmax(site: Site) -> Kernel | str:
    x, given = site.value("self"), site.arguments
    dtype = given.get("dtype")
    if torch.float64 in (x.dtype, dtype):
        return _IN_FLOAT32
    if not x.is_floating_point() or x.dim() == 0:
        return "it is not of floats with an axis"
    if given["dim"] not in (-1, x.dim() - 1):
        return "it runs over another axis than the last"
    return Softmax(site.isa, torch.float32 if given.get("half_to_float") else dtype)


LOWERINGS: dict[str, Lowering] = {
    "graphwright.attention": _attention,
    "graphwright.attention_int8": _attention_int8,
    "aten.scaled_dot_product_attention": _torch_attention,
    "aten.softmax.int": _softmax,
    "aten._softmax": _softmax,
}
