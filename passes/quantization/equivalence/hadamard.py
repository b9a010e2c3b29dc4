"""Hadamard matrices: entries ±1, orthogonal rows."""

from __future__ import annotations

import torch

from graphwright.ir.errors import InputError


def hadamard(size: int) -> torch.Tensor | None:
    """A Hadamard matrix of this size divided by ``√size``, float64; ``None`` where no construction here gives one.

    ``2^n`` by doubling (Sylvester), times a matrix of a smaller order by the constructions of Paley (1933): ``q + 1``
    for primes ``q ≡ 3 (mod 4)``, ``2 (q + 1)`` for primes ``q ≡ 1 (mod 4)``. That covers 12, 20, 28, 36, 40, 44, 60, ….
    """
    if size < 1:
        return None
    odd = size
    while odd % 2 == 0:
        odd //= 2
    base = torch.ones(1, 1, dtype=torch.float64) if odd == 1 else None
    order = 4 * odd
    while base is None and size % order == 0:
        base, order = _paley(order), 2 * order
    if base is None:
        return None
    while len(base) < size:
        base = torch.cat((torch.cat((base, base), 1), torch.cat((base, -base), 1)))
    return base.div(size**0.5)


def random_rotation(size: int, seed: int) -> torch.Tensor:
    """A Hadamard matrix with rows of random sign, float64, orthogonal (Ashkboos et al. 2024, QuaRot, section 3).

    Args:
        size: of either side.
        seed: decides the signs.

    Raises:
        InputError: no Hadamard matrix of this size can be made here.
    """
    found = hadamard(size)
    if found is None:
        raise InputError(f"no Hadamard matrix of size {size} is known here", hint="use kind='orthogonal'")
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(seed)).double()
    return found.mul(2 * signs - 1)


def random_orthogonal(size: int, seed: int) -> torch.Tensor:
    """An orthogonal matrix drawn evenly from all (Haar), float64."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    factor, triangle = torch.linalg.qr(drawn)
    result: torch.Tensor = factor * triangle.diagonal().sign()
    return result


def _paley(order: int) -> torch.Tensor | None:
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return _bordered(order - 1, -1.0) + torch.eye(order, dtype=torch.float64)
    prime = order // 2 - 1
    if order % 2 or not _is_prime(prime) or prime % 4 != 1:
        return None
    symmetric, one = _bordered(prime, 1.0), torch.eye(prime + 1, dtype=torch.float64)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(symmetric, plus) + torch.kron(one, minus)


def _bordered(prime: int, sign: float) -> torch.Tensor:
    """Jacobsthal's matrix of quadratic residues with a border: ``C Cᵀ = prime I``, ``Cᵀ = sign C``."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1.0
    character[0] = 0.0
    place = torch.arange(prime)
    found = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    found[1:, 1:] = character[(place.unsqueeze(1) - place) % prime]
    found[0, 1:], found[1:, 0] = 1.0, sign
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
