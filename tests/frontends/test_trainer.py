"""Programs with adapters in transformers' Trainer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.passes.adapters.models import classifier, traced

import graphwright as gw

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 8


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows that repeat one token, of which the class is whether it is a low one."""

    def __init__(self, *, tokens: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 61, (32, 1), generator=generator).repeat(1, 9)
        self.labels = self.ids if tokens else (self.ids[:, 0] < 30).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        # The program does not take the last one, so the Trainer has to leave it out.
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index], "number": ids}


def program_of(data: Data, **options: Any) -> gw.OptimizedModel:
    name = "llama" if data.labels.dim() == 2 else "bert"
    batch = {key: torch.stack([data[0][key], data[1][key]]) for key in ("input_ids", "attention_mask", "labels")}
    adapt = gw.InsertAdapters(gw.LoRA(rank=4), ignore="classifier", **options)
    return gw.optimize(traced(name), [adapt], example_inputs=batch)


def trainer_of(program: gw.Program, data: Data, folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=0.05,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        **options,
    )
    return transformers.Trainer(gw.trainable(program), arguments, train_dataset=data, eval_dataset=data)


def trained(program: gw.Program) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in program.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("tokens", [False, True], ids=["bert", "llama"])
def test_it_trains_the_adapter_and_nothing_else(tokens: bool, tmp_path: Path) -> None:
    data = Data(tokens=tokens)
    program = program_of(data)
    before = {name: each.detach().clone() for name, each in program.tensors().items()}
    trainer = trainer_of(program, data, tmp_path)
    start = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == start  # nothing in it is random
    trainer.train()
    # So without training the loss stays what it was, and steps against the gradient raise it. Rounding moves it by a
    # millionth; a thousand times that much is asked for, and no more, because few steps of a small rate are taken.
    assert trainer.evaluate()["eval_loss"] < (1 - 1e-3) * start
    own = gw.adapter_tensors(program, "default")
    for name, each in program.tensors().items():
        assert torch.equal(each, before[name]) == (name not in own), name
    held = {each.data_ptr() for group in trainer.optimizer.param_groups for each in group["params"]}
    assert held == {each.data_ptr() for each in own.values()}
    predicted = trainer.predict(data)
    assert predicted.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_a_checkpoint_holds_the_adapter_and_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    data = Data(tokens=False)
    whole = program_of(data)
    trainer_of(whole, data, tmp_path / "whole").train()
    saved = load_file(tmp_path / "whole" / f"checkpoint-{STEPS // 2}" / "model.safetensors")
    assert saved.keys() == gw.adapter_tensors(whole, "default").keys()

    again = program_of(data, seed=5)  # other values, all of which the checkpoint brings
    trainer_of(again, data, tmp_path / "again").train(str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}"))
    wanted = trained(whole)
    assert all(torch.equal(each, wanted[name]) for name, each in trained(again).items())
    last = load_file(tmp_path / "again" / f"checkpoint-{STEPS}" / "model.safetensors")
    assert all(torch.equal(each, wanted[name]) for name, each in last.items())


def test_layers_are_computed_again_where_the_arguments_ask_for_it(tmp_path: Path) -> None:
    data = Data(tokens=False)
    plain, sparing = program_of(data), program_of(data)
    trainer_of(plain, data, tmp_path / "plain").train()
    fields = transformers.TrainingArguments.__dataclass_fields__
    option = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    trainer_of(sparing, data, tmp_path / "sparing", **{option: True}).train()
    assert sparing.records["training"] == {"checkpoint_blocks": True}
    wanted = trained(plain)
    assert all(torch.equal(each, wanted[name]) for name, each in trained(sparing).items())
    gw.trainable(sparing).gradient_checkpointing_disable()
    assert "training" not in sparing.records
    with pytest.raises(gw.InputError, match="every_n_layers"):
        gw.trainable(sparing).activation_checkpointing_enable(None, every_n_layers=2)


def test_the_adapter_is_saved_and_loaded_afterwards(tmp_path: Path) -> None:
    data = Data(tokens=False)
    program = program_of(data)
    trainer_of(program, data, tmp_path / "run").train()
    gw.save_adapter(program, tmp_path / "adapter")
    batch = {key: torch.stack([data[4][key], data[5][key]]) for key in ("input_ids", "attention_mask", "labels")}
    fresh = gw.optimize(traced("bert"), [gw.InsertAdapters(tmp_path / "adapter")], example_inputs=batch)
    assert torch.equal(fresh(**batch).loss, program(**batch).loss)


def test_arguments_are_named() -> None:
    program = program_of(Data(tokens=True))
    found = gw.trainable(program)
    assert list(inspect.signature(found.forward).parameters) == ["input_ids", "attention_mask", "labels"]
    assert type(found).__name__ == "LlamaForCausalLM"


def test_states_that_do_not_fit_are_refused() -> None:
    module = gw.trainable(program_of(Data(tokens=False)))
    state = module.state_dict()
    first, second = list(state)[:2]
    shorter = {name: each for name, each in state.items() if name != first}
    assert module.load_state_dict(shorter, strict=False).missing_keys == [first]
    with pytest.raises(gw.InputError, match="1 saved tensors do not fit") as caught:
        module.load_state_dict(shorter)
    assert f"{first}: missing" in str(caught.value)
    kept = {name: each.clone() for name, each in state.items()}
    with pytest.raises(gw.InputError, match=r"\[1, 1\], not"):
        module.load_state_dict({name: each + 1 for name, each in state.items()} | {second: torch.ones(1, 1)})
    assert all(torch.equal(each, kept[name]) for name, each in module.state_dict().items())


def test_what_cannot_train_is_refused() -> None:
    program = program_of(Data(tokens=False))
    bare = gw.optimize(program, [gw.RemoveAdapters()])
    with pytest.raises(gw.InputError, match="nothing trains") as caught:
        gw.trainable(bare)
    assert "insert an adapter" in str(caught.value)
    with pytest.raises(gw.InputError, match="expected a Program"):
        gw.trainable(classifier())
