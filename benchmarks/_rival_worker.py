"""What a rival's process does: load systems and time them when it is asked to, one line of JSON for each request.

Runs on the Python of the rival's own virtual environment: nothing but the standard library and numpy.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

Call = Callable[[], Any]


def timed(call: Call, warm: float, seconds: float) -> list[float]:
    """Seconds of calls made one after another for so long, once others have warmed it up."""
    until = time.perf_counter() + warm
    call()
    while time.perf_counter() < until:
        call()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while not found or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def peak_mb() -> float:
    """The most memory this process has had, in megabytes. (What ``getrusage`` says includes its parent's.)"""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("VmHWM"))


def serve(load: Callable[[dict[str, Any]], Any], make: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Answer requests until there are no more.

    Args:
        load: from a request to a call that gives the system's output; for requests that will name a number of
            ``rows``, to what makes such a call of that number; or to an object with methods that requests name.
        make: makes the file or folder that will be loaded.
    """
    # Libraries print to standard output as they please: the answers go to a copy of it, the rest to the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    systems: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "make" and make is not None:
                answer = make(request)
            else:
                answer = _answer(request, systems, load)
        except Exception as error:  # any error of a rival is an answer
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(request: dict[str, Any], systems: dict[str, Any], load: Callable[[dict[str, Any]], Any]) -> Any:
    system = request["system"]
    if request["do"] == "peak":
        return peak_mb()
    if request["do"] == "load":
        systems[system] = load(request)
    elif request["do"] == "drop":
        systems.pop(system, None)
    elif request["do"] == "time":
        return timed(_call(request, systems[system]), request["warm"], request["seconds"])
    elif request["do"] == "answer":
        np.save(request["to"], np.asarray(_call(request, systems[system])()))
    else:
        given = {name: value for name, value in request.items() if name not in ("do", "system")}
        return getattr(systems[system], request["do"])(**given)
    return None


def _call(request: dict[str, Any], loaded: Any) -> Call:
    call: Call = loaded(request["rows"]) if "rows" in request else loaded
    return call
