"""Which function translates which operator: ``module:function`` under this folder, imported when first needed.

A translation is called with the lowering, the node, and the operator's arguments in the order of its schema.
"""

from __future__ import annotations


def _aten(module: str, names: str, function: str | None = None) -> dict[str, str]:
    """Operators translated by the function of their own name (``aten.sub.Tensor`` by ``module:sub``), or by one."""
    return {f"aten.{name}": f"{module}:{function or name.split('.')[0].strip('_')}" for name in names.split()}


TRANSLATIONS: dict[str, str] = {
    **_aten(
        "unary",
        "abs acos asin atan ceil cos cosh erf exp exp2 expm1 floor isinf isnan log log1p log2 neg reciprocal round "
        "rsqrt sign sin sinh sqrt square tan tanh trunc logical_not bitwise_not "
        "elu gelu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 sigmoid silu softplus",
    ),
    **_aten(
        "binary",
        "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar mul.Tensor mul.Scalar div.Tensor "
        "div.Scalar div.Tensor_mode div.Scalar_mode floor_divide floor_divide.Scalar remainder.Tensor remainder.Scalar "
        "fmod.Tensor fmod.Scalar pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar maximum minimum "
        "eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor "
        "ge.Scalar logical_and logical_or logical_xor "
        "bitwise_and.Tensor bitwise_and.Scalar bitwise_or.Tensor bitwise_or.Scalar bitwise_xor.Tensor",
    ),
    **_aten("binary", "max.other", "maximum"),
    **_aten("binary", "min.other", "minimum"),
    **_aten("binary", "__and__.Tensor __and__.Scalar", "bitwise_and"),
    **_aten("binary", "__or__.Tensor __or__.Scalar", "bitwise_or"),
    **_aten("binary", "__xor__.Tensor", "bitwise_xor"),
    **_aten(
        "choice",
        "where.self where.ScalarOther where.ScalarSelf where.Scalar masked_fill.Scalar masked_fill.Tensor "
        "clamp clamp.Tensor clamp_min clamp_max tril triu",
    ),
    **_aten(
        "views",
        "view reshape _unsafe_view flatten.using_ints unflatten.int unsqueeze squeeze squeeze.dim squeeze.dims view_as",
        "view",
    ),
    **_aten(
        "views",
        "contiguous clone alias detach lift_fresh_copy type_as to.dtype to.device to.dtype_layout to.other _to_copy",
        "same",
    ),
    **_aten("views", "dropout feature_dropout", "dropout"),
    **_aten(
        "movement",
        "transpose.int permute t movedim.int expand expand_as cat stack slice.Tensor select.int split.Tensor "
        "split_with_sizes split.sizes chunk unbind.int narrow repeat "
        "repeat_interleave.self_int constant_pad_nd pad flip roll",
    ),
    **_aten("movement", "swapaxes swapdims", "transpose"),
    **_aten("movement", "numpy_T", "t"),
    **_aten("creation", "arange arange.start arange.start_step full full_like new_full scalar_tensor"),
    **_aten("creation", "zeros new_zeros zeros_like empty.memory_format empty_like", "zeros"),
    **_aten("creation", "ones new_ones ones_like", "ones"),
    **_aten("reduction", "mean sum", "total"),
    **_aten(
        "reduction",
        "mean.dim sum.dim_IntList amax amin max max.dim min min.dim prod.dim_int logsumexp argmax argmin any any.dim "
        "any.dims all all.dim all.dims cumsum softmax.int _softmax log_softmax.int _log_softmax "
        "var.correction std.correction linalg_vector_norm",
    ),
    **_aten("reduction", "var.dim", "var_dim"),
    **_aten("reduction", "std.dim", "std_dim"),
    **_aten("indexing", "embedding index.Tensor gather index_select"),
    **_aten("linear", "linear addmm mm matmul bmm baddbmm"),
    **_aten("normalization", "layer_norm rms_norm group_norm batch_norm"),
    **_aten("convolution", "conv1d conv2d conv1d.padding conv2d.padding", "convolution"),
    **_aten("attention", "scaled_dot_product_attention"),
    "graphwright.attention": "attention:attention",
    "graphwright.kron_linear": "linear:kron_linear",
    "graphwright.cache_append": "cache:cache_append",
    "graphwright.cached_attention": "cache:cached_attention",
    "graphwright.select_rows": "cache:select_rows",
    "graphwright.rms_norm": "normalization:dialect_rms_norm",
    "graphwright.rotary_embedding": "position:rotary_embedding",
    "graphwright.gated_activation": "unary:gated_activation",
    "graphwright.linear_nbits": "weight_only:linear_nbits",
    "graphwright.linear_codebook": "weight_only:linear_codebook",
    "graphwright.embedding_nbits": "embedding_table:embedding_nbits",
    "graphwright.linear_int8_dynamic": "integer:linear_int8_dynamic",
    "graphwright.linear_int8_static": "integer:linear_int8_static",
    "graphwright.linear_outliers": "sparse_linear:linear_outliers",
    "graphwright.linear_sparse": "sparse_linear:linear_sparse",
    "graphwright.apply_mask": "choice:apply_mask",
    "graphwright.linear_sparse_dynamic": "sparse_linear:linear_sparse_dynamic",
    "graphwright.linear_sparse_static": "sparse_linear:linear_sparse_static",
}
