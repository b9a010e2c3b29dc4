"""SparseGPT written down as published (Frantar and Alistarh 2023, algorithm 1), for perplexities to be held against.

It shares nothing with the package: a transformers model, hooks, float64, the inverse of the second moment and its upper
Cholesky factor. Layer after layer, as the authors' code goes about it: the moments of all linears of a layer are those
of its inputs before any of them is pruned, and the next layer sees what the pruned one gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def prune(model: nn.Module, windows: Sequence[torch.Tensor], sparsity: float, *, among: int = 0) -> None:
    """Prune every linear of a Llama's layers, in place.

    Args:
        model: of transformers, float32.
        windows: token ids ``[512]`` each.
        sparsity: fraction that goes, of every block of 128 columns; with ``among`` of every so many in a row.
        among: M of N:M.
    """
    inner: Any = model.get_submodule("model")
    with torch.no_grad():
        for layer in inner.layers:
            linears = [each for each in layer.modules() if isinstance(each, nn.Linear)]
            moments = {each: torch.zeros(each.in_features, each.in_features, dtype=torch.float64) for each in linears}

            def add(module: nn.Module, given: tuple[Any, ...], moments: dict[Any, torch.Tensor] = moments) -> None:
                rows = given[0].reshape(-1, given[0].shape[-1]).double()
                moments[module] += rows.T @ rows

            hooks = [each.register_forward_pre_hook(add) for each in linears]
            for window in windows:  # the layers before are pruned by now; what comes behind is run in vain
                model(input_ids=window.reshape(1, -1), use_cache=False)
            for hook in hooks:
                hook.remove()
            for each in linears:
                each.weight.copy_(_pruned(each.weight, moments.pop(each), sparsity, among).to(each.weight.dtype))


def _pruned(
    weight: torch.Tensor, moment: torch.Tensor, sparsity: float, among: int, *, damping: float = 0.01, block: int = 128
) -> torch.Tensor:
    w = weight.double().clone()
    h = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    result = torch.zeros_like(w)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        part, d = w[:, start:stop].clone(), inverse[start:stop, start:stop]
        errors, gone = torch.zeros_like(part), torch.zeros_like(part, dtype=torch.bool)
        if not among:
            scores = (part / d.diagonal()) ** 2
            gone.view(-1)[scores.flatten().argsort()[: math.ceil(scores.numel() * sparsity - 0.5)]] = True
        for column in range(stop - start):
            if among and column % among == 0:
                some = (part[:, column : column + among] / d.diagonal()[column : column + among]) ** 2
                first = some.argsort(dim=1)[:, : round(among * sparsity)]
                gone[:, column : column + among] = torch.zeros_like(some, dtype=torch.bool).scatter_(1, first, True)
            value = torch.where(gone[:, column], 0.0, part[:, column])
            error = (part[:, column] - value) / d[column, column]
            part[:, column:] -= error[:, None] * d[column, column:][None]
            result[:, start + column], errors[:, column] = value, error
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return result
