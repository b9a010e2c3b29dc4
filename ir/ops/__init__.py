"""The op dialect: the few operators passes rewrite ATen into, one definition each.

The table names where each definition lives; nothing is imported or registered before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from graphwright.ir.errors import ProgramError
from graphwright.ir.ops.definition import NAMESPACE, Cost, OpDefinition

__all__ = ["DIALECT", "Cost", "OpDefinition", "definition_of", "get", "is_dialect"]

# operator -> module under graphwright.ir.ops that holds its definition, as an upper-case constant of the same name
DIALECT: dict[str, str] = {
    "apply_mask": "masking",
    "attention": "attention",
    "attention_int8": "attention_int8",
    "cache_append": "cache",
    "cached_attention": "cache",
    "embedding_nbits": "quantization",
    "fake_quantize": "fake_quantize",
    "gated_activation": "activation",
    "kron_linear": "kronecker",
    "linear_codebook": "codebook",
    "linear_fp8_dynamic": "rounded_activations",
    "linear_int8_dynamic": "quantization",
    "linear_int8_static": "quantization",
    "linear_nbits": "quantization",
    "linear_nbits_dynamic": "rounded_activations",
    "linear_outliers": "outliers",
    "linear_sparse": "sparse",
    "linear_sparse_dynamic": "sparse_int8",
    "linear_sparse_static": "sparse_int8",
    "rms_norm": "normalization",
    "rotary_embedding": "position",
    "select_rows": "cache",
}


def get(name: str) -> OpDefinition:
    """The definition of a dialect operator by its bare name.

    Raises:
        ProgramError: the dialect has no such operator.
    """
    if name not in DIALECT:
        raise ProgramError(f"the dialect has no operator {name!r}", hint=f"it has {', '.join(sorted(DIALECT))}")
    module = importlib.import_module(f"graphwright.ir.ops.{DIALECT[name]}")
    definition: OpDefinition = getattr(module, name.upper())
    return definition


def is_dialect(target: Any) -> bool:
    """Whether a call target belongs to the dialect."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE


def definition_of(target: Any) -> OpDefinition | None:
    """The definition behind a call target, or ``None`` for ATen and python functions."""
    return get(target._schema.name.split("::")[1]) if is_dialect(target) else None
