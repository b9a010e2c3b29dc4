"""The executor: values seen in other shapes, memory that is shared over time, and calls back into Python."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

native = pytest.importorskip("graphwright.backends.cpu._native")

N = [1, 0]  # the size of symbol 0
CONSTANT = 0


def _number(size: int) -> list[int]:
    return [CONSTANT, size]


def _runner(executor: Any) -> Any:
    return native.Runner(executor)


def test_sizes_are_computed_from_symbols() -> None:
    executor = native.Executor(1)
    x = executor.input("int64", [N, _number(6)])
    twice = [*N, *_number(2), 4]  # N * 2
    flat = executor.reshape(x, [twice, _number(3)])
    y = executor.buffer("int64", [twice, _number(3)])
    executor.add_step(native.IntegerOperation("add", 1), [flat, -1, y], 2)
    executor.output(y)
    runner = _runner(executor)
    for rows in (7, 4, 2, 1, 4):
        given = np.arange(rows * 6).reshape(rows, 6)
        (found,) = runner.run([given], 1)
        assert np.array_equal(found, given.reshape(rows * 2, 3) + 1)
    assert runner.plans == 4


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0)])
@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 12), (1, 24, 1), (2, 2, 6), (3, 8), (6, 2, 2)])
def test_a_reshape_is_a_view_or_a_copy_and_right(axes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    executor = native.Executor(0)
    x = executor.input("int64", [_number(2), _number(3), _number(4)])
    seen = executor.reshape(executor.permute(x, list(axes)), [_number(size) for size in shape])
    y = executor.buffer("int64", [_number(size) for size in shape])
    executor.add_step(native.IntegerOperation("mul", 3), [seen, -1, y], 2)
    executor.output(y)
    given = np.arange(24).reshape(2, 3, 4)
    (found,) = _runner(executor).run([given], 1)
    assert np.array_equal(found, given.transpose(axes).reshape(shape) * 3)


class Random:
    """A random program on matrices, and what numpy makes of it."""

    def __init__(self, draw: Any) -> None:
        self.executor = native.Executor(2)
        rows, columns = [1, 0], [1, 1]
        self.inputs = [np.arange(12, dtype=np.int64).reshape(3, 4), -np.arange(12, dtype=np.int64).reshape(3, 4)]
        self.values = [(self.executor.input("int64", [rows, columns]), each, [rows, columns]) for each in self.inputs]
        for _ in range(draw(st.integers(1, 25))):
            self._grow(draw)
        wanted = draw(st.lists(st.integers(0, len(self.values) - 1), min_size=1, max_size=4))
        self.expected = []
        for index in wanted:
            number, array, _ = self.values[index]
            self.executor.output(number)
            self.expected.append(array)

    def _grow(self, draw: Any) -> None:
        number, array, (rows, columns) = draw(st.sampled_from(self.values))
        match draw(st.sampled_from(["transpose", "operate", "operate", "combine", "flatten", "narrow"])):
            case "transpose":
                made = self.executor.permute(number, [1, 0]), array.T, [columns, rows]
            case "flatten":
                shape = [[*rows, *columns, 4], [0, 1]]
                made = self.executor.reshape(number, shape), array.reshape(-1, 1), shape
            case "narrow":
                if array.shape[0] < 2:
                    return
                shape = [[*rows, 0, 1, 3], columns]
                made = self.executor.narrow(number, 0, [0, 1], shape[0]), array[1:], shape
            case "operate":
                times = draw(st.integers(-3, 3))
                buffer = self.executor.buffer("int64", [rows, columns])
                self.executor.add_step(native.IntegerOperation("mul", times), [number, -1, buffer], 2)
                made = buffer, array * times, [rows, columns]
            case _:
                others = [each for each in self.values if each[1].shape == array.shape]
                other = draw(st.sampled_from(others))
                buffer = self.executor.buffer("int64", [rows, columns])
                self.executor.add_step(native.IntegerOperation("add"), [number, other[0], buffer], 2)
                made = buffer, array + other[1], [rows, columns]
        self.values.append(made)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_memory_is_never_shared_by_values_that_are_still_needed(data: st.DataObject) -> None:
    program = Random(data.draw)
    runner = _runner(program.executor)
    for _ in range(2):
        found = runner.run(program.inputs, 1)
        for result, expected in zip(found, program.expected, strict=True):
            assert np.array_equal(result, expected)


def test_memory_of_what_is_no_longer_needed_is_used_again() -> None:
    executor = native.Executor(0)
    value = executor.input("int64", [_number(1000)])
    for _ in range(50):
        result = executor.buffer("int64", [_number(1000)])
        executor.add_step(native.IntegerOperation("add", 1), [value, -1, result], 2)
        value = result
    executor.output(value)
    runner = _runner(executor)
    (found,) = runner.run([np.zeros(1000, np.int64)], 1)
    assert (found == 50).all()
    assert runner.arena_bytes <= 3 * 8064


def test_a_python_call_gets_arrays_and_fills_in_the_outputs() -> None:
    executor = native.Executor(1)
    x = executor.input("float32", [N])
    y, z = executor.buffer("float32", [N]), executor.buffer("bool", [N])

    def call(arrays: list[Any]) -> None:
        given, absent, doubled, positive = arrays
        assert absent is None
        doubled[:] = given * 2
        positive[:] = given > 0

    executor.add_step(native.PythonCall(call), [x, -1, y, z], 2)
    executor.output(y)
    executor.output(z)
    doubled, positive = _runner(executor).run([np.array([-1.5, 2.0], np.float32)], 1)
    assert doubled.tolist() == [-3.0, 4.0]
    assert positive.tolist() == [False, True]


def test_an_error_in_python_comes_out_and_the_runner_goes_on() -> None:
    executor = native.Executor(1)
    x, calls = executor.input("float32", [N]), [0]
    y = executor.buffer("float32", [N])

    def call(arrays: list[Any]) -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise KeyError("once")
        arrays[1][:] = arrays[0]

    executor.add_step(native.PythonCall(call), [x, y], 1)
    executor.output(y)
    runner = _runner(executor)
    with pytest.raises(KeyError, match="once"):
        runner.run([np.ones(3, np.float32)], 1)
    assert runner.run([np.ones(3, np.float32)], 1)[0].tolist() == [1.0, 1.0, 1.0]


def test_a_call_can_be_cancelled_by_another_thread() -> None:
    executor = native.Executor(1)
    x = executor.input("float32", [N])
    value, started = x, threading.Event()
    for _ in range(200):
        result = executor.buffer("float32", [N])

        def call(arrays: list[Any]) -> None:
            started.set()
            time.sleep(0.01)
            arrays[1][:] = arrays[0]

        executor.add_step(native.PythonCall(call), [value, result], 1)
        value = result
    executor.output(value)
    runner = _runner(executor)
    threading.Thread(target=lambda: (started.wait(), runner.cancel())).start()
    begin = time.monotonic()
    with pytest.raises(native.Cancelled):
        runner.run([np.ones(3, np.float32)], 1)
    assert time.monotonic() - begin < 1.5
    assert runner.run([np.ones(3, np.float32)], 1)[0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "inputs are missing"),
        ([np.zeros(3, np.float32)] * 3, "too many inputs"),
        ([np.zeros(3, np.float32), np.zeros(4, np.float32)], "differ in a size"),
        ([np.zeros(3, np.int64), np.zeros(3, np.float32)], "wrong number of axes or dtype"),
        ([np.zeros((3, 1), np.float32), np.zeros(3, np.float32)], "wrong number of axes or dtype"),
        ([np.zeros(6, np.float32)[::2], np.zeros(3, np.float32)], "contiguous"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: list[Any], message: str) -> None:
    executor = native.Executor(1)
    values = [executor.input("float32", [N]) for _ in range(2)]
    executor.output(values[0])
    with pytest.raises(ValueError, match=message):
        _runner(executor).run(inputs, 1)


def test_a_bound_tensor_must_be_there() -> None:
    executor = native.Executor(1)
    value = executor.bound("float32", [N])
    x = executor.input("float32", [N])
    executor.output(x)
    runner = _runner(executor)
    with pytest.raises(ValueError, match="bound tensor is missing"):
        runner.run([np.zeros(3, np.float32)], 1)
    runner.bind(value, np.zeros(3, np.float32))
    runner.run([np.zeros(3, np.float32)], 1)
    with pytest.raises(ValueError, match="not bound"):
        runner.bind(x, np.zeros(3, np.float32))
