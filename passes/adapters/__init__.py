"""Adapters: small trained parts beside the layers of a frozen model.

``kinds/`` has one file for each published shape; everything else is the same for all of them.
"""

from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor
from graphwright.passes.adapters.files import load_adapter, save_adapter
from graphwright.passes.adapters.gating import GateAdapters, adapter_weights
from graphwright.passes.adapters.inputs import AdaptersAsInputs, adapter_inputs
from graphwright.passes.adapters.inserted import adapter_tensors, adapters_of
from graphwright.passes.adapters.insertion import InsertAdapters
from graphwright.passes.adapters.kinds.dora import DoRA
from graphwright.passes.adapters.kinds.ia3 import IA3
from graphwright.passes.adapters.kinds.krona import KronA, kronecker_shapes
from graphwright.passes.adapters.kinds.krona_block import KronABlock
from graphwright.passes.adapters.kinds.loha import LoHa
from graphwright.passes.adapters.kinds.lokr import LoKr
from graphwright.passes.adapters.kinds.lora import LoRA
from graphwright.passes.adapters.kinds.lora_fa import LoRAFA
from graphwright.passes.adapters.kinds.vera import VeRA
from graphwright.passes.adapters.merging import MergeAdapters, RemoveAdapters
from graphwright.passes.adapters.parameters import adapter_parameters
from graphwright.passes.adapters.unmerging import UnmergeAdapters

__all__ = [
    "AdapterKind",
    "AdaptersAsInputs",
    "Dense",
    "Draw",
    "Factor",
    "GateAdapters",
    "InsertAdapters",
    "KronA",
    "DoRA",
    "IA3",
    "LoHa",
    "LoKr",
    "LoRAFA",
    "VeRA",
    "KronABlock",
    "LoRA",
    "MergeAdapters",
    "RemoveAdapters",
    "UnmergeAdapters",
    "adapter_inputs",
    "adapter_parameters",
    "adapter_tensors",
    "adapter_weights",
    "adapters_of",
    "kronecker_shapes",
    "load_adapter",
    "save_adapter",
]
