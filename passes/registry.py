"""The passes by name: ours from an explicit table, others from installed packages, each imported when asked for."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from graphwright.ir.errors import InputError
from graphwright.passes.base import Pass

ENTRY_POINT_GROUP = "graphwright.passes"

# pass name -> module and class
BUILT_IN: dict[str, tuple[str, str]] = {
    "cleanup": ("cleanup", "Cleanup"),
    "canonicalize-linears": ("cleanup", "CanonicalizeLinears"),
    "remove-dead-code": ("cleanup", "RemoveDeadCode"),
    "eliminate-common-subexpressions": ("cleanup", "EliminateCommonSubexpressions"),
    "fold-constants": ("cleanup", "FoldConstants"),
    "remove-no-ops": ("cleanup", "RemoveNoOps"),
    "fuse-all": ("fusion", "FuseAll"),
    "fuse-layer-norm": ("fusion", "FuseLayerNorm"),
    "fuse-rms-norm": ("fusion", "FuseRMSNorm"),
    "fuse-gelu": ("fusion", "FuseGelu"),
    "fuse-gated-activation": ("fusion", "FuseGatedActivation"),
    "fuse-rotary-embedding": ("fusion", "FuseRotaryEmbedding"),
    "fuse-attention": ("fusion", "FuseAttention"),
    "fuse-qkv": ("fusion", "FuseQKV"),
    "fuse-gate-up": ("fusion", "FuseGateUp"),
    "transpose-linears": ("cleanup", "TransposeLinears"),
    "prepare-decoder": ("decoding", "PrepareDecoder"),
    "hoist-row-selection": ("decoding", "HoistRowSelection"),
    "unflatten-rows": ("decoding", "UnflattenRows"),
    "tabulate-positions": ("decoding", "TabulatePositions"),
    "rotate-hidden-states": ("quantization", "RotateHiddenStates"),
    "smooth-activations": ("quantization", "SmoothActivations"),
    "scale-salient-channels": ("quantization", "ScaleSalientChannels"),
    "train-equivalent-scales": ("quantization", "TrainEquivalentScales"),
    "quantize-linears": ("quantization", "QuantizeLinears"),
    "quantize-embeddings": ("quantization", "QuantizeEmbeddings"),
    "quantize-attention": ("quantization", "QuantizeAttention"),
    "split-outlier-columns": ("quantization", "SplitOutlierColumns"),
    "split-outlier-weights": ("quantization", "SplitOutlierWeights"),
    "compress-linears": ("sparsity.compression", "CompressLinears"),
    "decompress-linears": ("sparsity.compression", "DecompressLinears"),
    "reduce-projections": ("adapters", "ReduceProjections"),
    "insert-adapters": ("adapters", "InsertAdapters"),
    "merge-adapters": ("adapters", "MergeAdapters"),
    "delete-ranks": ("adapters", "DeleteRanks"),
    "remove-adapters": ("adapters", "RemoveAdapters"),
    "unmerge-adapters": ("adapters", "UnmergeAdapters"),
    "fold-adapters": ("adapters", "FoldAdapters"),
    "gate-adapters": ("adapters", "GateAdapters"),
    "adapters-as-inputs": ("adapters", "AdaptersAsInputs"),
    "share-layers": ("sharing", "ShareLayers"),
    "classify-repetitions": ("sharing", "ClassifyRepetitions"),
    "deepen-layers": ("sharing", "DeepenLayers"),
    "drop-blocks": ("sharing", "DropBlocks"),
    "truncate-depth": ("sharing", "TruncateDepth"),
    "share-heads": ("sharing", "ShareHeads"),
    "prune-linears": ("sparsity", "PruneLinears"),
    "prune-by-masks": ("sparsity", "PruneByMasks"),
    "hold-masks": ("sparsity", "HoldMasks"),
    "release-masks": ("sparsity", "ReleaseMasks"),
    "insert-fake-quantize": ("quantization", "InsertFakeQuantize"),
    "remove-heads": ("removal", "RemoveHeads"),
    "remove-channels": ("removal", "RemoveChannels"),
    "remove-hidden-dims": ("removal", "RemoveHiddenDims"),
    "tap-features": ("distillation", "TapFeatures"),
    "remove-taps": ("distillation", "RemoveTaps"),
    "convert-fake-quantize": ("quantization", "ConvertFakeQuantize"),
}


def names() -> list[str]:
    """Every known pass name, sorted."""
    return sorted({*BUILT_IN, *_third_party()})


def get(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        InputError: no such pass, or an installed package registers one that cannot be loaded.
    """
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name]
        found: type[Pass] = getattr(importlib.import_module(f"graphwright.passes.{module}"), attribute)
        return found
    others = _third_party()
    if name not in others:
        near = difflib.get_close_matches(name, names(), n=1)
        raise InputError(
            f"there is no pass {name!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"known passes: {', '.join(names())}",
        )
    try:
        loaded = others[name].load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"the pass {name!r} of package {_owner(others[name])} cannot be loaded: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)) or loaded.name != name:
        raise InputError(
            f"the entry point {name!r} of package {_owner(others[name])} is not a pass of that name",
            hint=f"point it at a subclass of graphwright.Pass with name = {name!r}",
        )
    return loaded


def create(name: str, options: Mapping[str, Any]) -> Pass:
    """A pass from its name and options.

    Raises:
        InputError: no such pass, an unknown option, or an option value the pass refuses.
    """
    kind = get(name)
    known = [item.name for item in dataclasses.fields(kind) if item.init]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            raise InputError(
                f"the pass {name!r} has no option {option!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"its options: {', '.join(known)}",
            )
    try:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
        }
        return kind(**values)
    except TypeError as error:
        raise InputError(f"the pass {name!r} does not take these options: {error}") from error


def _third_party() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in BUILT_IN or entry.name in found:
            other = "graphwright" if entry.name in BUILT_IN else _owner(found[entry.name])
            raise InputError(f"the package {_owner(entry)} registers a pass {entry.name!r}, which {other} already has")
        found[entry.name] = entry
    return found


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
