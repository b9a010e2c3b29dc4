"""NNCF, on a Python of its own: a model's linears compressed to INT4, written as the floats they stand for.

Settings that look at data (AWQ, scale estimation) take the calibration windows.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import nncf
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM


class _Weights(TorchFunctionMode):
    """Notes the weight that each linear is called with, once NNCF has unpacked it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, torch.Tensor] = {}
        self._name = ""

    def come(self, name: str) -> None:
        """The next call is that of this module."""
        self._name = f"{name}.weight"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            self.found[self._name] = args[1].detach().float().clone()
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Compress and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True, choices=[4])
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data-aware", action="store_true", help="AWQ and scale estimation")
    given = parser.parse_args()
    shutil.copytree(given.model, given.out, dirs_exist_ok=True)
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    model.eval()
    model.config.use_cache = False
    windows = load_file(given.calibration)["input_ids"]
    whole = torch.ones(1, windows.shape[1], dtype=torch.int64)
    batches = [{"input_ids": window.unsqueeze(0), "attention_mask": whole} for window in windows]
    small = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=given.group,
        ratio=1.0,
        all_layers=False,
        ignored_scope=nncf.IgnoredScope(patterns=[".*lm_head.*", ".*embed.*"], validate=False),
        dataset=nncf.Dataset(batches),
        awq=given.data_aware,
        scale_estimation=given.data_aware,
    )
    seen = _Weights()
    for name, module in small.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda *_, name=name: seen.come(name))
    with torch.no_grad(), seen:
        small(**batches[0])
    (file,) = given.out.glob("*.safetensors")
    weights = {name: seen.found.get(name, value.float()) for name, value in load_file(file).items()}
    save_file(weights, file)


if __name__ == "__main__":
    main()
