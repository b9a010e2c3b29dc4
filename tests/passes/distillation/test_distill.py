"""Students learn from their teachers, and a run that was killed ends with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.adapters.models import MODELS, batch_for, traced

import graphwright as gw
from graphwright.passes.distillation.objective import Objective, run_tapped

pytest.importorskip("transformers")

LOSSES: dict[str, Any] = {
    "task": gw.TaskLoss(),
    "entropy": gw.CrossEntropy(causal=True),
    "kl": gw.KLDivergence(temperature=2.0),
    "square-head": [gw.TaskLoss(weight=0.5), gw.SquareHead()],
    "cosine": gw.HiddenCosine(),
}


def batches(name: str, count: int = 3) -> list[dict[str, Any]]:
    model = MODELS[name]()
    whole = batch_for(model, rows=4 * count)
    parts = {key: value.split(4) for key, value in whole.items() if isinstance(value, torch.Tensor)}
    constants = {key: value for key, value in whole.items() if not isinstance(value, torch.Tensor)}
    return [{**{key: part[index] for key, part in parts.items()}, **constants} for index in range(count)]


def shaken(name: str, amount: float = 0.05) -> gw.Program:
    """A student that shares nothing but its beginnings with the model of the name."""
    student = traced(name).clone(copy_weights=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for each in student.parameters():
            each.add_(amount * torch.randn(each.shape, generator=generator))
    return student


def weights(program: gw.Program) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in program.tensors().items()}


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_falls(loss: str) -> None:
    student = shaken("llama")
    found = gw.distill(student, traced("llama"), batches("llama"), loss=LOSSES[loss], steps=12, learning_rate=0.01)
    values = [step["loss"] for step in found.losses]
    assert found.steps == len(values) == 12
    assert sum(values[-3:]) < 0.9 * sum(values[:3])
    assert all(each.grad is None for each in student.parameters())


def test_classes() -> None:
    student, data = shaken("bert"), batches("bert")
    found = gw.distill(student, traced("bert"), data, loss=gw.class_distillation(k=2, feature_weight=0.1), steps=9)
    assert set(found.losses[0]) == {"loss", "NearestNeighbours", "KLDivergence", "CrossEntropy"}
    last = found.losses[-1]
    parts = 0.1 * last["NearestNeighbours"] + 0.5 * last["KLDivergence"] + 0.5 * last["CrossEntropy"]
    assert last["loss"] == pytest.approx(parts, rel=1e-6)
    assert last["loss"] < found.losses[0]["loss"]


def test_the_terms_see_features_padding_and_labels() -> None:
    student, teacher, batch = shaken("bert"), traced("bert"), batches("bert")[0]
    objective = Objective(student, teacher, gw.SquareHead())
    total, _ = objective(batch)
    with torch.no_grad():
        assert objective.teacher is not None
        mine, goal = (run_tapped(each, batch) for each in (objective.student, objective.teacher))
    kept = batch["attention_mask"].bool()
    assert not bool(kept.all())
    wanted = sum(
        ((goal.features[path] - each)[kept].square().mean() / goal.features[path][kept].square().mean())
        for path, each in mine.features.items()
    )
    torch.testing.assert_close(total.detach(), wanted, rtol=1e-5, atol=0)


def test_the_teacher_stays_as_it_is_though_both_began_as_one() -> None:
    dense = traced("bert").clone(copy_weights=True)
    before = weights(dense)
    student = dense.clone()  # the same parameters
    order = list(dict(student.named_parameters()))
    gw.distill(student, dense, batches("bert"), loss=[gw.TaskLoss(), gw.KLDivergence()], steps=3)
    assert all(torch.equal(each, before[name]) for name, each in dense.tensors().items())
    assert not any(
        torch.equal(each, before[name]) for name, each in student.named_parameters() if name.endswith("query.weight")
    )
    assert list(dict(student.named_parameters())) == order


def test_frozen_parameters_stay() -> None:
    student = shaken("bert")
    for name, each in student.named_parameters():
        each.requires_grad_("classifier" in name)
    before = weights(student)
    gw.distill(student, traced("bert"), batches("bert"), loss=gw.KLDivergence(), steps=3)
    for name, each in student.named_parameters():
        assert torch.equal(each, before[name]) == ("classifier" not in name), name


def test_a_teacher_in_half_the_memory_computes_from_rounded_weights() -> None:
    program, batch = traced("llama"), batches("llama")[0]
    small = gw.teacher_of(program, dtype=torch.bfloat16)
    rounded = program.clone(copy_weights=True)
    with torch.no_grad():
        for each in rounded.parameters():
            each.copy_(each.bfloat16())
        wanted, found, exact = (each(**batch).logits for each in (rounded, small, program))
    assert torch.equal(found, wanted)
    assert not torch.equal(found, exact)
    stored = sum(each.numel() * each.element_size() for each in small.tensors().values())
    assert stored <= 0.51 * sum(each.numel() * each.element_size() for each in program.tensors().values())
    assert not any(each.requires_grad for each in small.tensors().values())
    taps = gw.trace(MODELS["llama"](), batch)
    gw.TapFeatures()(taps)
    gw.TapFeatures()(small)
    assert small(**batch).features.keys() == taps(**batch).features.keys()


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)], ids=["adamw", "sgd"])
def test_a_killed_run_goes_on_bit_for_bit(optimizer: Any, tmp_path: Path) -> None:
    data, teacher = batches("llama"), traced("llama")
    options: dict[str, Any] = {"loss": [gw.KLDivergence(), gw.SquareHead()], "steps": 7, "optimizer": optimizer}
    whole = shaken("llama")
    wanted = gw.distill(whole, teacher, data, **options)

    class Dies(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            reads.append(index)
            if len(reads) == 8:  # the digest reads two
                raise Killed
            return super().__getitem__(index)

    reads: list[Any] = []
    with pytest.raises(Killed):
        gw.distill(shaken("llama"), teacher, Dies(data), **options, checkpoint=tmp_path / "run", checkpoint_steps=2)
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == ["run.json", "step-00000004.safetensors"]
    random = torch.get_rng_state()
    again = shaken("llama")
    found = gw.distill(again, teacher, data, **options, checkpoint=tmp_path / "run", checkpoint_steps=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert found == wanted
    assert all(torch.equal(each, again.tensor(name)) for name, each in whole.tensors().items())
    # a finished run takes no step
    third = shaken("llama")
    assert gw.distill(third, teacher, data, **options, checkpoint=tmp_path / "run", checkpoint_steps=2) == wanted
    assert all(torch.equal(each, third.tensor(name)) for name, each in whole.tensors().items())


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    data, teacher = batches("llama"), traced("llama")
    folder = tmp_path / "run"
    gw.distill(shaken("llama"), teacher, data, loss=gw.KLDivergence(), steps=2, checkpoint=folder)
    for change, words in (
        ({"loss": gw.KLDivergence(temperature=2.0)}, "options differ"),
        ({"student": shaken("llama", 0.1)}, "student differ"),
        ({"teacher": shaken("llama", 0.2)}, "teacher differ"),
        ({"data": data[:2]}, "data differ"),
    ):
        given: dict[str, Any] = {
            "student": shaken("llama"),
            "teacher": teacher,
            "data": data,
            "loss": gw.KLDivergence(),
            **change,
        }
        with pytest.raises(gw.InputError, match=words):
            gw.distill(**given, steps=2, checkpoint=folder)
    state = folder / "step-00000002.safetensors"
    state.write_bytes(state.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(gw.GraphwrightError, match="not those that were written"):
        gw.distill(shaken("llama"), teacher, data, loss=gw.KLDivergence(), steps=2, checkpoint=folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(gw.InputError, match="no folder of a run"):
        gw.distill(shaken("llama"), teacher, data, loss=gw.KLDivergence(), steps=2, checkpoint=tmp_path / "other")


def test_gradients_are_clipped_and_rates_follow_the_schedule() -> None:
    seen: list[float] = []

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    norms: list[float] = []
    gw.distill(
        shaken("llama"),
        traced("llama"),
        batches("llama"),
        loss=gw.SquareHead(),
        steps=4,
        optimizer=lambda p: Watching(p, 2.0),
        schedule=lambda step, steps: (steps - step) / steps,
        max_norm=0.01,
    )
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert seen == [2.0, 1.5, 1.0, 0.5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": []}, "a term or several"),
        ({"loss": [gw.KLDivergence()], "teacher": None}, "KLDivergence compares with a teacher"),
        ({"data": []}, "must be batches"),
        ({"data": {"input_ids": torch.ones(1)}}, "must be batches"),
        ({"steps": 0}, "distill: steps"),
        ({"max_norm": 0.0}, "max_norm"),
        ({"checkpoint_steps": 0}, "checkpoint_steps"),
        ({"teacher_dtype": torch.int8}, "teacher dtype"),
        ({"loss": [lambda student, teacher, batch: torch.tensor(float("nan"), requires_grad=True)]}, "one finite"),
        ({"loss": [lambda student, teacher, batch: torch.ones(())]}, "depend on anything that trains"),
        ({"loss": gw.CrossEntropy(labels="classes")}, "no 'classes'"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"teacher": traced("llama"), "data": batches("llama"), "loss": gw.KLDivergence(), **options}
    with pytest.raises(gw.InputError, match=words):
        gw.distill(shaken("llama"), **given)


def test_a_frozen_student() -> None:
    student = shaken("llama")
    student.requires_grad_(False)
    with pytest.raises(gw.InputError, match="nothing trains"):
        gw.distill(student, traced("llama"), batches("llama"), loss=gw.KLDivergence())
