"""Classification after every repetition, and the losses that train it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.passes.sharing.models import llama, step_of, texts, traced
from torch.nn import functional

import graphwright as gw

WEIGHTS = (1 / 6, 2 / 6, 3 / 6)


def shared(labels: bool = False, layers: int = 6) -> gw.Program:
    program = traced(layers, labels)
    gw.ShareLayers(groups=layers // 3)(program)
    return program


def early_logits(depth: int) -> torch.Tensor:
    """The first layers of the shared model, built by hand, with norm and head."""
    model = llama(6)
    for at in range(2, 6):
        model.model.layers[at].load_state_dict(model.model.layers[at % 2].state_dict())
    model.model.layers = model.model.layers[:depth]
    with torch.no_grad():
        result: torch.Tensor = model(**texts()).logits
    return result


def test_every_repetition_is_classified() -> None:
    program = shared()
    with torch.no_grad():
        plain = program(**texts()).logits
    classified = program.clone()
    assert gw.ClassifyRepetitions()(classified)
    assert not gw.ClassifyRepetitions()(classified)
    gw.verify(classified)
    with torch.no_grad():
        found = classified(**texts())
    assert torch.equal(found["logits"], plain)
    assert torch.equal(found["repetition_logits"][2], plain)
    for at, depth in enumerate((2, 4, 6)):
        torch.testing.assert_close(found["repetition_logits"][at], early_logits(depth), rtol=0, atol=1e-5)
    # The program that is decoded stays as it is, and has the same weights.
    assert classified.tensor("model.norm.weight") is program.tensor("model.norm.weight")
    with torch.no_grad():
        assert torch.equal(program(**texts()).logits, plain)


@pytest.mark.parametrize("given", [None, (1.0, 0.0, 3.0)])
def test_the_loss_is_weighted(given: tuple[float, ...] | None) -> None:
    classified = shared(labels=True)
    gw.ClassifyRepetitions(weights=given)(classified)
    batch = texts(labels=True)
    found = classified(**batch)
    weights = WEIGHTS if given is None else (0.25, 0.0, 0.75)
    labels = batch["input_ids"][:, 1:]
    each = [
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        for logits in found["repetition_logits"]
    ]
    wanted = sum(weight * loss for weight, loss in zip(weights, each, strict=True))
    torch.testing.assert_close(found["loss"], wanted, rtol=0, atol=1e-5)
    by_function = gw.repetition_loss([one[:, :-1] for one in found["repetition_logits"]], labels, weights=given)
    torch.testing.assert_close(by_function, wanted, rtol=0, atol=1e-5)


def test_a_step_is_classified_too() -> None:
    step = step_of(4)
    gw.ShareLayers(groups=2)(step)
    gw.ClassifyRepetitions()(step)
    ids = texts()["input_ids"]
    cache = [torch.zeros(2, 2, 16, 8) for _ in range(4)]
    given: dict[str, Any] = {"keys": cache, "values": cache, "slots": torch.arange(2), "starts": torch.zeros(2).long()}
    with torch.no_grad():
        found = step(input_ids=ids, rows=torch.tensor([[6], [6]]), **given)
    assert found.keys() == {"logits", "keys", "values", "repetition_logits"}
    assert [list(each.shape) for each in found["repetition_logits"]] == [[2, 1, 97]] * 2
    assert not torch.equal(*found["repetition_logits"])


def test_layers_that_share_nothing_by_number() -> None:
    program = traced(4)
    with pytest.raises(gw.ProgramError, match="no layers that share"):
        gw.ClassifyRepetitions()(program)
    with pytest.raises(gw.InputError, match="no multiple of 3"):
        gw.ClassifyRepetitions(every=3)(program)
    gw.ClassifyRepetitions(every=1)(program)
    assert len(program(**texts())["repetition_logits"]) == 4


def test_through_optimize_the_other_outputs_are_compared() -> None:
    program = shared(layers=3)
    small = gw.optimize(program, [gw.ClassifyRepetitions()], example_inputs=texts())
    (row,) = small.report.rows
    assert row.outputs["logits"]["original"]["worst"] == 0.0
    assert row.worst_output_error() == 0.0
    with torch.no_grad():
        assert len(small(**texts())["repetition_logits"]) == 3


def test_after_selected_rows_it_is_refused() -> None:
    step = step_of(2)
    gw.run_passes(step, [gw.ShareLayers(groups=1), gw.PrepareDecoder(length=64)])
    with pytest.raises(gw.OrderError, match="classify first"):
        gw.run_passes(step, [gw.ClassifyRepetitions()])


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_the_clone_trains_the_program() -> None:
    program = shared(layers=3).clone(copy_weights=True)
    classified = program.clone()
    gw.ClassifyRepetitions()(classified)
    batch = texts()
    labels = batch["input_ids"][:, 1:]
    optimizer = torch.optim.AdamW(program.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        logits = classified(**batch)["repetition_logits"]
        loss = gw.repetition_loss([each[:, :-1] for each in logits], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    small = program.clone()
    gw.TruncateDepth(repetitions=1)(small)
    with torch.no_grad():
        for each in (program, small):
            found = functional.cross_entropy(each(**batch).logits[:, :-1].flatten(0, 1), labels.flatten())
            assert float(found) < 0.7 * losses[0]


def test_trainer(tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    program = shared(labels=True, layers=3).clone(copy_weights=True)
    gw.ClassifyRepetitions()(program)
    row = {key: value[0] for key, value in texts(labels=True).items() if isinstance(value, torch.Tensor)}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(gw.trainable(program), arguments, train_dataset=[row] * 4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1


def test_distillation_from_the_unshared_model() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, *logits = (torch.randn(2, 5, 7, generator=generator) for _ in range(3))
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, 3:] = -100
    kept = labels != -100
    found = gw.repetition_loss(logits, labels, teacher=teacher, mix=0.3, temperature=2.0)
    wanted = torch.zeros((), dtype=torch.float64)
    for weight, each in zip((1 / 3, 2 / 3), logits, strict=True):
        p = torch.softmax(teacher[kept].double() / 2, -1)
        q = torch.softmax(each[kept].double() / 2, -1)
        distance = (p * (p / q).log()).sum(-1).mean()
        entropy = functional.cross_entropy(each[kept].double(), labels[kept])
        wanted += weight * (0.7 * entropy + 0.3 * 4 * distance)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)
    # A student that says what the teacher says has no distance to it.
    alone = gw.repetition_loss([teacher], labels, teacher=teacher, mix=1.0)
    assert abs(float(alone)) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1.0,)}, "1 weights for 2 repetitions"),
        ({"weights": (1.0, -1.0)}, "positive numbers"),
        ({"weights": (0.0, float("nan"))}, "positive numbers"),
        ({"teacher": torch.zeros(2, 5, 8)}, "teacher"),
        ({"teacher": torch.zeros(2, 5, 7), "mix": 2.0}, "within 0..1"),
        ({"teacher": torch.zeros(2, 5, 7), "temperature": 0.0}, "above 0"),
    ],
)
def test_wrong_losses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gw.InputError, match=message):
        gw.repetition_loss([torch.zeros(2, 5, 7)] * 2, torch.zeros(2, 5).long(), **options)


def test_no_position_is_left() -> None:
    with pytest.raises(gw.InputError, match="no position is left"):
        gw.repetition_loss([torch.zeros(2, 7)], torch.full((2,), -100))
