"""Losses against their formulas, written out in loops over float64 numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import graphwright as gw

GENERATOR = torch.Generator().manual_seed(5)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def softmax(row: torch.Tensor) -> list[float]:
    powers = [math.exp(float(each)) for each in row]
    return [each / sum(powers) for each in powers]


def positions(mask: torch.Tensor | None, batch: int, length: int) -> list[tuple[int, int]]:
    every = [(b, t) for b in range(batch) for t in range(length)]
    return every if mask is None else [(b, t) for b, t in every if mask[b, t]]


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_divergence(mask: torch.Tensor | None, temperature: float) -> None:
    student, teacher = drawn(3, 4, 5), drawn(3, 4, 5)
    total, places = 0.0, positions(mask, 3, 4)
    for b, t in places:
        p, q = softmax(teacher[b, t] / temperature), softmax(student[b, t] / temperature)
        total += sum(a * math.log(a / c) for a, c in zip(p, q, strict=True))
    wanted = temperature**2 * total / len(places)
    assert float(gw.kl_divergence(student, teacher, mask, temperature)) == pytest.approx(wanted, rel=1e-12)
    assert float(gw.kl_divergence(teacher, teacher, mask, temperature)) == 0.0


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_square_head(mask: torch.Tensor | None) -> None:
    student, teacher = ([drawn(3, 4, 6), drawn(3, 4, 6, scale=30.0)] for _ in range(2))
    wanted = 0.0
    for mine, goal in zip(student, teacher, strict=True):
        error = size = 0.0
        for b, t in positions(mask, 3, 4):
            for i in range(6):
                error += (float(goal[b, t, i]) - float(mine[b, t, i])) ** 2
                size += float(goal[b, t, i]) ** 2
        wanted += error / size
    assert float(gw.square_head(student, teacher, mask)) == pytest.approx(wanted, rel=1e-12)
    assert float(gw.square_head([torch.zeros_like(each) for each in student], teacher, mask)) == pytest.approx(2.0)
    assert float(gw.square_head(teacher, teacher, mask)) == 0.0


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_hidden_cosine(mask: torch.Tensor | None) -> None:
    student, teacher = drawn(3, 4, 6), drawn(3, 4, 6)
    total, places = 0.0, positions(mask, 3, 4)
    for b, t in places:
        dot = sum(float(a) * float(c) for a, c in zip(student[b, t], teacher[b, t], strict=True))
        lengths = [math.sqrt(sum(float(a) ** 2 for a in each[b, t])) for each in (student, teacher)]
        total += 1 - dot / (lengths[0] * lengths[1])
    assert float(gw.hidden_cosine(student, teacher, mask)) == pytest.approx(total / len(places), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_nearest_neighbours(k: int) -> None:
    student, teacher = drawn(7, 3), drawn(7, 3)
    labels = torch.tensor([0, 1, 0, 0, 2, 1, 0])
    wanted = 0.0
    for x in range(7):
        kin = [
            sum((float(teacher[s, i]) - float(student[x, i])) ** 2 for i in range(3))
            for s in range(7)
            if labels[s] == labels[x]
        ]
        wanted += sum(sorted(kin)[:k])
    assert float(gw.nearest_neighbours(student, teacher, labels, k)) == pytest.approx(wanted / 7, rel=1e-12)


def test_cross_entropy() -> None:
    logits, labels = drawn(3, 4, 5), torch.tensor([[0, 1, 2, 3], [4, -100, 0, -100], [-100, 2, -100, 1]])
    chosen = [(b, t) for b, t in positions(None, 3, 4) if labels[b, t] >= 0]
    wanted = sum(-math.log(softmax(logits[b, t])[int(labels[b, t])]) for b, t in chosen) / len(chosen)
    assert float(gw.cross_entropy(logits, labels)) == pytest.approx(wanted, rel=1e-12)


def test_padding_may_hold_anything_and_the_teacher_takes_no_gradient() -> None:
    student, teacher = drawn(3, 4, 5), drawn(3, 4, 5)
    clean = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    student[1, 2:], teacher[2, 1:] = float("nan"), float("inf")
    losses: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
        lambda s, t: gw.kl_divergence(s, t, MASK),
        lambda s, t: gw.square_head([s], [t], MASK),
        lambda s, t: gw.hidden_cosine(s, t, MASK),
    ]
    for loss in losses:
        wanted = loss(*clean)
        assert torch.equal(loss(student, teacher), wanted)
        (found,) = torch.autograd.grad(wanted, clean[:1])
        assert bool((found[MASK == 0] == 0).all())
        assert bool((found[MASK == 1] != 0).any())
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(loss(*clean), clean[1:])


def test_half_precision_is_widened() -> None:
    student, teacher = drawn(2, 3, 5), drawn(2, 3, 5)
    low = student.bfloat16(), teacher.bfloat16()
    found = gw.kl_divergence(*low)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(gw.kl_divergence(low[0].double(), low[1].double())), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gw.kl_divergence(drawn(2, 3), drawn(2, 4)), "of the student have shape"),
        (lambda: gw.kl_divergence(drawn(2, 3), drawn(2, 3), temperature=0.0), "above 0"),
        (lambda: gw.kl_divergence(drawn(2, 3), drawn(2, 3), torch.zeros(2)), "everything is padding"),
        (lambda: gw.kl_divergence(drawn(2, 3), drawn(2, 3), torch.ones(3)), "what it covers"),
        (lambda: gw.square_head([drawn(2, 3, 4)], []), "1 layers of the student, 0 of the teacher"),
        (lambda: gw.square_head([drawn(2, 3)], [torch.zeros(2, 3)]), "zeros only"),
        (lambda: gw.nearest_neighbours(drawn(2, 3), drawn(2, 3), torch.zeros(2), 0), "from 1"),
        (lambda: gw.nearest_neighbours(drawn(2, 3), drawn(2, 3), torch.zeros(3), 1), "the labels"),
        (lambda: gw.cross_entropy(drawn(2, 3), torch.zeros(3)), "the logits"),
        (lambda: gw.cross_entropy(drawn(2, 3), torch.tensor([-100, -100])), "all -100"),
        (lambda: gw.SquareHead(weight=float("nan")), "a number from 0"),
        (lambda: gw.NearestNeighbours(pool="max"), "'mean' or 'first'"),
    ],
)
def test_what_does_not_fit(call: Callable[[], object], words: str) -> None:
    with pytest.raises(gw.InputError, match=words):
        call()
