"""A program as transformers' ``Trainer`` takes models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphwright.ir.checkpointing import checkpoint_blocks
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program, require_program


class Trainable(nn.Module):
    """What :func:`trainable` gives.

    Attributes:
        program: what is trained, the same object that was given.
    """

    # Otherwise the Trainer would hand over its count of tokens, which is no input of the program.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_save = None

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, **batch: Any) -> Any:
        """Run the program."""
        return self.program(**batch)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What trains, by its name in the program; nothing of a frozen base."""
        return {name: each.detach() for name, each in self._trained().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Write saved values into what trains.

        Returns:
            names that are missing and those that do not belong here, as ``torch.nn.Module`` does.

        Raises:
            InputError: a tensor has another shape; with ``strict``, also that there are such names.
        """
        own = self._trained()
        missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
        wrong = [
            f"{name}: {list(state_dict[name].shape)}, not {list(own[name].shape)}"
            for name in own
            if name in state_dict and state_dict[name].shape != own[name].shape
        ]
        if strict:
            wrong += [f"{name}: missing" for name in missing] + [f"{name}: unknown" for name in unexpected]
        if wrong:
            raise InputError(
                f"{len(wrong)} saved tensors do not fit what trains in {self.program.title!r}",
                where="load_state_dict",
                hint="insert the adapter with the options that it had when it was saved",
                context=[*wrong[:8], *(["…"] if len(wrong) > 8 else [])],
            )
        with torch.no_grad():
            for name in own.keys() & state_dict.keys():
                own[name].copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """What ``TrainingArguments(activation_checkpointing=True)`` calls: :func:`graphwright.checkpoint_blocks`.

        Raises:
            InputError: some layers only, or what enters them is to lie elsewhere.
        """
        for name, given, usual in (("every_n_layers", every_n_layers, 1), ("offload", offload, False)):
            if given != usual:
                raise InputError(
                    f"must be {usual!r}, not {given!r}: all layers are computed again, from values kept where they are",
                    where=f"activation_checkpointing_kwargs: {name}",
                )
        checkpoint_blocks(self.program)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """The same under its name in older releases of transformers."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything for the backward pass again."""
        checkpoint_blocks(self.program, enabled=False)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: each for name, each in self.program.named_parameters() if each.requires_grad}


def trainable(program: Program) -> Trainable:
    """A module that transformers' ``Trainer`` can train, evaluate, save and resume.

    ::

        program = gw.optimize(model, [gw.InsertAdapters("lora")], example_inputs={**batch, "labels": labels})
        Trainer(gw.trainable(program), TrainingArguments("run"), train_dataset=data).train()
        gw.save_adapter(program, "adapter")

    Trace the model with labels among the example inputs: then it returns the loss. The Trainer sees the arguments that
    the program takes. Its checkpoints hold what trains, in ``model.safetensors``, beside the state of optimizer, rate
    and random numbers. The program is trained itself, not a copy.

    Raises:
        InputError: it is no program, or nothing of it trains.
    """
    require_program(program)
    if not any(each.requires_grad for each in program.parameters()):
        raise InputError(
            "nothing trains: no parameter takes gradients",
            where=f"program {program.title!r}",
            hint="insert an adapter, or call requires_grad_() on parameters",
        )

    def forward(self: Trainable, **batch: Any) -> Any:
        return self.program(**batch)

    # The Trainer reads the names of labels and of columns from the class.
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in program.signature.tensor_arguments()]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = inspect.Signature([itself, *named])  # type: ignore[attr-defined]
    kind: type[Trainable] = type(program.title, (Trainable,), {"forward": forward, "__doc__": Trainable.__doc__})
    return kind(program)
