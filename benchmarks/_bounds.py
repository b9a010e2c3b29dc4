"""The machine's own limits, measured beside the kernels: reading memory, and products of INT8 or fp32 in registers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

# What is read, or what copies of weights take that take turns, so that hardly any of it is found in a cache that other
# machines' cores share too: with 96 MB a 32 MB cache gave a third of the reads on an AMD EPYC of family 26 (Zen 5).
COLD_BYTES = 512 << 20
_STEPS = 2_000_000
_AVX512 = ("avx512f", "avx512bw", "avx512vnni")
_AVX2 = ("avx2", "fma")


class Bounds:
    """Loops in C, compiled when first asked for. Needs a C compiler and AVX2; ``None`` without.

    Attributes:
        threads: that run together.
        vnni: whether products of INT8 are single instructions (AVX-512 VNNI).
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._each = COLD_BYTES // threads
        self._data = np.ones(threads * self._each + 64, np.uint8)  # ones: pages of zeros are not all there
        known = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
        self.vnni = "avx512_vnni" in known
        self._library = _compile(_AVX512 if self.vnni else _AVX2) if " avx2" in known else None

    def read_gb_per_s(self) -> float | None:
        """Bytes read from memory, all threads together."""
        if self._library is None:
            return None
        first = self._data.ctypes.data + -self._data.ctypes.data % 64
        read = self._library.read_bytes
        read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        seconds = self._together(lambda rank: read(first + rank * self._each, self._each))
        return self.threads * self._each / seconds / 1e9

    def int8_tops(self, bits: int) -> float | None:
        """Multiplications and additions of bytes with weights of so many bits, all threads together.

        Without VNNI products are added up in 16 bits, where those with 8-bit weights do not fit: exact ones take twice
        as many instructions.
        """
        found = self._tera("dot_products", "dot_operations")
        return found / 2 if found is not None and bits == 8 and not self.vnni else found

    def float32_tflops(self) -> float | None:
        """Multiplications and additions of ``vfmadd231ps``, all threads together."""
        return self._tera("multiply_adds", "multiply_add_operations")

    def _tera(self, loop: str, operations: str) -> float | None:
        if self._library is None:
            return None
        run, count = getattr(self._library, loop), getattr(self._library, operations)
        run.argtypes, count.restype = [ctypes.c_size_t], ctypes.c_size_t
        seconds = self._together(lambda rank: run(_STEPS))
        return self.threads * _STEPS * int(count()) / seconds / 1e12

    def _together(self, work: Callable[[int], object]) -> float:
        workers = [threading.Thread(target=work, args=(rank,)) for rank in range(self.threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start


def _compile(flags: Sequence[str]) -> ctypes.CDLL | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bounds.so"
        source = Path(__file__).with_name("_bounds.c")
        options = ["-O3", *(f"-m{flag}" for flag in flags), "-shared", "-fPIC"]
        subprocess.run([compiler, *options, "-o", str(library), str(source)], check=True)
        return ctypes.CDLL(str(library))
