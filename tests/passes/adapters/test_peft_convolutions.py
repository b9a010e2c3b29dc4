"""Adapters of convolutions in PEFT's layout, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.adapters.peft_models import adapted, peft
from torch import nn

import graphwright as gw
from graphwright.passes.adapters.files import load_adapter

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Convolutions over two dimensions and over one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 12, (3, 1), bias=False)
        self.third = nn.Conv1d(12, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.third(torch.relu(self.second(torch.relu(self.first(x)))).flatten(2))
        return y


CONFIGS: dict[str, Any] = {
    "dora": peft.LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=["first", "second", "third"]),
    "lora-bias": peft.LoraConfig(r=2, lora_bias=True, target_modules=["first", "third"]),
    "ia3": peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=["first", "second", "third"]),
    "lokr": peft.LoKrConfig(r=1, alpha=3, target_modules=["first", "third"]),
    "lokr-whole": peft.LoKrConfig(r=9, target_modules=["first", "second"]),
    "lora": peft.LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second", "third"]),
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_both_ways(name: str, tmp_path: Path) -> None:
    model = adapted(Net(), CONFIGS[name])
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        wanted = model(X)
    program = gw.optimize(Net(), [gw.InsertAdapters(tmp_path / "theirs")], example_inputs=X, verify=False)
    assert (wanted - Net()(X)).norm() > 1e-3 * wanted.norm()
    assert (program(X) - wanted).norm() <= 5e-6 * wanted.norm()
    gw.save_adapter(program, tmp_path / "ours", layout="peft")
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours").eval()
    assert (again(X) - wanted).norm() <= 5e-6 * wanted.norm()


def test_a_factor_that_peft_multiplies_otherwise_is_refused(tmp_path: Path) -> None:
    adapted(Net(), peft.LoKrConfig(r=9, target_modules=["third"])).save_pretrained(tmp_path / "theirs")
    with pytest.raises(gw.InputError, match=r"third.lokr_w2 is a Conv1d's whole factor"):
        load_adapter(tmp_path / "theirs")
    kind = gw.LoKr(rank=9, ops=("conv",))
    program = gw.optimize(Net(), [gw.InsertAdapters(kind, where="third")], example_inputs=X, verify=False)
    with pytest.raises(gw.InputError, match=r"third.lokr_w2 is a Conv1d's whole factor"):
        gw.save_adapter(program, tmp_path / "ours", layout="peft")


def test_cores_of_kernels_are_refused(tmp_path: Path) -> None:
    adapted(Net(), peft.LoHaConfig(r=2, use_effective_conv2d=True, target_modules=["first"])).save_pretrained(tmp_path)
    with pytest.raises(gw.InputError, match="use_effective_conv2d=True is not supported"):
        load_adapter(tmp_path)
