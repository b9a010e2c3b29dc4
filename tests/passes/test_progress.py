"""The progress bar: on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.passes import progress as progressing
from graphwright.passes.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called by each test: between a fixture and its test pytest puts its own stderr in place."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("GRAPHWRIGHT_PROGRESS", raising=False)
    return screen


def quantise() -> None:
    x = torch.randn(40, 16)
    program = gw.trace(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), x)
    gw.optimize(program, [gw.QuantizeLinears(bits=4, group_size=16, calibration=[x])], example_inputs=x, verify=False)


def test_a_terminal_shows_which_weight_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    seen: list[tuple[str, float | None, float]] = []
    original = progressing.Progress.now

    def now(self: progressing.Progress, detail: str) -> None:
        original(self, detail)
        (task,) = self._display.tasks
        seen.append((task.fields["detail"], task.total, task.completed))

    monkeypatch.setattr(progressing.Progress, "now", now)
    quantise()
    assert seen == [("0", 2, 0), ("2", 2, 1)]
    assert "quantising weights" in terminal.getvalue()
    assert not progressing._displays


def test_it_is_off_elsewhere_and_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("GRAPHWRIGHT_PROGRESS", "0")
    quantise()
    assert terminal.getvalue() == ""
    monkeypatch.delenv("GRAPHWRIGHT_PROGRESS")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress("work", 3) as shown:
        shown.now("here")
        shown.rename("more")
        shown.expect(4)
        shown.step()
    assert capsys.readouterr() == ("", "")


def test_work_inside_work_is_a_line_of_the_same_display(monkeypatch: pytest.MonkeyPatch) -> None:
    open_terminal(monkeypatch)
    with progress("outer", 2) as outer:
        (display,) = progressing._displays
        with progress("inner", 5) as inner:
            inner.step(3)
            assert progressing._displays == [display]
            assert [(task.description, task.completed) for task in display.tasks] == [("outer", 0), ("inner", 3)]
        outer.step()
        assert [(task.description, task.completed) for task in display.tasks] == [("outer", 1)]
    assert not progressing._displays


def test_a_failure_takes_the_display_away(monkeypatch: pytest.MonkeyPatch) -> None:
    open_terminal(monkeypatch)
    with pytest.raises(ZeroDivisionError), progress("work", 2), progress("more"):
        raise ZeroDivisionError
    assert not progressing._displays
    with progress("again"):
        assert len(progressing._displays) == 1
