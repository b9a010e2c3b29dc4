"""Texts as calibration data of a decoding step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.frontends.generation.tokenizer import load_tokenizer
from graphwright.ir.decoder import DecoderLayout
from graphwright.passes.calibration import Stream
from graphwright.passes.calibration.batches import flatten

IDS = torch.randint(5, 4000, (3, 40), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def step(tinylm_dir: Path) -> gw.Program:
    """A decoding step, prepared: the last layer computes wanted rows only."""
    return gw.optimize(gw.load_decoder(tinylm_dir, dtype="float32", check=False), [gw.PrepareDecoder()], verify=False)


@pytest.fixture(scope="module")
def whole(tinylm_dir: Path) -> gw.Program:
    """The same model without a cache."""
    return gw.load_huggingface(tinylm_dir, dtype="float32")


def linears(program: gw.Program) -> dict[str, Any]:
    nodes = [node for node in program.nodes if gw.op_name(node) == "aten.linear"]
    return {str(node.args[1].target): node for node in nodes}


def rows_before(program: gw.Program, path: str, batches: list[Any]) -> list[torch.Tensor]:
    """The rows that the first linear over a weight of this layer sees."""
    node = next(node for name, node in linears(program).items() if name.startswith(path))
    with Stream(program, batches) as stream:
        stream.advance(node)
        return list(stream.rows(node.args[0]))


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_every_token_reaches_the_last_layer(step: gw.Program, whole: gw.Program, side: str) -> None:
    """Its feed-forward sees only selected rows, which are all of them; padding is left out, wherever it was."""
    mask = torch.ones_like(IDS)
    if side == "right":
        mask[0, 25:], mask[2, 39:] = 0, 0
    if side == "left":
        mask[0, :15], mask[2, :1] = 0, 0
    batch: Any = IDS if side == "none" else {"input_ids": IDS, "attention_mask": mask}
    texts = [row[present.bool()] for row, present in zip(IDS, mask, strict=True)]
    for path in ("model.layers.0.mlp", "model.layers.5.mlp"):
        (found,) = rows_before(step, path, [batch])
        alone = [{"input_ids": text.unsqueeze(0), "attention_mask": torch.ones(1, len(text)).long()} for text in texts]
        wanted = torch.cat(rows_before(whole, path, alone))
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_caches_take_no_memory(step: gw.Program) -> None:
    """Neither the empty ones, nor those that a step gives back."""
    with Stream(step, [IDS, IDS[:1, :7]]) as stream:
        held = stream._values.in_memory
        assert held < 4 * IDS.nbytes
        stream.advance(list(linears(step).values())[-1])
        assert not any("append" in each.name for each in stream.live())


def test_steps_as_they_are_called_count_too(step: gw.Program) -> None:
    layout = DecoderLayout.of(step)
    (flat, mask) = flatten(step, IDS, 0, layout)
    assert mask is not None
    assert bool(mask.all())
    names = step.signature.names
    assert torch.equal(flat[3], torch.arange(40).expand(3, 40))
    assert flat[4].shape[2] == 40
    given = dict(zip(names, flat, strict=True))
    keys = [given[f"keys_{layer}"] for layer in range(layout.layers)]
    values = [given[f"values_{layer}"] for layer in range(layout.layers)]
    call = {name: given[name] for name in ("input_ids", "slots", "starts", "rows")} | {"keys": keys, "values": values}
    again, none = flatten(step, call, 0, layout)
    assert none is None
    assert all(torch.equal(a, b) for a, b in zip(flat, again, strict=True))


HOLES = torch.ones_like(IDS)
HOLES[1, 3:5] = 0
NOTHING = torch.ones_like(IDS)
NOTHING[2] = 0


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IDS[0], r"must be token ids \[batch, tokens\], not \[40\]"),
        (IDS.float(), "must be token ids"),
        ({"input_ids": IDS.tolist()}, "must be token ids .* not list"),
        ({"input_ids": IDS, "labels": IDS}, "argument 'labels'"),
        ({"ids": IDS}, "calibration batch 1 does not fit"),
        ({"input_ids": IDS, "attention_mask": HOLES[:, 1:]}, "must be like input_ids"),
        ({"input_ids": IDS, "attention_mask": HOLES}, "padding between tokens"),
        ({"input_ids": IDS, "attention_mask": NOTHING}, "nothing but padding"),
        ({"input_ids": IDS + 4000}, "the vocabulary has 4096"),
        (torch.zeros(1, 5000, dtype=torch.int64), "has 5000 tokens, the program has positions for"),
    ],
)
def test_texts_that_do_not_fit(step: gw.Program, batch: Any, message: str) -> None:
    with pytest.raises(gw.InputError, match=message), Stream(step, [batch]):
        pass


def test_a_step_is_rounded_like_the_whole_model(
    tinylm_dir: Path, shared_dir: Path, step: gw.Program, whole: gw.Program
) -> None:
    """For the same texts: in a prepared, fused step on the cpu target as in the traced model.

    Inputs differ by rounding in float32, and a code that falls on the other side moves those of the columns after it.
    So in the first layer nearly all weights agree, later on what they are worth.
    """
    tokenizer = load_tokenizer(tinylm_dir)

    def windows(text: str, count: int) -> torch.Tensor:
        ids = tokenizer(text[: 8 * 256 * count], add_special_tokens=False)["input_ids"]
        return torch.tensor(ids[: 256 * count]).reshape(count, 256)

    valid = (shared_dir / "data" / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    calibration, text = windows(valid[200_000:], 6), windows(valid, 4)
    options: dict[str, Any] = {"bits": 4, "group_size": 128}
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in calibration.split(2)]
    item = gw.QuantizeLinears(calibration=batches, **options)
    wanted = gw.optimize(whole, [item], example_inputs=batches[0], verify=False)
    item = gw.QuantizeLinears(calibration=calibration.split(2), **options)
    small: Any = gw.optimize(step, [item], target="cpu", verify=False)
    assert small.report.rows[0].notes["linears"] == len(linears(step)) - 1

    (down,) = (name for name in small.tensors() if name.startswith("model.layers.0.") and "down_proj.qweight" in name)
    codes = [each.tensors()[down] for each in (small, wanted)]
    assert float((codes[0] == codes[1]).float().mean()) > 0.5
    flat, _ = flatten(step, text, 0, DecoderLayout.of(step))
    mask = torch.ones_like(text)
    nearest = gw.optimize(whole, [gw.QuantizeLinears(**options)], example_inputs=batches[0], verify=False)
    with torch.no_grad():
        logits = [small.signature.unflatten(small._executable(*flat))["logits"]]
        logits += [each(input_ids=text, attention_mask=mask).logits for each in (wanted, nearest, whole)]
    # The perplexities of two equally good roundings differ by 1 % already when the number of threads does; what they
    # take from the model hardly does. Calibrated on tokens drawn at random it is 1.3 times as much.
    logarithms = [each.log_softmax(-1) for each in logits]
    exact = logarithms.pop()
    found, expected, uncalibrated = (float((exact.exp() * (exact - each)).sum(-1).mean()) for each in logarithms)
    assert abs(found / expected - 1) < 0.15
    assert uncalibrated > 1.3 * found
    answer = small.generate(text[0, :40].tolist(), max_new_tokens=2)
    assert answer.tokens[0][0] == int(logits[0][0, 39].argmax())
