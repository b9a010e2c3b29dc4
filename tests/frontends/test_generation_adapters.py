"""Prompts that choose their adapters: every answer is what that adapter alone gives, whatever runs beside it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frontends.decoders import make
from tests.frontends.generators import byte_tokenizer, folder_with_tokenizer
from tests.passes.adapters.cases import stirred

import graphwright as gw
from graphwright.frontends.cli.main import main

pytest.importorskip("transformers")

COUNT = 6
PROMPTS = [[5, 9, 11, 40], [7, 3], [60, 2, 2, 31, 8], [5, 9, 11, 41], [5, 9, 11, 40]]
ROWS: list[Any] = ["low", None, "kron", "factors", "kron"]
# The last place is beside a packed matrix, the first are merged into one linear.
KINDS: dict[str, tuple[gw.AdapterKind, str]] = {
    "low": (gw.LoRA(rank=4, alpha=8), "*[qv]_proj"),
    "kron": (gw.KronA(), "*_proj"),
    "factors": (gw.IA3(), "*down_proj"),
}


@functools.cache
def adapted() -> gw.Program:
    """A small Llama with three adapters, none of which is what it started as."""
    base = gw.load_decoder(make("llama", vocab_size=257), check=False)
    inserts = [gw.InsertAdapters(kind, where=where, adapter_name=name) for name, (kind, where) in KINDS.items()]
    program = gw.optimize(base, inserts, verify=False)
    for seed in range(4):  # far enough that answers differ
        stirred(program, seed)
    return program


@functools.cache
def alone(name: str | None) -> Any:
    """The decoder with one of them, or none, in plain PyTorch."""
    others = tuple(each for each in KINDS if each != name)
    return gw.optimize(adapted(), [gw.RemoveAdapters(adapters=others)], verify=False)


@functools.cache
def prepared() -> gw.Program:
    """With all of them switched, every pass verified, the gates among them."""
    return gw.optimize(adapted(), [gw.GateAdapters(), gw.PrepareDecoder(length=64)])


@functools.cache
def switched(target: str = "reference") -> Any:
    return gw.optimize(prepared(), [], target=target)


def wanted(prompts: list[list[int]], rows: list[Any], **options: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(
        alone(row).generate([prompt], max_new_tokens=COUNT, **options).tokens[0]
        for prompt, row in zip(prompts, rows, strict=True)
    )


def test_the_adapters_answer_differently() -> None:
    assert len(set(wanted([PROMPTS[0]] * 4, [None, *KINDS]))) == 4


@pytest.mark.parametrize("target", ["reference", "cpu", "onnx"])
def test_every_prompt_has_its_own(target: str) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    decoder = switched(target)
    assert decoder.adapters == tuple(KINDS)
    assert decoder.layout.adapters == 3
    # With fewer slots than prompts, one adapter follows another in a slot.
    for batch_size in (16, 2, 1):
        found = decoder.generate(PROMPTS, adapters=ROWS, max_new_tokens=COUNT, batch_size=batch_size)
        assert found.tokens == wanted(PROMPTS, ROWS), batch_size
    for one in (None, "kron"):
        assert decoder.generate(PROMPTS, adapters=one, max_new_tokens=COUNT).tokens == wanted(PROMPTS, [one] * 5)


def logits(decoder: Any, tokens: torch.Tensor, weights: list[list[float]] | None = None) -> torch.Tensor:
    """Of every token of two rows."""
    session = decoder.session(slots=3, capacity=16)
    slots = torch.tensor([2, 0])
    for slot, given in zip(slots.tolist(), weights or [], strict=weights is not None):
        session.choose(slot, given)
    rows = torch.arange(tokens.shape[1]).repeat(2, 1)
    found: torch.Tensor = session.step(tokens, slots, torch.zeros(2, dtype=torch.int64), rows)
    return found.clone()


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_half_of_one_beside_another(target: str) -> None:
    tokens = torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(2))
    found = logits(switched(target), tokens, [[0.5, 0.0, 1.0], [0.0, 1.0, 0.0]])
    mixed = gw.optimize(adapted(), [gw.RemoveAdapters(adapters=("kron",))], verify=False)
    halved = [tensor for name, tensor in gw.adapter_tensors(mixed, "low").items() if "lora_B" in name]
    assert halved
    try:  # programs of one model share its tensors
        _scale(halved, 0.5)
        expected = [logits(mixed, tokens)[0], logits(alone("kron"), tokens)[1]]
    finally:
        _scale(halved, 2.0)
    for row in (0, 1):
        assert float((found[row] - expected[row]).norm()) <= 2e-5 * float(expected[row].norm())
    assert float((found[0] - logits(alone("factors"), tokens)[0]).norm()) > 0.01 * float(found[0].norm())


def _scale(tensors: list[torch.Tensor], factor: float) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(factor)


def test_on_the_cpu_nothing_runs_in_python() -> None:
    uses = switched("cpu").explain()
    assert not [use for use in uses if use.kernel in ("torch", "reference")]
    assert any(use.kernel.startswith("multiply") for use in uses)


def test_a_cache_is_shared_by_prompts_of_one_adapter_alone() -> None:
    decoder = switched("cpu")
    cache = decoder.prompt_cache(slots=4, capacity=40)
    prompt = PROMPTS[2]
    same = [prompt] * 4
    first = decoder.generate(same, adapters=["low", "kron", None, "low"], max_new_tokens=COUNT, cache=cache)
    assert first.counts.reused_tokens == len(prompt) - 1  # the last row has what the first computed
    assert first.tokens == wanted(same, ["low", "kron", None, "low"])
    for name in ("kron", None, "low"):
        again = decoder.generate(prompt, adapters=name, max_new_tokens=COUNT, cache=cache)
        assert again.counts.reused_tokens == len(prompt) - 1
        assert again.tokens == wanted([prompt], [name])
    others: list[Any] = ["factors", {"low": 0.5}]
    for other in others:
        assert decoder.generate(prompt, adapters=other, max_new_tokens=1, cache=cache).counts.reused_tokens == 0
    assert {len(chosen) for chosen in cache.chosen} == {3}


def test_answers_that_are_sampled_do_not_depend_on_others() -> None:
    options = {"temperature": 1.0, "seed": 11}
    rows = ["low", "kron", "low", None]
    prompts = [PROMPTS[0]] * 4
    found = switched().generate(prompts, adapters=rows, max_new_tokens=COUNT, **options).tokens
    single = wanted(prompts, rows, **options)
    assert found[0] == single[0]
    assert found[1] == single[1]
    assert found[3] == single[3]
    assert found[2] != found[0]  # the same prompt with the same adapter draws on


@pytest.mark.parametrize("which", ["itself", "another", "lookup"])
def test_drafts_change_no_answer(which: str) -> None:
    draft = {"itself": switched("cpu"), "another": alone("kron"), "lookup": "prompt-lookup"}[which]
    found = switched("cpu").generate(PROMPTS, adapters=ROWS, max_new_tokens=COUNT, draft=draft)
    assert found.tokens == wanted(PROMPTS, ROWS)
    if which == "itself":  # it follows the model's choice, so everything it guesses is right
        assert found.counts.accepted_tokens == found.counts.drafted_tokens > 0


def test_a_conversation_may_change_its_adapter() -> None:
    decoder = switched("cpu")
    chat = decoder.chat(tokenizer=byte_tokenizer(), adapters="low", max_new_tokens=3, capacity=60, stop_tokens=())
    first = chat.send("hello")
    assert first.tokens[0] == alone("low").generate(first.prompts, max_new_tokens=3, stop_tokens=()).tokens[0]
    more = chat.send("more")
    assert more.counts.reused_tokens > len(b"hello")
    other = chat.send("other", adapters="kron")
    assert other.counts.reused_tokens == 0
    assert other.tokens[0] == alone("kron").generate(other.prompts, max_new_tokens=3, stop_tokens=()).tokens[0]
    assert list(decoder.stream(PROMPTS[0], adapters="kron", max_new_tokens=COUNT)) == list(
        wanted([PROMPTS[0]], ["kron"])[0]
    )


def test_packed_and_saved_it_still_switches(tmp_path: Path) -> None:
    switched("cpu").save_packed(tmp_path / "packed")
    packed: Any = gw.load_packed(tmp_path / "packed")
    switched().save(tmp_path / "whole")
    loaded: Any = gw.optimize(gw.Program.load(tmp_path / "whole"), [], verify=False)
    for decoder in (packed, loaded):
        assert decoder.adapters == tuple(KINDS)
        assert decoder.generate(PROMPTS, adapters=ROWS, max_new_tokens=COUNT).tokens == wanted(PROMPTS, ROWS)


def test_quantised_and_calibrated() -> None:
    program = prepared()
    ids = torch.randint(0, 257, (8, 24), generator=torch.Generator().manual_seed(3))
    weights = gw.adapter_weights(program, [["low", None, "kron", "factors"][row % 4] for row in range(8)])
    batch = {"input_ids": ids, "adapter_weights": weights}
    quantize = gw.QuantizeLinears(bits=8, group_size=16, calibration=[batch])
    small: Any = gw.optimize(program, [quantize], target="cpu", verify=False)
    tokens = ids[:2, :9]
    found = logits(small, tokens, [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    for row, name in enumerate(("kron", None)):
        expected = logits(alone(name), tokens)[row]
        assert float((found[row] - expected).norm()) < 0.05 * float(expected.norm())
    for given in ({"input_ids": ids}, {"input_ids": ids, "adapter_weights": weights[:, :2]}):
        with pytest.raises(gw.InputError, match=r"must be weights \[8, 3\]"):
            gw.optimize(program, [gw.QuantizeLinears(bits=8, group_size=16, calibration=[given])])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "does not say which of 'low', 'kron', 'factors' answer"),
        (["low"], "has 1 choices for 5 prompts"),
        ("lora", "no adapter 'lora' that calls switch"),
        ({"low": float("nan")}, "no finite number"),
        ({"low": "half"}, "no finite number"),
        (3, "cannot be a int"),
        ([3] * 5, "is a int"),
    ],
)
def test_a_choice_that_cannot_be_used_is_refused_before_anything_runs(given: Any, words: str) -> None:
    with pytest.raises(gw.InputError, match=words):
        switched().generate(PROMPTS, adapters=given, max_new_tokens=1)


def test_what_has_no_switch_says_so(tmp_path: Path) -> None:
    with pytest.raises(gw.InputError, match="no adapters that calls switch"):
        alone("low").generate(PROMPTS, adapters="low", max_new_tokens=1)
    session = switched("cpu").session(slots=2, capacity=8)
    token, zero = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(gw.InputError, match=r"answer in the slots \[0\] was not said"):
        session.step(token, zero, zero, token)
    for slot, weights, words in ((2, [0.0] * 3, "slot 2 is not one"), (0, [0.0], "no weight for each of 3")):
        with pytest.raises(gw.InputError, match=words):
            session.choose(slot, weights)
    with pytest.raises(gw.InputError, match="no weight for each of 3"):
        session.choose(0, [0.0, float("inf"), 0.0])
    with pytest.raises(gw.InputError, match="stages cannot choose between the adapters"):
        switched().generate(PROMPTS, adapters="low", max_new_tokens=1, pipeline=True)
    with pytest.raises(gw.ProgramError, match="switches 3 adapters, which stages have no place for"):
        switched().pipeline_session()
    with pytest.raises(gw.ExportError, match="switches adapters by an input"):
        gw.export_genai(switched(), tmp_path / "genai", source=_source(tmp_path), tokenizer=False)


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        (["--adapter", "low"], "low"),
        (["--adapter", "low=0.5", "--adapter", "kron"], {"low": 0.5, "kron": 1.0}),
        (["--base"], None),
    ],
)
def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], choice: Any) -> None:
    switched("cpu").save_packed(tmp_path / "packed")
    tokenizer = str(folder_with_tokenizer(tmp_path / "tokenizer", byte_tokenizer()))
    options = ["--tokenizer", tokenizer, "--max-new-tokens", "5", "--json"]
    assert main(["generate", str(tmp_path / "packed"), "some", *options, *given]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = switched("cpu").generate([list(b"some")], adapters=choice, max_new_tokens=5, stop_tokens=[256])
    assert found["answers"][0]["tokens"] == list(wanted.tokens[0])
    assert main(["generate", str(tmp_path / "packed"), "some", *options]) == 2
    assert "does not say which of 'low', 'kron', 'factors' answer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path / "packed"), "some", *options, "--adapter", "low=half"])
    assert "'half' is no weight of adapter 'low'" in capsys.readouterr().err


def _source(folder: Path) -> Path:
    """A folder with a configuration."""
    make("llama", vocab_size=257).config.save_pretrained(folder / "source")
    return folder / "source"
