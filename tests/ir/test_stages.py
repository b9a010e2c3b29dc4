"""Cutting the repeated group of layers out of a decoder: what is found, and what is refused and why."""

from __future__ import annotations

import pytest
import torch
from tests.frontends.shared_decoders import cycle, shared_decoder, shared_model

import graphwright as gw
from graphwright.backends.reference import ReferenceExecutable
from graphwright.frontends.huggingface import load_decoder
from graphwright.ir.errors import ProgramError
from graphwright.ir.stages import cut_stage
from graphwright.ir.verifier import verify

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("family", "order", "forms"),
    [
        ("llama", cycle(2, 2), (False, True)),
        ("gpt2", cycle(1, 2), (True,)),  # learned positions
        ("gemma2", cycle(2, 2), (False,)),  # scaled embeddings, layers with and without a window, norms behind the sums
        ("falcon-alibi", cycle(1, 2), (True,)),  # slopes instead of rotations
    ],
)
def test_a_stage_run_again_and_again_is_the_whole_step(family: str, order: list[int], forms: tuple[bool, ...]) -> None:
    for prepared in forms:
        program = shared_decoder(order, family, prepared=prepared)
        stage = cut_stage(program)
        verify(stage.program)
        distinct = len(set(order))
        assert (stage.layers, stage.repeats, stage.layout.layers) == (distinct, len(order) // distinct, len(order))
        assert len(stage.program.inputs) == 6 + 2 * stage.layers
        executable = ReferenceExecutable(program)
        whole, pipeline = executable.session(slots=2, capacity=12), executable.pipeline(slots=2, capacity=12)
        generator = torch.Generator().manual_seed(0)
        for start, length in ((0, 5), (5, 1), (4, 3)):  # the last takes two positions back
            tokens = torch.randint(0, 97, (2, length), generator=generator)
            given = (tokens, torch.tensor([1, 0]), torch.full((2,), start), torch.tensor([[length - 1], [0]]))
            wanted, found = whole.step(*given), pipeline.step(*given)
            assert wanted.std() > 0.1
            torch.testing.assert_close(found, wanted, atol=2e-6, rtol=0)


def test_weights_are_the_decoders_own() -> None:
    """Of a model whose parameters are tied, as it is traced."""
    program = load_decoder(shared_model(cycle(1, 2)), check=False)
    stage = cut_stage(program)
    for name, weight in stage.program.tensors().items():
        assert weight is program.tensor(name)
    bound = {name for name, _ in stage.program.named_parameters()}
    assert bound == {name for name, _ in program.named_parameters()}


def test_the_shortest_group_is_found() -> None:
    stage = cut_stage(shared_decoder([0, 0, 0, 0]))
    assert (stage.layers, stage.repeats) == (1, 4)


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ([0, 1, 2, 3], "has 4 layers, and none is repeated"),
        ([0, 1], "has 2 layers, and none is repeated"),
        ([0, 0, 1, 1], "the order 1 1 2 2, which is no group repeated"),  # "sequence"
        ([0, 1, 1, 0], "the order 1 2 2 1, which is no group repeated"),  # "cycle-reversed"
        ([0, 1, 0, 2], "the order 1 2 1 3, which is no group repeated"),
    ],
)
def test_other_orders_are_refused(order: list[int], text: str) -> None:
    for prepared in (False, True):
        with pytest.raises(ProgramError, match=text) as caught:
            cut_stage(shared_decoder(order, prepared=prepared))
        assert "decode without it" in str(caught.value)


@pytest.mark.parametrize("part", ["mlp.up_proj.weight", "input_layernorm.weight"])
def test_layers_that_share_only_parts_are_refused(part: str) -> None:
    program = shared_decoder(cycle(1, 2))
    name = f"model.layers.0.{part}"
    copied = torch.nn.Parameter(program.tensor(name).detach().clone())
    program.set_tensor(f"model.layers.1.{part}", copied)
    users = [user for node in program.nodes if node.op == "get_attr" and node.target == name for user in node.users]
    with program.edit() as rewriter:
        other = rewriter.weight(f"model.layers.1.{part}", copied, like=users[-1])
        users[-1].replace_input_with(users[-1].all_input_nodes[_place(users[-1], name)], other)
    with pytest.raises(ProgramError, match="none is repeated"):
        cut_stage(program)


def _place(node: torch.fx.Node, name: str) -> int:
    return next(index for index, each in enumerate(node.all_input_nodes) if each.target == name)


def test_layers_that_differ_in_a_constant_are_refused() -> None:
    program = shared_decoder(cycle(1, 2), prepared=True)
    attention = [node for node in program.nodes if "cached_attention" in str(node.target)][-1]
    with program.edit() as rewriter:
        rewriter.set_arguments(attention, *attention.args[:6], 0.5, *attention.args[7:])
    with pytest.raises(ProgramError, match="none is repeated"):
        cut_stage(program)


def test_what_is_no_decoder_is_refused() -> None:
    program = gw.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(ProgramError, match="is not a decoding step"):
        cut_stage(program)


def test_switched_adapters_are_refused() -> None:
    inserted = gw.InsertAdapters(gw.LoRA(rank=2), where="*q_proj", adapter_name="one")
    program = gw.optimize(shared_decoder([0, 1]), [inserted, gw.GateAdapters()], verify=False)
    with pytest.raises(ProgramError, match="switches 1 adapters"):
        cut_stage(program)
