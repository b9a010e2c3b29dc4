"""Memory on the GPU: what a program needs is known before anything is moved there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from graphwright.ir.errors import BackendError
from graphwright.ir.program import Program


def weight_bytes(program: Program) -> int:
    """Bytes of all weights; tied ones count once. Packed forms take as much, up to padding."""
    return sum(tensor.nbytes for tensor in {id(each): each for each in program.tensors().values()}.values())


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had on a GPU, those that torch keeps for itself included; ``None`` for the CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)


@contextmanager
def room(needed: int, device: torch.device, what: str, *, where: str, hint: str, besides: str = "") -> Iterator[None]:
    """Put something on a device in the block, or leave nothing behind.

    Args:
        needed: bytes.
        device: where.
        what: such as ``"the weights need"``.
        where: for the error.
        hint: likewise.
        besides: what the block needs more than that, such as ``" and room to pack them"``.

    Raises:
        BackendError: it does not fit; it says how much is needed.
    """
    free, message = free_bytes(device), f"{what} {needed / 2**30:.2f} GiB"
    if free is not None and needed > free:
        raise BackendError(f"{message}, {device} has {free / 2**30:.2f} GiB left", where=where, hint=hint)
    try:
        yield
    except torch.OutOfMemoryError as error:
        # The traceback holds the frames, and these what has been loaded so far.
        error.__traceback__ = None
        failed = str(error).split(". ", 1)[0]
    else:
        return
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise BackendError(f"{message}{besides}, which {device} has not: {failed}", where=where, hint=hint)


def room_for(program: Program, device: torch.device) -> AbstractContextManager[None]:
    """Load a program's weights in the block, or leave nothing behind; errors as of :func:`room`."""
    return room(
        weight_bytes(program),
        device,
        "the weights need",
        where=f"program {program.title!r}",
        hint="quantise the weights, free other models, or take a larger GPU",
        besides=" and room to pack them",
    )
