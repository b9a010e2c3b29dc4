"""Which layers share their weights with which."""

from __future__ import annotations

from graphwright.ir.errors import InputError

ORDERS = ("cycle", "sequence", "cycle-reversed")


def check_order(order: str, where: str) -> None:
    """Check the name of an order.

    Raises:
        InputError: there is none of that name.
    """
    if order not in ORDERS:
        raise InputError(f"there is no order {order!r}", where=f"{where}: order", hint=f"orders: {', '.join(ORDERS)}")


def layer_order(groups: int, repeats: int, order: str) -> tuple[int, ...]:
    """For each of ``groups * repeats`` layers the number of the distinct one whose weights it uses.

    ``cycle``: 0 1 2 0 1 2 (Hooper et al., SPEED; Takase and Kiyono 2021, CYCLE). ``sequence``: 0 0 1 1 2 2 (SEQUENCE).
    ``cycle-reversed``: 0 1 2 2 1 0, cycles of which the last runs backwards (CYCLE (REV)).
    """
    if order == "sequence":
        return tuple(number // repeats for number in range(groups * repeats))
    cycle = tuple(range(groups))
    last = cycle[::-1] if order == "cycle-reversed" and repeats > 1 else cycle
    return (*cycle * (repeats - 1), *last)
