"""graphwright: compiler passes for PyTorch and ONNX models, each one checked numerically the moment it has run.

This file is installed as ``graphwright/__init__.py``. It imports nothing until a name is asked for, so that
``import graphwright`` and the command line's ``--help`` stay instant. To export a name, add it twice: to the
imports that type checkers read, and to ``_NAMES``; ``tests/test_packaging.py`` holds the two against each other.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphwright.backends.cpu import CpuBackend as CpuBackend
    from graphwright.backends.cpu import PackedModel as PackedModel
    from graphwright.backends.depth import DepthSchedule as DepthSchedule
    from graphwright.backends.onnx import export_genai as export_genai
    from graphwright.backends.onnx import export_onnx as export_onnx
    from graphwright.backends.triton import TritonBackend as TritonBackend
    from graphwright.frontends.api import OptimizedModel as OptimizedModel
    from graphwright.frontends.api import optimize as optimize
    from graphwright.frontends.autoquantize import Absolute as Absolute
    from graphwright.frontends.autoquantize import AutoQuantizeResult as AutoQuantizeResult
    from graphwright.frontends.autoquantize import Limits as Limits
    from graphwright.frontends.autoquantize import Relative as Relative
    from graphwright.frontends.autoquantize import SearchSpace as SearchSpace
    from graphwright.frontends.autoquantize import Trial as Trial
    from graphwright.frontends.autoquantize import auto_quantize as auto_quantize
    from graphwright.frontends.generation.chat import Chat as Chat
    from graphwright.frontends.generation.decoder import Decoder as Decoder
    from graphwright.frontends.generation.decoder_draft import DecoderDraft as DecoderDraft
    from graphwright.frontends.generation.drafts import Draft as Draft
    from graphwright.frontends.generation.drafts import PromptLookup as PromptLookup
    from graphwright.frontends.generation.drafts import Proposal as Proposal
    from graphwright.frontends.generation.drafts import Proposer as Proposer
    from graphwright.frontends.generation.drafts import Wanted as Wanted
    from graphwright.frontends.generation.facts import DecoderFacts as DecoderFacts
    from graphwright.frontends.generation.optimized import OptimizedDecoder as OptimizedDecoder
    from graphwright.frontends.generation.packed import PackedDecoder as PackedDecoder
    from graphwright.frontends.generation.packed import load_packed as load_packed
    from graphwright.frontends.generation.prompt_cache import PromptCache as PromptCache
    from graphwright.frontends.generation.result import Generation as Generation
    from graphwright.frontends.generation.result import Pipelining as Pipelining
    from graphwright.frontends.generation.sampling import Sampling as Sampling
    from graphwright.frontends.generation.stream import Stream as Stream
    from graphwright.frontends.huggingface import load_decoder as load_decoder
    from graphwright.frontends.huggingface import load_huggingface as load_huggingface
    from graphwright.frontends.huggingface.distillation import distilling as distilling
    from graphwright.frontends.huggingface.quantized import SavedModel as SavedModel
    from graphwright.frontends.huggingface.quantized import save_quantized as save_quantized
    from graphwright.frontends.huggingface.trainer import trainable as trainable
    from graphwright.frontends.recipes import load_recipe as load_recipe
    from graphwright.frontends.recipes import save_recipe as save_recipe
    from graphwright.frontends.torch import trace as trace
    from graphwright.ir.checkpointing import checkpoint_blocks as checkpoint_blocks
    from graphwright.ir.cost import cost_of as cost_of
    from graphwright.ir.diff import diff as diff
    from graphwright.ir.equality import structurally_equal as structurally_equal
    from graphwright.ir.errors import BackendError as BackendError
    from graphwright.ir.errors import ContractViolation as ContractViolation
    from graphwright.ir.errors import ExportError as ExportError
    from graphwright.ir.errors import GenerationError as GenerationError
    from graphwright.ir.errors import GraphwrightError as GraphwrightError
    from graphwright.ir.errors import InputError as InputError
    from graphwright.ir.errors import OrderError as OrderError
    from graphwright.ir.errors import PassError as PassError
    from graphwright.ir.errors import ProgramError as ProgramError
    from graphwright.ir.errors import RecipeError as RecipeError
    from graphwright.ir.errors import SelectionError as SelectionError
    from graphwright.ir.errors import SerializationError as SerializationError
    from graphwright.ir.errors import TraceError as TraceError
    from graphwright.ir.errors import TypeMismatch as TypeMismatch
    from graphwright.ir.names import op_name as op_name
    from graphwright.ir.parser import parse as parse
    from graphwright.ir.pattern import Match as Match
    from graphwright.ir.pattern import Matcher as Matcher
    from graphwright.ir.pattern import Refusal as Refusal
    from graphwright.ir.pattern import Rule as Rule
    from graphwright.ir.pattern import any_ as any_
    from graphwright.ir.pattern import const as const
    from graphwright.ir.pattern import either as either
    from graphwright.ir.pattern import maybe as maybe
    from graphwright.ir.pattern import op as op
    from graphwright.ir.pattern import weight as weight
    from graphwright.ir.program import Program as Program
    from graphwright.ir.provenance import path_of as path_of
    from graphwright.ir.provenance import tags_of as tags_of
    from graphwright.ir.pruned import PrunedWeight as PrunedWeight
    from graphwright.ir.pruned import pruned_weights as pruned_weights
    from graphwright.ir.repetitions import Sharing as Sharing
    from graphwright.ir.repetitions import repetitions_of as repetitions_of
    from graphwright.ir.rewriter import Rewriter as Rewriter
    from graphwright.ir.sparsity import SparsityPattern as SparsityPattern
    from graphwright.ir.stacks import find_stacks as find_stacks
    from graphwright.ir.taps import Tapped as Tapped
    from graphwright.ir.types import Dim as Dim
    from graphwright.ir.types import TensorType as TensorType
    from graphwright.ir.verifier import verify as verify
    from graphwright.passes.adapters import ETHER as ETHER
    from graphwright.passes.adapters import IA3 as IA3
    from graphwright.passes.adapters import NOLA as NOLA
    from graphwright.passes.adapters import OFT as OFT
    from graphwright.passes.adapters import AdapterKind as AdapterKind
    from graphwright.passes.adapters import AdaptersAsInputs as AdaptersAsInputs
    from graphwright.passes.adapters import BitFit as BitFit
    from graphwright.passes.adapters import Compacter as Compacter
    from graphwright.passes.adapters import DeleteRanks as DeleteRanks
    from graphwright.passes.adapters import DePT as DePT
    from graphwright.passes.adapters import DoRA as DoRA
    from graphwright.passes.adapters import ETHERPlus as ETHERPlus
    from graphwright.passes.adapters import FoldAdapters as FoldAdapters
    from graphwright.passes.adapters import GateAdapters as GateAdapters
    from graphwright.passes.adapters import HoulsbyAdapter as HoulsbyAdapter
    from graphwright.passes.adapters import InsertAdapters as InsertAdapters
    from graphwright.passes.adapters import KronA as KronA
    from graphwright.passes.adapters import KronABlock as KronABlock
    from graphwright.passes.adapters import LoDA as LoDA
    from graphwright.passes.adapters import LoHa as LoHa
    from graphwright.passes.adapters import LoKr as LoKr
    from graphwright.passes.adapters import LoRA as LoRA
    from graphwright.passes.adapters import LoRAFA as LoRAFA
    from graphwright.passes.adapters import LoRAXS as LoRAXS
    from graphwright.passes.adapters import MergeAdapters as MergeAdapters
    from graphwright.passes.adapters import ParallelAdapter as ParallelAdapter
    from graphwright.passes.adapters import PrefixTuning as PrefixTuning
    from graphwright.passes.adapters import PromptTuning as PromptTuning
    from graphwright.passes.adapters import ReduceProjections as ReduceProjections
    from graphwright.passes.adapters import RemoveAdapters as RemoveAdapters
    from graphwright.passes.adapters import SoRA as SoRA
    from graphwright.passes.adapters import UnmergeAdapters as UnmergeAdapters
    from graphwright.passes.adapters import VeRA as VeRA
    from graphwright.passes.adapters import adapter_inputs as adapter_inputs
    from graphwright.passes.adapters import adapter_parameters as adapter_parameters
    from graphwright.passes.adapters import adapter_tensors as adapter_tensors
    from graphwright.passes.adapters import adapter_weights as adapter_weights
    from graphwright.passes.adapters import adapters_of as adapters_of
    from graphwright.passes.adapters import kronecker_shapes as kronecker_shapes
    from graphwright.passes.adapters import load_adapter as load_adapter
    from graphwright.passes.adapters import save_adapter as save_adapter
    from graphwright.passes.adapters import shrink_gates as shrink_gates
    from graphwright.passes.base import Pass as Pass
    from graphwright.passes.base import RulePass as RulePass
    from graphwright.passes.bisection import bisect as bisect
    from graphwright.passes.calibration import CalibrationData as CalibrationData
    from graphwright.passes.cleanup import CanonicalizeLinears as CanonicalizeLinears
    from graphwright.passes.cleanup import Cleanup as Cleanup
    from graphwright.passes.cleanup import EliminateCommonSubexpressions as EliminateCommonSubexpressions
    from graphwright.passes.cleanup import FoldConstants as FoldConstants
    from graphwright.passes.cleanup import RemoveDeadCode as RemoveDeadCode
    from graphwright.passes.cleanup import RemoveNoOps as RemoveNoOps
    from graphwright.passes.cleanup import TransposeLinears as TransposeLinears
    from graphwright.passes.contract import Approximate as Approximate
    from graphwright.passes.contract import Exact as Exact
    from graphwright.passes.contract import Retrain as Retrain
    from graphwright.passes.decoding import HoistRowSelection as HoistRowSelection
    from graphwright.passes.decoding import PrepareDecoder as PrepareDecoder
    from graphwright.passes.decoding import TabulatePositions as TabulatePositions
    from graphwright.passes.decoding import UnflattenRows as UnflattenRows
    from graphwright.passes.distillation import CrossEntropy as CrossEntropy
    from graphwright.passes.distillation import HiddenCosine as HiddenCosine
    from graphwright.passes.distillation import KLDivergence as KLDivergence
    from graphwright.passes.distillation import NearestNeighbours as NearestNeighbours
    from graphwright.passes.distillation import RemoveTaps as RemoveTaps
    from graphwright.passes.distillation import SquareHead as SquareHead
    from graphwright.passes.distillation import TapFeatures as TapFeatures
    from graphwright.passes.distillation import TaskLoss as TaskLoss
    from graphwright.passes.distillation import Term as Term
    from graphwright.passes.distillation import class_distillation as class_distillation
    from graphwright.passes.distillation import distill as distill
    from graphwright.passes.distillation import teacher_of as teacher_of
    from graphwright.passes.fusion import FuseAll as FuseAll
    from graphwright.passes.fusion import FuseAttention as FuseAttention
    from graphwright.passes.fusion import FuseGatedActivation as FuseGatedActivation
    from graphwright.passes.fusion import FuseGateUp as FuseGateUp
    from graphwright.passes.fusion import FuseGelu as FuseGelu
    from graphwright.passes.fusion import FuseLayerNorm as FuseLayerNorm
    from graphwright.passes.fusion import FuseQKV as FuseQKV
    from graphwright.passes.fusion import FuseRMSNorm as FuseRMSNorm
    from graphwright.passes.fusion import FuseRotaryEmbedding as FuseRotaryEmbedding
    from graphwright.passes.hooks import DumpIR as DumpIR
    from graphwright.passes.hooks import Hook as Hook
    from graphwright.passes.pipeline import Pipeline as Pipeline
    from graphwright.passes.pipeline import run_passes as run_passes
    from graphwright.passes.quantization import Allocation as Allocation
    from graphwright.passes.quantization import AutoRound as AutoRound
    from graphwright.passes.quantization import ClippedNearest as ClippedNearest
    from graphwright.passes.quantization import ConvertFakeQuantize as ConvertFakeQuantize
    from graphwright.passes.quantization import Gptq as Gptq
    from graphwright.passes.quantization import Hqq as Hqq
    from graphwright.passes.quantization import InsertFakeQuantize as InsertFakeQuantize
    from graphwright.passes.quantization import LinearSensitivity as LinearSensitivity
    from graphwright.passes.quantization import LoftQ as LoftQ
    from graphwright.passes.quantization import LowRank as LowRank
    from graphwright.passes.quantization import Nearest as Nearest
    from graphwright.passes.quantization import QuantizeAttention as QuantizeAttention
    from graphwright.passes.quantization import QuantizeEmbeddings as QuantizeEmbeddings
    from graphwright.passes.quantization import QuantizeLinears as QuantizeLinears
    from graphwright.passes.quantization import RotateHiddenStates as RotateHiddenStates
    from graphwright.passes.quantization import ScaleSalientChannels as ScaleSalientChannels
    from graphwright.passes.quantization import Sensitivities as Sensitivities
    from graphwright.passes.quantization import SmoothActivations as SmoothActivations
    from graphwright.passes.quantization import SplitOutlierColumns as SplitOutlierColumns
    from graphwright.passes.quantization import SplitOutlierWeights as SplitOutlierWeights
    from graphwright.passes.quantization import TrainEquivalentScales as TrainEquivalentScales
    from graphwright.passes.quantization import allocate as allocate
    from graphwright.passes.quantization import sensitivities as sensitivities
    from graphwright.passes.quantization import skip_by_kurtosis as skip_by_kurtosis
    from graphwright.passes.removal import RemoveChannels as RemoveChannels
    from graphwright.passes.removal import RemoveHeads as RemoveHeads
    from graphwright.passes.removal import RemoveHiddenDims as RemoveHiddenDims
    from graphwright.passes.report import PassRecord as PassRecord
    from graphwright.passes.report import Report as Report
    from graphwright.passes.selection import Select as Select
    from graphwright.passes.sharing import ClassifyRepetitions as ClassifyRepetitions
    from graphwright.passes.sharing import DeepenLayers as DeepenLayers
    from graphwright.passes.sharing import DropBlocks as DropBlocks
    from graphwright.passes.sharing import ShareHeads as ShareHeads
    from graphwright.passes.sharing import ShareLayers as ShareLayers
    from graphwright.passes.sharing import TruncateDepth as TruncateDepth
    from graphwright.passes.sharing import repetition_loss as repetition_loss
    from graphwright.passes.sharing import repetition_weights as repetition_weights
    from graphwright.passes.sparsity import CubicSchedule as CubicSchedule
    from graphwright.passes.sparsity import HoldMasks as HoldMasks
    from graphwright.passes.sparsity import LadderSchedule as LadderSchedule
    from graphwright.passes.sparsity import LinearSparsity as LinearSparsity
    from graphwright.passes.sparsity import LossDriven as LossDriven
    from graphwright.passes.sparsity import Magnitude as Magnitude
    from graphwright.passes.sparsity import PruneByMasks as PruneByMasks
    from graphwright.passes.sparsity import PruneGradually as PruneGradually
    from graphwright.passes.sparsity import PruneLinears as PruneLinears
    from graphwright.passes.sparsity import PruningMethod as PruningMethod
    from graphwright.passes.sparsity import ReleaseMasks as ReleaseMasks
    from graphwright.passes.sparsity import SparseGpt as SparseGpt
    from graphwright.passes.sparsity import SparsityDescription as SparsityDescription
    from graphwright.passes.sparsity import SparsitySchedule as SparsitySchedule
    from graphwright.passes.sparsity import Wanda as Wanda
    from graphwright.passes.sparsity import describe_sparsity as describe_sparsity
    from graphwright.passes.sparsity.compression import CompressLinears as CompressLinears
    from graphwright.passes.sparsity.compression import DecompressLinears as DecompressLinears
    from graphwright.passes.training import TrainingMemory as TrainingMemory
    from graphwright.passes.training import training_memory as training_memory
    from graphwright.passes.verification import Verification as Verification
    from graphwright.passes.verification import Verifier as Verifier

    __version__: str

# module -> the names that it defines
_NAMES: dict[str, str] = {
    "graphwright.backends.cpu": "CpuBackend PackedModel",
    "graphwright.backends.onnx": "export_genai export_onnx",
    "graphwright.backends.depth": "DepthSchedule",
    "graphwright.backends.triton": "TritonBackend",
    "graphwright.frontends.api": "OptimizedModel optimize",
    "graphwright.frontends.autoquantize": "Absolute AutoQuantizeResult Limits Relative SearchSpace Trial auto_quantize",
    "graphwright.frontends.generation.chat": "Chat",
    "graphwright.frontends.generation.decoder": "Decoder",
    "graphwright.frontends.generation.decoder_draft": "DecoderDraft",
    "graphwright.frontends.generation.drafts": "Draft PromptLookup Proposal Proposer Wanted",
    "graphwright.frontends.generation.facts": "DecoderFacts",
    "graphwright.frontends.generation.optimized": "OptimizedDecoder",
    "graphwright.frontends.generation.packed": "PackedDecoder load_packed",
    "graphwright.frontends.generation.prompt_cache": "PromptCache",
    "graphwright.frontends.generation.result": "Generation Pipelining",
    "graphwright.frontends.generation.sampling": "Sampling",
    "graphwright.frontends.generation.stream": "Stream",
    "graphwright.frontends.huggingface": "load_decoder load_huggingface",
    "graphwright.frontends.huggingface.distillation": "distilling",
    "graphwright.frontends.huggingface.quantized": "SavedModel save_quantized",
    "graphwright.frontends.huggingface.trainer": "trainable",
    "graphwright.frontends.recipes": "load_recipe save_recipe",
    "graphwright.frontends.torch": "trace",
    "graphwright.ir.checkpointing": "checkpoint_blocks",
    "graphwright.ir.cost": "cost_of",
    "graphwright.ir.diff": "diff",
    "graphwright.ir.equality": "structurally_equal",
    "graphwright.ir.errors": (
        "BackendError ContractViolation ExportError GenerationError GraphwrightError InputError OrderError "
        "PassError ProgramError RecipeError SelectionError SerializationError TraceError TypeMismatch"
    ),
    "graphwright.ir.names": "op_name",
    "graphwright.ir.parser": "parse",
    "graphwright.ir.pattern": "Match Matcher Refusal Rule any_ const either maybe op weight",
    "graphwright.ir.program": "Program",
    "graphwright.ir.provenance": "path_of tags_of",
    "graphwright.ir.pruned": "PrunedWeight pruned_weights",
    "graphwright.ir.repetitions": "Sharing repetitions_of",
    "graphwright.ir.rewriter": "Rewriter",
    "graphwright.ir.sparsity": "SparsityPattern",
    "graphwright.ir.stacks": "find_stacks",
    "graphwright.ir.taps": "Tapped",
    "graphwright.ir.types": "Dim TensorType",
    "graphwright.ir.verifier": "verify",
    "graphwright.passes.adapters": (
        "AdapterKind AdaptersAsInputs BitFit Compacter DePT DeleteRanks DoRA ETHER ETHERPlus FoldAdapters "
        "GateAdapters HoulsbyAdapter IA3 InsertAdapters KronA KronABlock LoDA LoHa LoKr LoRA LoRAFA LoRAXS "
        "MergeAdapters NOLA OFT ParallelAdapter PrefixTuning PromptTuning ReduceProjections RemoveAdapters "
        "SoRA UnmergeAdapters VeRA adapter_inputs adapter_parameters adapter_tensors adapter_weights "
        "adapters_of kronecker_shapes load_adapter save_adapter shrink_gates"
    ),
    "graphwright.passes.base": "Pass RulePass",
    "graphwright.passes.bisection": "bisect",
    "graphwright.passes.calibration": "CalibrationData",
    "graphwright.passes.cleanup": (
        "CanonicalizeLinears Cleanup EliminateCommonSubexpressions FoldConstants RemoveDeadCode RemoveNoOps "
        "TransposeLinears"
    ),
    "graphwright.passes.contract": "Approximate Exact Retrain",
    "graphwright.passes.decoding": "HoistRowSelection PrepareDecoder TabulatePositions UnflattenRows",
    "graphwright.passes.distillation": (
        "CrossEntropy HiddenCosine KLDivergence NearestNeighbours RemoveTaps SquareHead TapFeatures TaskLoss "
        "Term class_distillation distill teacher_of"
    ),
    "graphwright.passes.fusion": (
        "FuseAll FuseAttention FuseGateUp FuseGatedActivation FuseGelu FuseLayerNorm FuseQKV FuseRMSNorm "
        "FuseRotaryEmbedding"
    ),
    "graphwright.passes.hooks": "DumpIR Hook",
    "graphwright.passes.pipeline": "Pipeline run_passes",
    "graphwright.passes.quantization": (
        "Allocation AutoRound ClippedNearest ConvertFakeQuantize Gptq Hqq InsertFakeQuantize "
        "LinearSensitivity LoftQ LowRank Nearest QuantizeAttention QuantizeEmbeddings QuantizeLinears "
        "RotateHiddenStates ScaleSalientChannels Sensitivities SmoothActivations SplitOutlierColumns "
        "SplitOutlierWeights TrainEquivalentScales allocate sensitivities skip_by_kurtosis"
    ),
    "graphwright.passes.removal": "RemoveChannels RemoveHeads RemoveHiddenDims",
    "graphwright.passes.report": "PassRecord Report",
    "graphwright.passes.selection": "Select",
    "graphwright.passes.sharing": (
        "ClassifyRepetitions DeepenLayers DropBlocks ShareHeads ShareLayers TruncateDepth repetition_loss "
        "repetition_weights"
    ),
    "graphwright.passes.sparsity": (
        "CubicSchedule HoldMasks LadderSchedule LinearSparsity LossDriven Magnitude PruneByMasks "
        "PruneGradually PruneLinears PruningMethod ReleaseMasks SparseGpt SparsityDescription "
        "SparsitySchedule Wanda describe_sparsity"
    ),
    "graphwright.passes.sparsity.compression": "CompressLinears DecompressLinears",
    "graphwright.passes.training": "TrainingMemory training_memory",
    "graphwright.passes.verification": "Verification Verifier",
}
_EXPORTS: dict[str, str] = {name: module for module, names in _NAMES.items() for name in names.split()}


if not TYPE_CHECKING:  # else every misspelt name would pass the type checker

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            value: object = version("graphwright")
        elif name in _EXPORTS:
            value = getattr(import_module(_EXPORTS[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # the next look-up does not come here again
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, "__version__"})
