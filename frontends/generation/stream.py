"""An answer as it comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from graphwright.frontends.generation.result import Generation
from graphwright.frontends.generation.run import Run


class Stream(Iterator[str | int]):
    """New text of one answer, or its new tokens where there is no tokenizer, as they become certain.

    Text comes in whole characters, and not while it may still become a stop string; all of it together is the text of
    :attr:`result`. The session belongs to the stream until it is exhausted or closed; use it in a ``with`` block, or
    call :meth:`close`, where you may stop reading early.

    Args:
        run: of one sequence.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._on_end: Callable[[Generation], None] | None = None
        self._sequence = run.sequences[0]
        self._given = 0
        self._lock = threading.RLock()
        self._is_stepping = False

    @property
    def result(self) -> Generation:
        """The answer so far; all of it once the stream is exhausted."""
        return self._run.result()

    def __next__(self) -> str | int:
        while True:
            piece = self._piece()
            if piece is not None:
                return piece
            if self._run.is_done:
                self._end()
                raise StopIteration
            with self._lock:
                self._is_stepping = True
                try:
                    self._run.advance()
                except BaseException:
                    self._run.close()
                    self._end()
                    raise
                finally:
                    self._is_stepping = False

    def cancel(self) -> None:
        """Stop, from any thread, without waiting. What has come so far is the answer."""
        self._run.cancel()

    def close(self) -> None:
        """Stop, and give the cache back; waits for a step that another thread is in."""
        self.cancel()
        with self._lock:
            if not self._is_stepping:  # a signal handler may come here in the middle of a step: the next one ends it
                self._run.close()
                self._end()

    def when_done(self, call: Callable[[Generation], None]) -> None:
        """Have this called once, when the answer has ended, whatever ended it."""
        self._on_end = call

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _piece(self) -> str | int | None:
        if self._sequence.tail is not None:
            text = "".join(self._sequence.pieces)
            self._sequence.pieces.clear()
            return text or None
        at = len(self._sequence.prompt) + self._given
        if at >= len(self._sequence.tokens):
            return None
        self._given += 1
        return self._sequence.tokens[at]

    def _end(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(self.result)
