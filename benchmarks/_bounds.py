"""The machine's own limits, measured beside the kernels: reading memory, and products of INT8 or fp32 in registers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

_READ = 128 << 20
_STEPS = 2_000_000
_OPERATIONS = 24 * 64 * 2
_FLOAT_OPERATIONS = 24 * 16 * 2


class Bounds:
    """Loops in C, compiled when first asked for. Needs a C compiler and AVX-512 VNNI; ``None`` without."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._data = np.ones(threads * _READ + 64, np.uint8)  # ones: pages of zeros are not all there
        self._library = _compile()

    def read_gb_per_s(self) -> float | None:
        """Bytes read from memory, all threads together."""
        if self._library is None:
            return None
        first = self._data.ctypes.data + -self._data.ctypes.data % 64
        read = self._library.read_bytes
        read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        seconds = self._together(lambda rank: read(first + rank * _READ, _READ))
        return self.threads * _READ / seconds / 1e9

    def int8_tops(self) -> float | None:
        """Multiplications and additions of ``vpdpbusd``, all threads together."""
        if self._library is None:
            return None
        dots = self._library.dot_products
        dots.argtypes = [ctypes.c_size_t]
        seconds = self._together(lambda rank: dots(_STEPS))
        return self.threads * _STEPS * _OPERATIONS / seconds / 1e12

    def float32_tflops(self) -> float | None:
        """Multiplications and additions of ``vfmadd231ps``, all threads together."""
        if self._library is None:
            return None
        multiply_adds = self._library.multiply_adds
        multiply_adds.argtypes = [ctypes.c_size_t]
        seconds = self._together(lambda rank: multiply_adds(_STEPS))
        return self.threads * _STEPS * _FLOAT_OPERATIONS / seconds / 1e12

    def _together(self, work: Callable[[int], object]) -> float:
        workers = [threading.Thread(target=work, args=(rank,)) for rank in range(self.threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start


def _compile() -> ctypes.CDLL | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    known = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    if compiler is None or "avx512_vnni" not in known:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bounds.so"
        source = Path(__file__).with_name("_bounds.c")
        command = [
            compiler,
            "-O3",
            "-mavx512f",
            "-mavx512bw",
            "-mavx512vnni",
            "-shared",
            "-fPIC",
            "-o",
            str(library),
            str(source),
        ]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))
