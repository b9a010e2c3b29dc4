"""What is minimised: student and teacher run side by side, and the terms of the loss of what they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program, require_program
from graphwright.ir.taps import Tapped
from graphwright.passes.base import as_json
from graphwright.passes.distillation.taps import TapFeatures, given_by_layers, taps_of
from graphwright.passes.distillation.teacher import teacher_of
from graphwright.passes.distillation.terms import Term

Loss = Callable[[Tapped, Tapped | None, Mapping[str, Any]], torch.Tensor]


class Objective:
    """A weighted sum of terms, as a function of a batch.

    Attributes:
        student: what is trained, with taps; its parameters are those of the program that was given.
        teacher: with taps, frozen; ``None`` without one.
        terms: in order.
    """

    def __init__(
        self,
        student: Program,
        teacher: Program | None,
        loss: Loss | Sequence[Loss],
        *,
        teacher_dtype: torch.dtype | None = None,
    ) -> None:
        """Prepare both programs.

        Args:
            student: trained in place; a parameter that the teacher holds too becomes its own.
            teacher: left as it is.
            loss: a term or a function, or several.
            teacher_dtype: see :func:`graphwright.teacher_of`.

        Raises:
            InputError: no term, one that is no function, a missing teacher, or nothing trains.
        """
        self.terms: tuple[Loss, ...] = tuple(loss) if isinstance(loss, Sequence) else (loss,)
        if not self.terms or not all(callable(term) for term in self.terms):
            raise InputError("must be a term or several", where="distill: loss", hint="such as [gw.KLDivergence()]")
        bare = [term for term in self.terms if isinstance(term, Term) and term.needs_teacher and teacher is None]
        if bare:
            raise InputError(f"{type(bare[0]).__name__} compares with a teacher", where="distill: teacher")
        if not any(each.requires_grad for each in require_program(student).parameters()):
            raise InputError(
                "nothing trains: no parameter takes gradients",
                where=f"student {student.title!r}",
                hint="call requires_grad_() on what shall train",
            )
        if teacher is not None:
            _part_from(student, require_program(teacher))
            teacher = _tapped(teacher_of(teacher, dtype=teacher_dtype))
        self.student, self.teacher = _tapped(student), teacher

    def __call__(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a batch, and each term without its weight.

        Raises:
            InputError: the batch does not fit, or a term is not a finite scalar.
        """
        total, parts, _ = self.with_output(batch)
        return total, parts

    def with_output(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, float], Tapped]:
        """The same, and what the student gives."""
        goal = None
        if self.teacher is not None:
            with torch.no_grad():
                goal = run_tapped(self.teacher, batch)
        mine = run_tapped(self.student, batch)
        total, parts = torch.zeros(()), dict[str, float]()
        for name, term in zip(self._names(), self.terms, strict=True):
            value = term(mine, goal, batch)
            if not isinstance(value, torch.Tensor) or value.numel() != 1 or not bool(torch.isfinite(value).all()):
                raise InputError(f"the term gives {value!r}, not one finite number", where=f"loss {name!r}")
            parts[name] = float(value.detach())
            total = total + (term.weight if isinstance(term, Term) else 1.0) * value.reshape(())
        if torch.is_grad_enabled() and not total.requires_grad:
            raise InputError("does not depend on anything that trains", where="distill: loss")
        return total, {"loss": float(total.detach()), **parts}, mine

    def described(self) -> Any:
        """The terms as JSON values."""
        return [
            [name, as_json(term) if isinstance(term, Term) else ""]
            for name, term in zip(self._names(), self.terms, strict=True)
        ]

    def _names(self) -> list[str]:
        names: list[str] = []
        for term in self.terms:
            name = type(term).__name__ if isinstance(term, Term) else getattr(term, "__qualname__", repr(term))
            same = sum(other.partition(" ")[0] == name for other in names)
            names.append(f"{name} {same + 1}" if same else name)
        return names


def run_tapped(program: Program, batch: Mapping[str, Any]) -> Tapped:
    """Run a program on those entries of a batch that it takes."""
    args_spec, kwargs_spec = program.signature.in_spec.children()
    known = {*program.signature.parameters[: args_spec.num_children], *kwargs_spec.context}
    found = program(**{key: value for key, value in batch.items() if key in known})
    return found if isinstance(found, Tapped) else Tapped(found, {})


def _tapped(program: Program) -> Program:
    """The program with taps on its layers; as it is where it has taps, or no layers."""
    if taps_of(program) or all(isinstance(value, str) for _, value in given_by_layers(program)):
        return program
    made = program.clone()
    TapFeatures()(made)
    return made


def _part_from(student: Program, teacher: Program) -> None:
    """Give the student parameters of its own where it would change the teacher's."""
    held = {tensor.untyped_storage().data_ptr() for tensor in teacher.tensors().values()}
    seen: set[str] = set()
    with student.edit() as rewriter:
        for node in student.nodes:
            if node.op != "get_attr" or node.target in seen:
                continue
            seen.add(str(node.target))
            old = student.tensor(node)
            if isinstance(old, nn.Parameter) and old.requires_grad and old.untyped_storage().data_ptr() in held:
                rewriter.rebind(node, old.detach().clone())
