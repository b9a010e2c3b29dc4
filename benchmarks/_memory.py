"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident() -> dict[str, int]:
    """Bytes: ``peak`` and ``now`` resident; of the latter ``own`` (nobody's file) and of ``files``."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines())
    names = {"peak": "VmHWM", "now": "VmRSS", "own": "RssAnon", "files": "RssFile"}
    return {name: int(fields[field].split()[0]) << 10 for name, field in names.items()}


class Watch:
    """The largest ``own`` and ``files`` inside the block, looked at every 10 ms.

    Args:
        beside: bytes that ``own_beside``, the largest ``own`` without them, leaves out.
    """

    def __init__(self, beside: Callable[[], int] = lambda: 0) -> None:
        self.own = self.own_beside = self.files = 0
        self._beside = beside
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.01):
            left_out = self._beside()  # before: what is added since then counts
            found = resident()
            self.own_beside = max(self.own_beside, found["own"] - left_out)
            self.own, self.files = max(self.own, found["own"]), max(self.files, found["files"])
