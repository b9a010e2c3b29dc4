"""The Triton backend: the dialect's operators on a GPU.

Importing this needs neither triton nor CUDA. ``triton_status()`` says whether triton is there;
``python -m graphwright.backends.triton.compile`` compiles every kernel for GPUs that need not be there.
"""

from graphwright.backends.triton.executable import TritonBackend, TritonExecutable
from graphwright.backends.triton.status import TritonStatus, triton_status

__all__ = ["TritonBackend", "TritonExecutable", "TritonStatus", "triton_status"]
