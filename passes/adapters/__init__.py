"""Adapters: small trained parts beside the layers of a frozen model.

``kinds/`` has one file for each published shape; everything else is the same for all of them.
"""

from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor
from graphwright.passes.adapters.files import load_adapter, save_adapter
from graphwright.passes.adapters.folding import FoldAdapters
from graphwright.passes.adapters.gating import GateAdapters, adapter_weights
from graphwright.passes.adapters.inputs import AdaptersAsInputs, adapter_inputs
from graphwright.passes.adapters.inserted import adapter_tensors, adapters_of
from graphwright.passes.adapters.insertion import InsertAdapters
from graphwright.passes.adapters.kinds.bitfit import BitFit
from graphwright.passes.adapters.kinds.compacter import Compacter
from graphwright.passes.adapters.kinds.dora import DoRA
from graphwright.passes.adapters.kinds.ether import ETHER, ETHERPlus
from graphwright.passes.adapters.kinds.houlsby import HoulsbyAdapter
from graphwright.passes.adapters.kinds.ia3 import IA3
from graphwright.passes.adapters.kinds.krona import KronA, kronecker_shapes
from graphwright.passes.adapters.kinds.krona_block import KronABlock
from graphwright.passes.adapters.kinds.loda import LoDA
from graphwright.passes.adapters.kinds.loha import LoHa
from graphwright.passes.adapters.kinds.lokr import LoKr
from graphwright.passes.adapters.kinds.lora import LoRA
from graphwright.passes.adapters.kinds.lora_fa import LoRAFA
from graphwright.passes.adapters.kinds.lora_xs import LoRAXS
from graphwright.passes.adapters.kinds.nola import NOLA
from graphwright.passes.adapters.kinds.oft import OFT
from graphwright.passes.adapters.kinds.parallel import ParallelAdapter
from graphwright.passes.adapters.kinds.prefix import PrefixTuning
from graphwright.passes.adapters.kinds.prompt import DePT, PromptTuning
from graphwright.passes.adapters.kinds.sora import SoRA
from graphwright.passes.adapters.kinds.vera import VeRA
from graphwright.passes.adapters.merging import MergeAdapters, RemoveAdapters
from graphwright.passes.adapters.parameters import adapter_parameters
from graphwright.passes.adapters.projections import ReduceProjections
from graphwright.passes.adapters.ranks import DeleteRanks, shrink_gates
from graphwright.passes.adapters.unmerging import UnmergeAdapters

__all__ = [
    "UnmergeAdapters",
    "adapter_parameters",
    "AdapterKind",
    "AdaptersAsInputs",
    "BitFit",
    "Compacter",
    "DeleteRanks",
    "Dense",
    "DePT",
    "DoRA",
    "Draw",
    "ETHER",
    "ETHERPlus",
    "Factor",
    "FoldAdapters",
    "GateAdapters",
    "HoulsbyAdapter",
    "IA3",
    "InsertAdapters",
    "KronA",
    "KronABlock",
    "LoDA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAXS",
    "MergeAdapters",
    "NOLA",
    "OFT",
    "ParallelAdapter",
    "PrefixTuning",
    "PromptTuning",
    "ReduceProjections",
    "RemoveAdapters",
    "SoRA",
    "VeRA",
    "adapter_inputs",
    "adapter_tensors",
    "adapter_weights",
    "adapters_of",
    "kronecker_shapes",
    "load_adapter",
    "save_adapter",
    "shrink_gates",
]
