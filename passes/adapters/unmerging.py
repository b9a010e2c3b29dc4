"""The pass that takes merged adapters out of the weights again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.weights_file import WeightsFile
from graphwright.passes.adapters.files import SavedAdapter, load_adapter
from graphwright.passes.adapters.inserted import adapter_of, checked_names
from graphwright.passes.adapters.insertion import InsertAdapters
from graphwright.passes.adapters.merged import (
    MergedAdapter,
    checked_tensors,
    digest,
    forget_merged,
    merged_adapters,
)
from graphwright.passes.base import Pass
from graphwright.passes.contract import Approximate, Contract, Exact, Retrain


@dataclass(frozen=True, kw_only=True)
class UnmergeAdapters(Pass):
    """Take merged adapters out of the weights, which are what they were before, bit for bit; the adapters lie beside
    them again, and train.

    ::

        %adapted = aten.linear(%x, %weight, %bias)      the weight's values are W + B A
        ->
        %y = aten.linear(%x, %weight, %bias)            the weight's values are W
        %hidden = aten.linear(%x, %lora_A)
        %branch = aten.linear(%hidden, %lora_B)
        %adapted = aten.add.Tensor(%y, %branch)

    Nothing is subtracted, which would not give the same bits: the merge kept the tensors, or they are read from disk
    and known by their digests. It does not fire on a program into whose weights nothing was merged.

    Attributes:
        adapters: names of those to be taken out, last merged first whatever their order here; ``None`` for all.
        base: where the base's weights come from if they are not in memory, as after a load: a program or a model, the
            folder of a saved program, or that of a Hugging Face model.
        adapter: where the adapter comes from if it is not in memory: its folder or file. With several, a mapping by
            name.
        beside: put the adapters beside the weights again. Otherwise only the base is left.
        rounded: take out what was merged into packed weights too. Those were rounded anew, so that the function changes
            by what that cost.
    """

    name: ClassVar[str] = "unmerge-adapters"
    contract: ClassVar[Contract] = Exact(stored=True)
    respects: ClassVar[frozenset[str]] = frozenset()

    adapters: tuple[str, ...] | None = None
    base: nn.Module | str | os.PathLike[str] | None = field(default=None, compare=False)
    adapter: Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str] | None = field(default=None, compare=False)
    beside: bool = True
    rounded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "adapters", checked_names(self.name, self.adapters))

    def effective_contract(self) -> Contract:
        """Exact; but for what rounding cost, and without the adapter it is another function."""
        if not self.beside:
            return Retrain()
        return Approximate() if self.rounded else self.contract

    def options(self) -> dict[str, Any]:
        """Options as JSON values, models by their class."""
        found: dict[str, Any] = {} if self.adapters is None else {"adapters": list(self.adapters)}
        if self.base is not None:
            found["base"] = type(self.base).__name__ if isinstance(self.base, nn.Module) else os.fspath(self.base)
        if isinstance(self.adapter, Mapping):
            found["adapter"] = {name: os.fspath(path) for name, path in self.adapter.items()}
        elif self.adapter is not None:
            found["adapter"] = os.fspath(self.adapter)
        flags = {"beside": False} if not self.beside else {}
        return {**found, **flags, **({"rounded": True} if self.rounded else {})}

    def run(self, program: Program) -> bool:
        """Take them out; all or nothing.

        Raises:
            InputError: no adapter of that name was merged; another one was merged into the same weights after it; the
                weights were changed since; the base's tensors or the adapter's are not at hand, or others than those.
        """
        chosen = self._chosen(program)
        if not chosen:
            return False
        for merged in chosen:
            if merged.rounded and self.beside and not self.rounded:
                raise InputError(
                    f"adapter {merged.name!r} was merged into packed weights, which were rounded anew: without it the "
                    "function changes by what that cost",
                    where=f"program {program.title!r}",
                    hint="say that it may: UnmergeAdapters(rounded=True)",
                )
        saved = {merged.name: self._saved(program, merged, len(chosen)) for merged in chosen} if self.beside else {}
        source = _Source(self.base) if self.base is not None else None
        with program.edit() as rewriter:
            for merged in reversed(chosen):
                _check_present(program, merged)
                for weight, (before, _) in merged.weights.items():
                    _restore(rewriter, merged, weight, before, source)
                for weight in merged.added:
                    _take_out(rewriter, weight)
                forget_merged(program, merged.name)
        for name, adapter in saved.items():
            InsertAdapters(adapter, adapter_name=name, freeze=False).run(program)
        program.notes["unmerged"] = [merged.name for merged in chosen]
        return True

    def _chosen(self, program: Program) -> list[MergedAdapter]:
        present = merged_adapters(program)
        if self.adapters is None:
            return list(present.values())
        for name in self.adapters:
            if name in present:
                continue
            adapter_of(program, name)
            raise InputError(
                f"adapter {name!r} is not merged, it lies beside the weights",
                where=f"program {program.title!r}",
                hint="RemoveAdapters takes it out",
            )
        return [merged for name, merged in present.items() if name in self.adapters]

    def _saved(self, program: Program, merged: MergedAdapter, count: int) -> SavedAdapter:
        given = self.adapter
        if isinstance(given, Mapping):
            given = given.get(merged.name)
        elif given is not None and count > 1:
            raise InputError(
                f"{count} adapters are to be taken out, and one is given",
                where=f"{self.name}: adapter",
                hint="give a mapping of names and folders, or name one in adapters=",
            )
        if given is not None:
            return checked_tensors(merged, program, load_adapter(given))
        if merged.kept is not None:
            return merged.kept.adapter
        raise InputError(
            f"the tensors of adapter {merged.name!r} are not in memory",
            where=f"program {program.title!r}",
            hint="give adapter=FOLDER, which save_adapter wrote before the merge, or beside=False to do without",
        )


class _Source:
    """The base's weights, from a model in memory or a folder."""

    def __init__(self, given: nn.Module | str | os.PathLike[str]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        if isinstance(given, nn.Module):
            self.words = f"the {type(given).__name__} given as base"
            self.tensors = {**dict(given.named_parameters()), **dict(given.named_buffers())}
            return
        folder = Path(given)
        self.words = str(folder)
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        if not files:
            raise InputError(
                "holds no safetensors file" if folder.is_dir() else "there is no such folder",
                where=f"base={str(folder)!r}",
                hint="give the folder of a saved program or of a Hugging Face model, or the program itself",
            )
        for file in files:
            self.tensors.update(WeightsFile(file))

    def find(self, weight: str, wanted: str, like: torch.Tensor) -> torch.Tensor | str:
        """The tensor of a weight, or what is wrong with those that might be it."""
        alike = [name for name in self.tensors if _same_weight(name, weight)]
        for name in alike:
            found = self.tensors[name].detach()
            for values in (found, found.to(like.dtype)):
                if values.shape == like.shape and digest(values) == wanted:
                    return values
        return f"{self.words} has other values for it" if alike else f"{self.words} has no weight of that name"


def _same_weight(name: str, other: str) -> bool:
    """Whether two names may be one's: checkpoints leave prefixes out."""
    return name == other or name.endswith(f".{other}") or other.endswith(f".{name}")


def _check_present(program: Program, merged: MergedAdapter) -> None:
    """Check that the weights are those that the merge made.

    Raises:
        InputError: they were changed since.
    """
    tensors = program.tensors()
    for weight, (_, after) in merged.weights.items():
        now = tensors.get(weight)
        if now is not None and merged.kept is not None and now is merged.kept.merged.get(weight):
            continue
        if now is not None and digest(now) == after:
            continue
        others = [each for each in merged_adapters(program).values() if each.name != merged.name]
        later = [each.name for each in others if weight in each.weights]
        if now is not None and later:
            raise InputError(
                f"adapter {later[-1]!r} was merged into the same weights after {merged.name!r}",
                where=f"weight {weight!r}",
                hint=f"take both out: adapters=({merged.name!r}, {later[-1]!r})",
            )
        passes = [entry.pass_name for entry in program.journal if entry.changed]
        since = passes[len(passes) - passes[::-1].index("merge-adapters") :] if "merge-adapters" in passes else []
        raise InputError(
            f"is {'no longer there' if now is None else 'not what the merge made of it any more'}"
            + (f"; since then ran {', '.join(since)}" if since else ""),
            where=f"weight {weight!r}",
            hint="take the adapter out before other passes change its weights, or start from the base again",
        )


def _restore(rewriter: Rewriter, merged: MergedAdapter, weight: str, wanted: str, source: _Source | None) -> None:
    """Give a weight the tensor that it had.

    Raises:
        InputError: it is not at hand; says where it was looked for.
    """
    program = rewriter.program
    node = next(node for node in program.nodes if node.op == "get_attr" and str(node.target) == weight)
    found: torch.Tensor | str = "it is not in memory"
    if merged.kept is not None:
        found = merged.kept.base[weight].detach()
    elif source is not None:
        found = source.find(weight, wanted, program.tensor(weight))
    if isinstance(found, str):
        raise InputError(
            f"the weight as it was before adapter {merged.name!r} is missing: {found}",
            where=f"weight {weight!r}",
            hint="give base=, the model or program that the adapter was merged into, or its folder",
        )
    rewriter.rebind(node, found)
    for user in list(node.users):
        # A node of its own, because the value of the one there, by whose name it is known, is another.
        rewriter.replace(user, rewriter.call(user.target, like=user, **arguments_of(user)))


def _take_out(rewriter: Rewriter, weight: str) -> None:
    """Let layers do without a weight that the merge gave them."""
    for node in [node for node in rewriter.program.nodes if node.op == "get_attr" and str(node.target) == weight]:
        for user in list(node.users):
            given: dict[str, Any] = {key: None if value is node else value for key, value in arguments_of(user).items()}
            rewriter.replace(user, rewriter.call(user.target, like=user, **given))
