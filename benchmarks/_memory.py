"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident() -> dict[str, int]:
    """Bytes: ``peak`` and ``now`` resident; of the latter ``own`` (nobody's file) and of ``files``."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines())
    names = {"peak": "VmHWM", "now": "VmRSS", "own": "RssAnon", "files": "RssFile"}
    return {name: int(fields[field].split()[0]) << 10 for name, field in names.items()}


class Watch:
    """The largest ``own`` and ``files`` inside the block, looked at every 10 ms."""

    def __init__(self) -> None:
        self.own = self.files = 0
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
            found = resident()
            self.own, self.files = max(self.own, found["own"]), max(self.files, found["files"])
