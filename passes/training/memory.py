"""How much memory training takes, found by a step on tensors that have shapes and no values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphwright.ir.checkpointing import Stretch, again, is_checkpointed, named_values, run_stretches, stretches
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.provenance import tags_of
from graphwright.passes.adapters.sites import ADAPTER

# Tensors that an optimiser keeps for each parameter, of its dtype.
OPTIMIZERS: Mapping[str, int] = {"adam": 2, "adamw": 2, "momentum": 1, "sgd": 0}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training takes; ``str()`` is a table.

    Attributes:
        title: of the program.
        shapes: of the inputs that it was asked for.
        base: weights that adapters lie beside, packed ones as they are packed.
        adapters: weights of the adapters.
        gradients: one for each trained parameter.
        optimizer: what it keeps for each of them; a few bytes for counting steps are left out.
        kept: what the forward pass keeps for the backward pass when all is kept. Weights and inputs are not counted.
        kept_at_layers: the same when layers are computed again.
        largest_layer: what the backward pass then adds: all that the largest layer keeps.
        checkpointed: whether the program is set to compute layers again.
    """

    title: str
    shapes: tuple[tuple[int, ...], ...]
    base: int
    adapters: int
    gradients: int
    optimizer: int
    kept: int
    kept_at_layers: int
    largest_layer: int
    checkpointed: bool

    @property
    def state(self) -> int:
        """All that does not depend on the inputs' sizes."""
        return self.base + self.adapters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it, as the program is set now. What single operators need while they run is not in it."""
        return self.state + (self.kept_at_layers + self.largest_layer if self.checkpointed else self.kept)

    def __str__(self) -> str:
        from graphwright.passes.rendering.memory import render_memory

        return render_memory(self)


def training_memory(program: Program, example_inputs: Any, *, optimizer: str = "adam") -> TrainingMemory:
    """What a training step takes, without taking it: operators compute shapes only.

    Args:
        program: with the parameters that are to be trained taking gradients.
        example_inputs: keyword arguments, positional arguments or one tensor of the sizes in question; on the device
            ``meta`` they take no memory either.
        optimizer: ``adam``, ``adamw``, ``momentum`` (SGD with momentum) or ``sgd``.

    Raises:
        InputError: there is no such optimizer, the inputs do not fit the program, or nothing trains.
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(
            f"there is no optimizer {optimizer!r}",
            where="argument 'optimizer'",
            hint=f"one of {', '.join(OPTIMIZERS)}",
        )
    trained = sum(_bytes(each) for each in program.parameters() if each.requires_grad)
    if not trained:
        raise InputError(
            "nothing trains: no parameter takes gradients",
            where=f"program {program.title!r}",
            hint="insert an adapter, or call requires_grad_() on parameters",
        )
    flat = _flat(program, example_inputs)
    adapters = {node.target for node in program.nodes if node.op == "get_attr" and ADAPTER in tags_of(node)}
    sizes = {name: _bytes(tensor) for name, tensor in program.tensors().items()}
    own = sum(size for name, size in sizes.items() if name in adapters)
    kept, by_layer = _kept(program, flat, checkpointed=False)
    kept_at_layers, _ = _kept(program, flat, checkpointed=True)
    return TrainingMemory(
        title=program.title,
        shapes=tuple(tuple(each.shape) for each in flat),
        base=sum(sizes.values()) - own,
        adapters=own,
        gradients=trained,
        optimizer=OPTIMIZERS[optimizer] * trained,
        kept=kept,
        kept_at_layers=kept_at_layers,
        largest_layer=max(by_layer, default=0),
        checkpointed=is_checkpointed(program),
    )


class SavedBytes:
    """Counts the memory of the tensors that autograd keeps while it is open as a context; each piece once.

    Attributes:
        total: bytes so far.
    """

    def __init__(self, *, besides: Sequence[torch.Tensor]) -> None:
        """
        Args:
            besides: tensors whose memory is not counted: weights and inputs, which are there anyway.
        """
        self.total = 0
        # The storages themselves, so that none is freed and its address given to another.
        self._seen = {each.untyped_storage()._cdata: each.untyped_storage() for each in besides}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.total += storage.nbytes()
        return tensor


def _kept(program: Program, inputs: Sequence[torch.Tensor], *, checkpointed: bool) -> tuple[int, list[int]]:
    """Bytes that the forward pass keeps, and how many each layer adds to them."""
    layers: list[int] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
        values = {name: _without_values(mode, value) for name, value in named_values(program, inputs).items()}
        with SavedBytes(besides=list(values.values())) as saved:

            def call(part: Stretch, given: Sequence[Any]) -> Any:
                before = saved.total
                found = again(part, given) if checkpointed else part.run(*given)
                if part.path:
                    layers.append(saved.total - before)
                return found

            outputs = run_stretches(stretches(program), values, program.output.args[0], call)
        del outputs
    return saved.total, layers


def _without_values(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    with mode:
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu" if tensor.is_meta else tensor.device)
    return nn.Parameter(made) if tensor.requires_grad else made


def _flat(program: Program, example_inputs: Any) -> list[torch.Tensor]:
    if isinstance(example_inputs, Mapping):
        flat = program.signature.flatten((), example_inputs)
    else:
        given = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
        flat = program.signature.flatten(given, {})
    program.check_inputs(flat)
    return flat


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
