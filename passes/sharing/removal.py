"""What a language model loses without a layer: its loss on text, measured."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.passes.calibration import CalibrationData
from graphwright.passes.calibration.batches import flatten


def next_token_loss(program: Program, calibration: CalibrationData) -> float:
    """The mean of ``-log p(next token)`` over the calibration data, in nats; padding is left out.

    Args:
        program: a decoding step, or a traced model that takes ``input_ids`` ``[B, S]``, gives ``logits`` ``[B, S, V]``.
        calibration: texts.

    Raises:
        InputError: the program is no such model, the data does not fit it, or the loss is NaN or infinite.
    """
    layout = DecoderLayout.find(program)
    names, outputs = list(program.signature.names), program.signature.output_names()
    if "input_ids" not in names or "logits" not in outputs:
        raise InputError(
            "the loss of the next token needs a model that takes input_ids and gives logits",
            where=f"program {program.title!r}",
            hint="take measure='similarity'",
        )
    total, count = 0.0, 0
    for index, batch in enumerate(calibration):
        flat, mask = flatten(program, batch, index, layout)
        tokens = flat[names.index("input_ids")]
        if mask is None and "attention_mask" in names:
            mask = flat[names.index("attention_mask")] != 0
        with torch.no_grad():
            logits = program.body(*flat)[outputs.index("logits")]
        if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
            raise InputError(
                f"logits are {list(logits.shape)}, not one row for each of {list(tokens.shape)} tokens",
                where=f"calibration batch {index + 1}",
                hint="take measure='similarity'",
            )
        kept = torch.ones_like(tokens[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:].bool()
        losses = functional.cross_entropy(logits[:, :-1][kept].double(), tokens[:, 1:][kept], reduction="sum")
        total, count = total + float(losses), count + int(kept.sum())
    loss = total / max(count, 1)
    if not math.isfinite(loss) or count == 0:
        raise InputError(
            f"the loss is {loss} over {count} tokens", where="calibration", hint="check the texts and the weights"
        )
    return loss
