"""Deepening, dropping and truncating: the function of a model built so, caches that follow, and clear refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.frontends.decoders import generate, greedy, make
from tests.ir.test_stacks import named
from tests.passes.sharing.models import llama, step_of, texts, tokens, traced

import graphwright as gw
from graphwright.backends.reference import ReferenceBackend
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.program import Program
from graphwright.passes.sharing.similarity import similarities

PROMPTS = [[5, 17, 30, 44], [22, 71]]


def built_of(layers: Sequence[int], skipped: str = "") -> torch.nn.Module:
    """The four-layer Llama with these layers of it, in this order; some without attention or without feed-forward."""
    base, model = llama(4), llama(len(layers))
    for at, number in enumerate(layers):
        model.model.layers[at].load_state_dict(base.model.layers[number].state_dict())
    for own, other in ((model.model.embed_tokens, base.model.embed_tokens), (model.model.norm, base.model.norm)):
        own.load_state_dict(other.state_dict())
    return model  # type: ignore[no-any-return]


def decoded(program: Program) -> list[list[int]]:
    session = ReferenceBackend().lower(program).session(slots=2, capacity=24)
    return greedy(session, PROMPTS, [1, 0], 6)


@pytest.mark.parametrize(
    ("order", "layers"),
    [
        ("cycle", (0, 1, 2, 3, 0, 1, 2, 3)),
        ("sequence", (0, 0, 1, 1, 2, 2, 3, 3)),
        ("cycle-reversed", (0, 1, 2, 3, 3, 2, 1, 0)),
    ],
)
def test_deepened_is_the_model_with_repeated_layers(order: str, layers: tuple[int, ...]) -> None:
    model = built_of(layers)
    step, plain = step_of(), traced()
    assert gw.DeepenLayers(repeats=2, order=order)(step)
    gw.DeepenLayers(repeats=2, order=order)(plain)
    gw.verify(step)
    with torch.no_grad():
        torch.testing.assert_close(plain(**texts()).logits, model(**texts()).logits, rtol=0, atol=1e-5)
    assert DecoderLayout.of(step).layers == 8
    assert decoded(step) == generate(model, PROMPTS, 6)
    assert len(step.tensors()) == len(step_of().tensors())
    assert [len(each.layers) for each in gw.repetitions_of(step)] == [4, 4]


def test_a_deepened_step_is_saved_and_prepared(tmp_path: Path) -> None:
    step = step_of(2)
    gw.DeepenLayers(repeats=3)(step)
    wanted = decoded(step)
    step.save(tmp_path / "saved")
    loaded = Program.load(tmp_path / "saved")
    assert decoded(loaded) == wanted
    gw.run_passes(loaded, [gw.PrepareDecoder(length=64)])
    assert decoded(loaded) == wanted
    assert [len(each.layers) for each in gw.repetitions_of(loaded)] == [2, 2, 2]


def test_deepening_twice_or_not_at_all() -> None:
    program = named(ash=16, birch=16)
    assert not gw.DeepenLayers(repeats=1)(program)
    gw.DeepenLayers(repeats=2)(program)
    text = str(program)
    assert text.count("weight") == str(gw.parse(text)).count("weight")
    with pytest.raises(gw.InputError, match="share weights already"):
        gw.DeepenLayers(repeats=2)(program)


# -- dropping ----------------------------------------------------------------------------------------------------------


def test_dropped_layers_are_gone_with_their_caches() -> None:
    step, plain, model = step_of(), traced(), built_of((0, 2))
    assert gw.DropBlocks(layers=(1, 3))(step)
    gw.DropBlocks(layers=(1, 3))(plain)
    gw.verify(step)
    with torch.no_grad():
        torch.testing.assert_close(plain(**texts()).logits, model(**texts()).logits, rtol=0, atol=1e-5)
    assert DecoderLayout.of(step).layers == 2
    assert decoded(step) == generate(model, PROMPTS, 6)
    assert not [name for name in step.tensors() if name.startswith(("model.layers.1.", "model.layers.3."))]


@pytest.mark.parametrize(("part", "branch"), [("attention", "self_attn"), ("feed-forward", "mlp")])
def test_dropped_parts(part: str, branch: str) -> None:
    step, model = step_of(), llama()
    gw.DropBlocks(layers=(1, 2), part=part)(step)
    gw.verify(step)
    for number in (1, 2):
        attention = branch == "self_attn"
        weight = model.model.layers[number].self_attn.o_proj if attention else model.model.layers[number].mlp.down_proj
        torch.nn.init.zeros_(weight.weight)
    assert DecoderLayout.of(step).layers == (2 if part == "attention" else 4)
    assert decoded(step) == generate(model, PROMPTS, 6)


def test_the_least_important_go_first() -> None:
    program = named(ash=16, birch=16, cedar=16)
    with torch.no_grad():  # a branch of nothing changes nothing
        program.tensor("birch.down.weight").mul_(1e-3)
        program.tensor("birch.down.bias").zero_()
        program.tensor("ash.down.weight").mul_(20)
        program.tensor("cedar.down.weight").mul_(20)
    batch = {"ids": torch.arange(12).reshape(2, 6), "scale": torch.ones(1)}
    assert gw.DropBlocks(count=1, calibration=[batch])(program)
    assert program.notes["dropped"] == [1]
    assert not [name for name in program.tensors() if name.startswith("birch")]
    assert not gw.DropBlocks(count=0)(program)


def test_similarity_is_the_mean_cosine() -> None:
    model, program = llama(), traced()
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, given, result: seen.append(torch.cosine_similarity(given[0].double(), result.double(), dim=-1))
        )
    batches = [texts(), texts(3, 5)]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    wanted = [float(torch.cat((seen[at].flatten(), seen[at + 4].flatten())).mean()) for at in range(4)]
    (stack,) = gw.find_stacks(program)
    found = similarities(program, [(each.entry, each.exit) for each in stack.layers], gw.CalibrationData(batches))
    assert found == pytest.approx(wanted, abs=1e-5)


def test_steps_are_dropped_by_texts() -> None:
    step = step_of()
    gw.DropBlocks(count=1, part="attention", calibration=[tokens(2, 9)])(step)
    assert DecoderLayout.of(step).layers == 3
    assert len(step.notes["similarity"]) == 4


def test_the_loss_without_each_says_which_goes() -> None:
    """Held against the losses of models built without each layer, and then without each of the others too."""
    ids = tokens(2, 9)

    def loss(layers: Sequence[int]) -> float:
        with torch.no_grad():
            logits = built_of(layers)(ids).logits[:, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    first = {number: loss([at for at in range(4) if at != number]) for number in range(4)}
    gone = min(first, key=first.__getitem__)
    second = {at: loss([each for each in range(4) if each not in (gone, at)]) for at in range(4) if at != gone}
    step = step_of()
    gw.DropBlocks(count=2, measure="loss", calibration=[ids])(step)
    assert step.notes["dropped"] == sorted((gone, min(second, key=second.__getitem__)))
    for found, wanted in zip(step.notes["loss_without"], (first, second), strict=True):
        assert {int(key): value for key, value in found.items()} == pytest.approx(wanted, abs=1e-4)


def test_through_optimize() -> None:
    small = gw.optimize(step_of(), [gw.DropBlocks(layers=(2,))], verify=True)
    assert DecoderLayout.of(small).layers == 3
    deep = gw.optimize(step_of(2), [gw.DeepenLayers(repeats=2)], verify=True)
    assert DecoderLayout.of(deep).layers == 4


# -- truncating --------------------------------------------------------------------------------------------------------


def test_a_prefix_of_the_layers() -> None:
    step, model = step_of(), built_of((0, 1, 2))
    assert gw.TruncateDepth(layers=3)(step)
    assert not gw.TruncateDepth(layers=3)(step)
    assert decoded(step) == generate(model, PROMPTS, 6)


def test_a_prefix_of_the_repetitions_says_what_the_classifier_there_does() -> None:
    program = traced(6)
    gw.ShareLayers(groups=2)(program)
    classified = program.clone()
    gw.ClassifyRepetitions()(classified)
    with torch.no_grad():
        early = classified(**texts())["repetition_logits"]
        for kept in (1, 2):
            small = program.clone()
            gw.TruncateDepth(repetitions=kept)(small)
            assert small.records["sharing"]["repeats"] == kept
            torch.testing.assert_close(small(**texts()).logits, early[kept - 1], rtol=0, atol=1e-6)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    step = step_of(2)
    with pytest.raises(gw.InputError, match="needs calibration data"):
        gw.DropBlocks()(step)
    with pytest.raises(gw.InputError, match="no measure"):
        gw.DropBlocks(measure="taste")
    program = named(ash=16, birch=16)
    batch = {"ids": torch.zeros(2, 3).long(), "scale": torch.ones(1)}
    with pytest.raises(gw.InputError, match="takes input_ids"):
        gw.DropBlocks(measure="loss", calibration=[batch])(program)
    with pytest.raises(gw.InputError, match="no layer 2"):
        gw.DropBlocks(layers=(2,))(step)
    with pytest.raises(gw.InputError, match="one must stay"):
        gw.DropBlocks(layers=(0, 1))(step)
    with pytest.raises(gw.InputError, match="no repetitions"):
        gw.TruncateDepth(repetitions=1)(step)
    with pytest.raises(gw.InputError, match="not both"):
        gw.TruncateDepth(repetitions=1, layers=1)
    with pytest.raises(gw.InputError, match="at least 1"):
        gw.DeepenLayers(repeats=0)
    prepared = step_of(2)
    gw.run_passes(prepared, [gw.PrepareDecoder(length=64)])
    with pytest.raises(gw.OrderError, match="wanted rows only"):
        gw.run_passes(prepared, [gw.TruncateDepth(layers=1)])
    with pytest.raises(gw.InputError, match="PrepareDecoder"):
        gw.TruncateDepth(layers=1)(prepared)
    gw.ShareLayers(groups=1)(step)
    gw.ClassifyRepetitions()(step)
    with pytest.raises(gw.ProgramError, match="besides its caches"):
        gw.TruncateDepth(repetitions=1)(step)


def test_parts_that_stand_beside_each_other_go_together() -> None:
    program = gw.load_decoder(make("gpt-neox", num_hidden_layers=2), check=False)
    with pytest.raises(gw.InputError, match="stand beside each other"):
        gw.DropBlocks(layers=(0,), part="attention")(program)
    gw.DropBlocks(layers=(0,))(program)
    assert DecoderLayout.of(program).layers == 1
