"""Students in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.frontends.test_trainer import STEPS, Data
from tests.passes.adapters.models import traced
from tests.passes.distillation.test_distill import shaken

import graphwright as gw

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LOSS = [gw.TaskLoss(), gw.KLDivergence(), gw.SquareHead()]


def trainer_of(student: gw.Program, folder: Path, **options: Any) -> Any:
    data = Data(tokens=False)
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=0.005,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        **options,
    )
    module = gw.distilling(student, traced("bert"), loss=LOSS, teacher_dtype=torch.bfloat16)
    return transformers.Trainer(module, arguments, train_dataset=data, eval_dataset=data)


def test_it_trains_the_student_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = shaken("bert")
    trainer = trainer_of(whole, tmp_path / "whole")
    before = {name: each.detach().clone() for name, each in trainer.model.teacher.tensors().items()}
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * start
    assert all(torch.equal(each, before[name]) for name, each in trainer.model.teacher.tensors().items())
    saved = load_file(tmp_path / "whole" / f"checkpoint-{STEPS}" / "model.safetensors")
    assert saved.keys() == dict(whole.named_parameters()).keys()
    assert all(torch.equal(each, whole.tensor(name)) for name, each in saved.items())
    again = shaken("bert")
    trainer_of(again, tmp_path / "whole").train(str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}"))
    assert all(torch.equal(each, again.tensor(name)) for name, each in whole.tensors().items())


def test_layers_are_computed_again_on_request() -> None:
    student = shaken("bert")
    module = gw.distilling(student, traced("bert"), loss=LOSS)
    batch = {name: torch.stack([Data(tokens=False)[i][name] for i in range(4)]) for name in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    found = []
    for call in (module.gradient_checkpointing_enable, module.gradient_checkpointing_disable):
        call()
        student.zero_grad()
        module(**batch)["loss"].backward()
        found.append({name: each.grad.clone() for name, each in student.named_parameters() if each.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(each, found[1][name]) for name, each in found[0].items())
