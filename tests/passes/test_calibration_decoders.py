"""Texts as calibration data of a decoding step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphwright as gw
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
    assert mask is not None and bool(mask.all())
    names = step.signature.names
    assert torch.equal(flat[3], torch.arange(40).expand(3, 40)) and flat[4].shape[2] == 40
    given = dict(zip(names, flat, strict=True))
    keys = [given[f"keys_{layer}"] for layer in range(layout.layers)]
    values = [given[f"values_{layer}"] for layer in range(layout.layers)]
    call = {name: given[name] for name in ("input_ids", "slots", "starts", "rows")} | {"keys": keys, "values": values}
    again, none = flatten(step, call, 0, layout)
    assert none is None and all(torch.equal(a, b) for a, b in zip(flat, again, strict=True))


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


def test_a_folder_is_rounded_like_the_whole_model(tinylm_dir: Path, whole: gw.Program) -> None:
    """Weights quantised in a prepared, fused decoding step for the cpu give what those of the traced model give."""
    generator = torch.Generator().manual_seed(7)
    tokens = [torch.randint(5, 4000, (1, 256), generator=generator) for _ in range(4)]
    options = {"bits": 4, "group_size": 128, "clip_search": False}
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in tokens]
    examples = {name: value[:, :8] for name, value in batches[0].items()}
    reference = gw.optimize(
        whole, [gw.QuantizeLinears(calibration=batches, **options)], example_inputs=examples, verify=False
    )
    step = gw.load_decoder(tinylm_dir, dtype="float32", check=False)
    passes = [gw.PrepareDecoder(), gw.QuantizeLinears(calibration=tokens, **options)]
    small: Any = gw.optimize(step, passes, target="cpu", verify=False)
    assert small.report.rows[-1].notes["linears"] > 0
    text = torch.randint(5, 4000, (2, 128), generator=generator)
    (flat, _) = flatten(step, text, 0, DecoderLayout.of(step))
    with torch.no_grad():
        found = small.signature.unflatten(small._executable(*flat))["logits"]
        wanted = reference(input_ids=text, attention_mask=torch.ones_like(text)).logits
        exact = whole(input_ids=text, attention_mask=torch.ones_like(text)).logits
    # Both round the same weights for inputs that differ by float32 rounding; a few codes fall on the other side.
    assert float((found - wanted).norm()) < 0.2 * float((wanted - exact).norm())
    assert float((found.argmax(-1) == wanted.argmax(-1)).float().mean()) > 0.97
    losses = [
        float(torch.nn.functional.cross_entropy(each[:, :-1].flatten(0, 1), text[:, 1:].flatten()))
        for each in (found, wanted)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert len(small.generate(text[0].tolist(), max_new_tokens=3).tokens[0]) <= 3
