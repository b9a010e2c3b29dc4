"""The Cholesky factor of a second moment, by which errors of columns are passed on to those still to come.

``H = L Lᵀ`` is factored in the reverse of the order in which columns are gone over: the inverses of the diagonal blocks
of ``L`` are then those of the Cholesky factor of ``H``'s inverse in the order itself.
"""

from __future__ import annotations

import torch

from graphwright.ir.errors import InputError
from graphwright.passes.quantization.finite import is_finite

# Elements worked on at once.
_SLICE_ELEMENTS = 1 << 22
# The damping is the least that a pivot can be: where one is found below this part of it, float32 is not precise enough.
_TRUSTED = 0.5
# Epsilons of the largest eigenvalue that a pivot may be off by, and iterations that find that eigenvalue.
_ROUNDINGS, _ITERATIONS = 8, 12


def checked_moment(second_moment: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, float]:
    """The diagonal of a second moment, float64, and its mean.

    Args:
        second_moment: ``[in, in]``.
        shape: of the weight, ``[out, in]``.

    Raises:
        InputError: it is not finite, of another size, or nothing but zeros.
    """
    if second_moment.shape != (shape[1], shape[1]):
        raise InputError(f"the second moment is {list(second_moment.shape)}, the weight {list(shape)}")
    if not is_finite(second_moment):
        raise InputError("the calibration inputs hold NaN or infinity", hint="check the calibration data")
    diagonal = second_moment.diagonal().to(torch.float64)
    mean = float(diagonal.mean())
    if mean <= 0.0:
        raise InputError("the calibration inputs of a linear are all zero", hint="check the calibration data")
    return diagonal, mean


def factor_in_place(moment: torch.Tensor, mean: float, damping: float) -> torch.Tensor | None:
    """As :func:`factor` for the columns in falling order, where the moment lies; ``None``, and the moment as it was,
    where float32 may not be precise enough for it.

    What rounding does to a pivot is a few epsilons of the largest eigenvalue, and no pivot is less than the damping.
    """
    if _ROUNDINGS * torch.finfo(torch.float32).eps * _largest_eigenvalue(moment) / mean > (1 - _TRUSTED) * damping:
        return None
    size = len(moment)
    step = max(1, _SLICE_ELEMENTS // size)
    for start in range(0, size // 2, step):
        stop = min(start + step, size // 2)
        first, last = slice(start, stop), slice(size - stop, size - start)
        kept = moment[first].flip(0, 1)
        moment[first] = moment[last].flip(0, 1)
        moment[last] = kept
    if size % 2:
        moment[size // 2] = moment[size // 2].flip(0)
    moment /= mean
    moment.diagonal().add_(damping)
    turned, failed = moment.t(), torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(turned, out=(turned, failed))
    if int(failed):
        raise _singular()
    return turned


def _largest_eigenvalue(moment: torch.Tensor) -> float:
    """By power iteration; at most too small by a little, as the start has a part of every eigenvector."""
    vector = torch.randn(len(moment), generator=torch.Generator().manual_seed(0))
    for _ in range(_ITERATIONS):
        vector = moment @ (vector / torch.linalg.vector_norm(vector))
    return float(torch.linalg.vector_norm(vector))


def _singular() -> InputError:
    return InputError(
        "the calibration inputs do not determine the rounding (their second moment is singular)",
        hint="give more calibration data, or raise the damping",
    )


def factor(second_moment: torch.Tensor, mean: float, damping: float, columns: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor, float32, of the damped second moment, with its rows and columns arranged anew.

    Computed in float32, in place, and again in float64 only if a pivot shows that this was not precise enough: none can
    be less than the damping.
    """
    size = len(second_moment)
    for dtype in (torch.float32, torch.float64):
        damped = torch.empty(size, size, dtype=dtype)
        step = max(1, _SLICE_ELEMENTS // size)
        for start in range(0, size, step):
            damped[start : start + step] = second_moment[columns[start : start + step]][:, columns]
        damped /= mean
        damped.diagonal().add_(damping)
        # A symmetric matrix is its own transpose, which has the layout that LAPACK works on in place.
        turned, failed = damped.t(), torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(turned, out=(turned, failed))
        if not int(failed) and float(turned.diagonal().min()) ** 2 >= _TRUSTED * damping:
            return turned.to(torch.float32)
        del damped, turned
    raise _singular()


def inverse_of(block: torch.Tensor) -> torch.Tensor:
    """Of a lower triangular block."""
    found: torch.Tensor = torch.linalg.solve_triangular(block, torch.eye(len(block)), upper=False)
    return found
