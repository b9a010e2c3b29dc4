"""Stages of rows at different repetitions, on the reference and on the executor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.frontends.shared_decoders import cycle, shared_decoder

import graphwright as gw
from graphwright.backends.cpu import CpuBackend
from graphwright.backends.pipeline import PipelineSession
from graphwright.backends.session import Session, StepCancelled
from graphwright.ir.errors import BackendError, InputError, ProgramError

pytest.importorskip("transformers")
native = pytest.importorskip("graphwright.backends.cpu._native")

PACKED = [gw.QuantizeLinears(bits=4, group_size=32)]


def _wave(session: PipelineSession, slot: int, tokens: list[int], start: int) -> torch.Tensor:
    """Tokens one behind the other through the pipeline: the logits of each at its last repetition."""
    hidden = torch.zeros(0, 1, session.width)
    found = []
    for time in range(len(tokens) + session.repeats - 1):
        flying = [place for place in range(len(tokens)) if 0 <= time - place < session.repeats]
        depths = torch.tensor([time - place for place in flying])
        if flying[-1] == time:
            hidden = torch.cat([hidden, torch.full((1, 1, session.width), torch.nan)])  # not read where a row is new
        logits, hidden = session.stage(
            torch.tensor([[tokens[place]] for place in flying]),
            hidden,
            depths,
            torch.full((len(flying),), slot),
            torch.tensor([start + place for place in flying]),
            torch.zeros(len(flying), 1, dtype=torch.int64),
        )
        if depths[0] == session.repeats - 1:
            found.append(logits[0, 0].clone())
            hidden = hidden[1:]
    return torch.stack(found)


def _alone(session: Session, slot: int, tokens: list[int], start: int) -> torch.Tensor:
    rows = torch.zeros(1, 1, dtype=torch.int64)
    at = torch.tensor([slot])
    steps = [
        session.step(torch.tensor([[token]]), at, torch.tensor([start + place]), rows)[0, 0].clone()
        for place, token in enumerate(tokens)
    ]
    return torch.stack(steps)


@pytest.mark.parametrize(("layers", "repeats"), [(2, 2), (1, 4)])
def test_tokens_in_flight_compute_what_tokens_alone_do(layers: int, repeats: int) -> None:
    program = shared_decoder(cycle(layers, repeats), prepared=True)
    cases: list[tuple[str | Any, list[Any], float]] = [
        ("reference", [], 2e-5),
        ("cpu", [], 0.0),  # the kernels of floats compute a row alone as among others
        ("cpu", PACKED, 5e-5),  # those of 4 bits sum one row in another order than several
        (CpuBackend(keep_weights=False), PACKED, 5e-5),
    ]
    for target, passes, tolerance in cases:
        made = gw.optimize(program, passes, target=target, verify=False)
        whole, pipeline = (make(slots=2, capacity=16) for make in (made._executable.session, made._executable.pipeline))
        prompt = (torch.tensor([[3, 1, 4]]), torch.tensor([1]), torch.tensor([0]), torch.zeros(1, 0, dtype=torch.int64))
        for session in (whole, pipeline):
            session.step(*prompt)
        for start, tokens in ((3, [9, 8, 7, 6, 5]), (5, [50, 51])):  # the second time over stale entries
            wanted, found = _alone(whole, 1, tokens, start), _wave(pipeline, 1, tokens, start)
            torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
        # Another slot goes on from a copy.
        for session in (whole, pipeline):
            session.copy(1, 0, 5)
        torch.testing.assert_close(_wave(pipeline, 0, [2, 3], 5), _alone(whole, 0, [2, 3], 5), atol=tolerance, rtol=0)


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_rounded_caches_hold_every_repetition(cache: str) -> None:
    made = gw.optimize(shared_decoder(cycle(1, 4), prepared=True), target="cpu", verify=False)
    whole = made._executable.session(slots=1, capacity=8, cache=cache)
    pipeline: Any = made._executable.pipeline(slots=1, capacity=8, cache=cache)
    assert pipeline.cache_bytes == whole.cache_bytes  # type: ignore[attr-defined]
    torch.testing.assert_close(_wave(pipeline, 0, [5, 6, 7], 0), _alone(whole, 0, [5, 6, 7], 0), atol=0, rtol=0)


def test_weights_are_packed_once_and_no_kernel_is_missing() -> None:
    made = gw.optimize(shared_decoder(cycle(2, 2), prepared=True), PACKED, target="cpu", verify=False)
    executable: Any = made._executable
    uses = executable.explain_stage()
    assert not [use for use in uses if use.kernel in ("reference", "torch")]
    assert sum(use.op == "graphwright.linear_nbits" for use in uses) == 8
    stage = executable._stage[1]
    whole = {id(call.kernel.packed) for call in executable.lowered.calls.values() if hasattr(call.kernel, "packed")}
    own = {id(call.kernel.packed) for call in stage.calls.values() if hasattr(call.kernel, "packed")}
    assert own == whole


@pytest.mark.parametrize("keep", [True, False])
def test_a_packed_file_has_the_stage_on_the_weights_of_the_step(tmp_path: Path, keep: bool) -> None:
    given: Any = {"max_new_tokens": 6, "stop_tokens": []}
    backend = CpuBackend(keep_weights=keep)
    made: Any = gw.optimize(shared_decoder(cycle(2, 2), prepared=True), PACKED, target=backend, verify=False)
    made.save_packed(tmp_path / "packed")
    packed: Any = gw.load_packed(tmp_path / "packed")
    found = packed.generate([[1, 2], [7, 3, 9]], pipeline=True, **given)
    assert found.tokens == made.generate([[1, 2], [7, 3, 9]], **given).tokens
    assert found.pipeline.repeats == 2
    step, stage = packed._executable.lowered.calls, packed._executable.stage()[1].calls

    def operands(calls: Any) -> set[int]:
        found = [call.kernel.packed for call in calls.values() if hasattr(call.kernel, "packed")]
        return {part.data_ptr() for each in found for part in vars(each).values() if torch.is_tensor(part)}

    assert operands(stage) == operands(step) != set()
    assert [use.kernel for use in packed._executable.explain_stage()] == [
        use.kernel for use in made._executable.explain_stage()
    ]


def test_a_packed_file_says_why_it_has_no_stage(tmp_path: Path) -> None:
    made: Any = gw.optimize(shared_decoder([0, 1, 2, 3], prepared=True), target="cpu", verify=False)
    made.save_packed(tmp_path / "packed")
    packed: Any = gw.load_packed(tmp_path / "packed")
    with pytest.raises(ProgramError, match="none is repeated"):
        packed.generate([[1, 2]], pipeline=True)
    assert len(packed.generate([[1, 2]], max_new_tokens=2).tokens[0]) == 2


def test_layers_that_are_not_shared_are_refused_when_stages_are_wanted() -> None:
    """Also where weights are let go of as they are packed: lowering itself must go on."""
    for backend in (CpuBackend(), CpuBackend(keep_weights=False)):
        made: Any = gw.optimize(shared_decoder([0, 1, 2, 3], prepared=True), target=backend, verify=False)
        assert len(made.generate([[1, 2]], max_new_tokens=2).tokens[0]) == 2
        with pytest.raises(ProgramError, match="none is repeated"):
            made.generate([[1, 2]], pipeline=True)


def test_bad_stages_are_refused_before_anything_is_written() -> None:
    made = gw.optimize(shared_decoder(cycle(2, 2), prepared=True), verify=False)
    session = made._executable.pipeline(slots=2, capacity=4)
    one, none = torch.tensor([0]), torch.zeros(1, 0, dtype=torch.int64)
    hidden = torch.zeros(1, 1, session.width)
    good = [torch.tensor([[3]]), hidden, one, one, one, none]
    session.stage(*good)
    bad: list[tuple[int, torch.Tensor, str]] = [
        (0, torch.tensor([[97]]), "token 97 is not in the vocabulary"),
        (1, torch.zeros(1, 1, 3), "hidden is"),
        (2, torch.tensor([2]), r"repetitions \[2\] are not all among 2"),
        (3, torch.tensor([2]), r"slots \[2\] are not all among 2"),
        (4, torch.tensor([4]), "do not fit a cache of 4"),
    ]
    for place, value, text in bad:
        with pytest.raises(InputError, match=text):
            session.stage(*[value if index == place else each for index, each in enumerate(good)])
    twice = [torch.cat([each, each]) for each in good]
    with pytest.raises(InputError, match="not distinct"):
        session.stage(*twice)
    for slots, capacity in ((0, 4), (1, 0)):
        with pytest.raises(InputError, match="needs slots and capacity"):
            made._executable.pipeline(slots=slots, capacity=capacity)
    with pytest.raises(InputError, match="rounds no caches"):
        made._executable.pipeline(cache="int8")


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_single_tokens_as_numbers(target: str) -> None:
    """What decoding calls gives what stages of tensors give, bit for bit, and refuses the same."""
    made: Any = gw.optimize(shared_decoder(cycle(2, 2), prepared=True), target=target, verify=False)
    one, other = (made._executable.pipeline(slots=2, capacity=4) for _ in range(2))
    hidden, column = np.zeros((3, one.width), np.float32), torch.zeros(3, 1, dtype=torch.int64)
    for tokens, repetitions, slots, starts in (
        ([5, 6], [0, 0], [0, 1], [0, 0]),
        ([5, 7, 6], [1, 0, 1], [0, 0, 1], [0, 1, 0]),
    ):
        count = len(tokens)
        found, after = one.stage_tokens(tokens, hidden[:count], repetitions, slots, starts)
        numbers = [torch.tensor(each) for each in (repetitions, slots, starts)]
        ids, before = torch.tensor(tokens).unsqueeze(1), torch.from_numpy(hidden[:count]).unsqueeze(1)
        wanted, hidden_after = other.stage(ids, before, *numbers, column[:count])
        assert np.array_equal(found, wanted[:, 0].numpy())
        assert np.array_equal(after, hidden_after[:, 0].numpy())
        hidden = after[[0, 0, 1]]
    good: dict[str, Any] = {"tokens": [3], "hidden": hidden[:1], "repetitions": [0], "slots": [0], "starts": [0]}
    bad: list[tuple[str, Any, str]] = [
        ("tokens", [97], "token 97 is not in the vocabulary"),
        ("tokens", [], "shapes do not fit|hidden is"),
        ("hidden", hidden[:1, :3], "hidden is"),
        ("repetitions", [-1], r"repetitions \[-1\] are not all among 2"),
        ("slots", [2], r"slots \[2\] are not all among 2"),
        ("starts", [4], "do not fit a cache of 4"),
    ]
    for name, value, text in bad:
        with pytest.raises(InputError, match=text):
            one.stage_tokens(**{**good, name: value})
    with pytest.raises(InputError, match="not distinct"):
        one.stage_tokens([3, 3], hidden[:2], [0, 0], [0, 0], [0, 1])


def test_a_backend_without_stages_says_so() -> None:
    from graphwright.backends.executable import Executable

    class Bare(Executable):
        def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
            return inputs

        def explain(self) -> list[Any]:
            return []

    with pytest.raises(BackendError, match="runs no stages"):
        Bare().pipeline()


def test_a_cancelled_stage_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    made = gw.optimize(shared_decoder(cycle(2, 2), prepared=True), target="cpu", verify=False)
    session: Any = made._executable.pipeline(capacity=4)

    class Cancelling:
        def run(self, *given: Any) -> Any:
            raise native.Cancelled("cancelled")

    with monkeypatch.context() as patch:
        patch.setattr(session, "_runner", Cancelling())
        with pytest.raises(StepCancelled):
            _wave(session, 0, [1], 0)
    assert torch.isfinite(_wave(session, 0, [1], 0)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_where_chooses_as_numpy_does(data: st.DataObject) -> None:
    """Any shapes that broadcast, with NaN and infinity, which must not leak from what is not chosen."""
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 17]), min_size=1, max_size=3))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))

    def operand(*, whole: bool) -> list[int]:
        kept = [size if whole or data.draw(st.booleans()) else 1 for size in shape]
        return kept if whole else kept[data.draw(st.integers(0, len(shape) - 1)) :]

    shapes = [operand(whole=False), operand(whole=True), operand(whole=data.draw(st.booleans()))]
    condition = random.random(shapes[0]) < 0.5
    a, b = (random.standard_normal(each).astype(np.float32) for each in shapes[1:])
    a[random.random(a.shape) < 0.2], b[random.random(b.shape) < 0.2] = np.nan, np.inf
    executor = native.Executor(0)
    values = [
        executor.input(kind, [[0, size] for size in array.shape])
        for kind, array in (("bool", condition), ("float32", a), ("float32", b))
    ]
    y = executor.buffer("float32", [[0, size] for size in shape])
    executor.add_step(native.Where(), [*values, y], 3)
    executor.output(y)
    (found,) = native.Runner(executor).run([condition, a, b], 1)
    np.testing.assert_array_equal(found, np.where(condition, a, b))
