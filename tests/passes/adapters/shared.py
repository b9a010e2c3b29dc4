"""Every kind of adapter in a small net, put in once for all tests: nothing given here is to be written into."""

from __future__ import annotations

import functools

import torch
from tests.passes.adapters.cases import CASES, Case, Net, X, inserted, stirred

import graphwright as gw

NAMES = sorted(CASES)


def close(found: torch.Tensor, wanted: torch.Tensor, eps: float = 2e-6) -> bool:
    """Equal up to rounding; NaN is not."""
    return bool((found - wanted).detach().norm() <= eps * wanted.detach().norm())


@functools.cache
def net() -> Net:
    """The model."""
    return Net()


@functools.cache
def traced() -> gw.Program:
    """The model as a program; it shares the model's parameters."""
    return gw.trace(net(), X)


@functools.cache
def packed(bits: int) -> gw.Program:
    """The model with packed linears."""
    return gw.optimize(traced(), [gw.QuantizeLinears(bits=bits, group_size=16)], example_inputs=X, verify=False)


@functools.cache
def fresh(name: str) -> gw.OptimizedModel:
    """The net with a kind's adapter as it starts, verified as it went in."""
    return inserted(CASES[name], traced())


def put_in(case: Case, base: gw.Program | None = None, name: str = "default") -> gw.OptimizedModel:
    """A new adapter, one's own, whose insertion is not verified again."""
    item = gw.InsertAdapters(case.kind, where=case.where, adapter_name=name, **case.options)
    return gw.optimize(traced() if base is None else base, [item], example_inputs=X, verify=False)


@functools.cache
def moved(name: str) -> gw.Program:
    """The net with a kind's adapter, moved away from where it started."""
    return stirred(put_in(CASES[name]))
