"""The pass that puts adapters into a program."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from graphwright.ir.errors import InputError, SelectionError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.passes import selection
from graphwright.passes.adapters.base import AdapterKind, Draw, Factor
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.files import SavedAdapter, SavedSite, load_adapter
from graphwright.passes.adapters.inserted import FOLDED, INPUTS, MERGED, RECORD, described, note_inserted
from graphwright.passes.adapters.kinds import KINDS, kind_of
from graphwright.passes.adapters.sites import ADAPTER, Site, refusal
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Exact, Retrain

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_NAME = re.compile(r"[A-Za-z0-9_\-]+")


@dataclass(frozen=True)
class InsertAdapters(Pass):
    """Put adapters beside the layers of a frozen model, new ones to be trained or saved ones.

    ::

        %y = aten.linear(%x, %weight, %bias)
        ->
        %y = aten.linear(%x, %weight, %bias)
        %hidden = aten.linear(%x, %lora_A)          #adapter
        %branch = aten.linear(%hidden, %lora_B)     #adapter
        %adapted = aten.add.Tensor(%y, %branch)     #adapter; all who read %y read %adapted

    The adapter's tensors are parameters; those of the base keep their values and lose their gradients. All the nodes
    are tagged ``adapter``, which other passes leave alone. The base may be quantised: gradients flow through it.
    Linears may be fused before or after.

    It does not fire on: what lies outside ``where``; the output head, unless ``where`` is given; nodes tagged as
    another's that the adapter needs the inside of; places whose kind has no site there (each says why).

    Attributes:
        adapter: a kind, such as ``LoRA(rank=8)`` or its name, or a saved adapter: its folder or file, a folder of
            Hugging Face PEFT's, or what :func:`load_adapter` read.
        adapter_name: what it is called in the program; letters, digits, ``_`` and ``-``.
        overrides: options of single sites: ``{"model.layers.0.*": {"rank": 4}}``; the first selection that fits counts.
        seed: of the numbers that new adapters start with.
        freeze: take the base's parameters from training.
        dtype: in which the adapter's trained tensors are stored: ``float32``, ``bfloat16`` or ``float16``; ``None`` for
            that of their layer. Beside a layer in half precision, float32 keeps steps of training that half precision
            would round away; the tensors are rounded to the layer's dtype where they are used.
    """

    name: ClassVar[str] = "insert-adapters"
    contract: ClassVar[Contract] = Retrain()
    respects: ClassVar[frozenset[str]] = frozenset()

    adapter: AdapterKind | SavedAdapter | str | os.PathLike[str] = "lora"
    _: KW_ONLY
    adapter_name: str = "default"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    seed: int = 0
    freeze: bool = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.adapter_name, str) or not _NAME.fullmatch(self.adapter_name):
            raise InputError(
                f"must be letters, digits, '_' and '-', not {self.adapter_name!r}", where=f"{self.name}: adapter_name"
            )
        given = self.adapter
        if isinstance(given, str) and given in KINDS:
            given = kind_of(given, where=f"{self.name}: adapter")
        elif isinstance(given, os.PathLike):
            given = os.fspath(given)
        if not isinstance(given, AdapterKind | SavedAdapter | str):
            raise InputError(
                f"must be a kind of adapter or a path, not {given!r}",
                where=f"{self.name}: adapter",
                hint="such as LoRA(rank=8)",
            )
        if isinstance(given, str) and not Path(given).exists():
            kind_of(given, where=f"{self.name}: adapter (there is no such file or folder either)")
        object.__setattr__(self, "adapter", given)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"must be one of {', '.join(DTYPES)}, not {self.dtype!r}", where=f"{self.name}: dtype")
        for key in self.overrides:
            selection.check(key, f"{self.name}: overrides")
        if self.overrides and not isinstance(given, AdapterKind):
            raise InputError("a saved adapter has its options", where=f"{self.name}: overrides")

    def effective_contract(self) -> Contract:
        """Exact where new adapters change nothing yet."""
        if isinstance(self.adapter, AdapterKind) and self.adapter.starts_as_identity():
            return Exact(stored=self.adapter.stored)
        return Retrain()

    def options(self) -> dict[str, Any]:
        """Options as JSON values; an adapter that was read, by where it was."""
        if isinstance(self.adapter, SavedAdapter):
            return {**dataclasses.replace(self, adapter="lora").options(), "adapter": self.adapter.source}
        found = super().options()
        if isinstance(self.adapter, AdapterKind):
            found["adapter"] = described(self.adapter)
        return found

    def run(self, program: Program) -> bool:
        """Put the adapter in.

        Raises:
            InputError: the program has an adapter of that name, an option does not go with a site, or a saved adapter
                is of another model; says which of its tensors differ.
            SelectionError: there is no place for it.
        """
        for record, words, remedy in (
            (RECORD, "there is", "RemoveAdapters"),
            (MERGED, "the weights have taken in", "UnmergeAdapters"),
            (FOLDED, "there is, folded,", "the program from before FoldAdapters"),
            (INPUTS, "calls bring", "the program from before AdaptersAsInputs"),
        ):
            if self.adapter_name in program.records.get(record, {}):
                raise InputError(
                    f"{words} an adapter {self.adapter_name!r} already",
                    where=f"program {program.title!r}",
                    hint=f"give another adapter_name=, or take the first out with {remedy}",
                )
        given = self.adapter
        saved = load_adapter(given) if isinstance(given, str) else given if isinstance(given, SavedAdapter) else None
        kind = saved.kind if saved is not None else self.adapter
        assert isinstance(kind, AdapterKind)
        sites, refusals = self._sites(program, kind, saved)
        if saved is not None:
            saved = saved.placed([places[0] for places in sites.values()])
            saved = saved.finished({path: places[0] for path, places in sites.items()})
            kind = saved.kind
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        kinds = self._kinds(program, kind, saved, sites)
        if saved is not None:
            _check_fits(program, saved, sites, kinds)
        if not sites:
            raise SelectionError(
                f"there is no place for {kind.kind}",
                where=f"{self.name}: where={self.where!r}",
                hint=_foremost(refusals),
            )
        noted: dict[str, tuple[AdapterKind, dict[str, Any]]] = {}
        trained = 0
        with program.edit() as rewriter:
            if self.freeze:
                _freeze(rewriter)
            for path, places in sites.items():
                first, own = places[0], kinds[path]
                stored = first if self.dtype is None else dataclasses.replace(first, dtype=DTYPES[self.dtype])
                factors = (
                    own.factors(stored, Draw(self.seed, path))
                    if saved is None
                    else _loaded(saved.sites[path], stored, own)
                )
                nodes = Builder(rewriter, self.adapter_name, first).weights(_frozen_as(first.dtype, factors))
                for site in places:
                    builder = Builder(rewriter, self.adapter_name, site)
                    own.build(builder, site, builder.as_used(nodes, stored.dtype))
                    builder.sink()
                tensors = {key: str(node.target) for key, node in nodes.items()}
                noted[path] = (own, {**first.shapes(), "tensors": tensors})
            note_inserted(program, self.adapter_name, kind.settled([places[0] for places in sites.values()]), noted)
            names = {name for _, said in noted.values() for name in said["tensors"].values()}
            trained = sum(program.tensor(each).numel() for each in names if program.tensor(each).requires_grad)
        program.notes.update(adapter=self.adapter_name, kind=kind.kind, sites=len(sites), trained_parameters=trained)
        return True

    def _sites(
        self, program: Program, kind: AdapterKind, saved: SavedAdapter | None
    ) -> tuple[dict[str, list[Site]], list[Refusal]]:
        """By path, the places of it: more than one where a module is called several times."""
        chosen = self.selected(program)
        found: dict[str, list[Site]] = {}
        refusals: list[Refusal] = []
        for site in kind.sites(program, chosen, head=self.where is not None or saved is not None):
            if isinstance(site, Refusal):
                refusals.append(site)
                continue
            if saved is not None and saved.place is None and site.path not in saved.sites:
                continue
            reason = kind.check(site) if saved is None and not self.overrides else None
            if reason is not None:
                refusals.append(refusal(site.node, reason))
            else:
                found.setdefault(site.path, []).append(site)
        return found, refusals

    def _kinds(
        self, program: Program, kind: AdapterKind, saved: SavedAdapter | None, sites: Mapping[str, list[Site]]
    ) -> dict[str, AdapterKind]:
        firsts = [places[0] for places in sites.values()]
        if saved is not None:
            return {path: saved.sites[path].kind.settled(firsts) for path in sites}
        choices = [(selection.predicate(program, key), options) for key, options in self.overrides.items()]
        kinds: dict[str, AdapterKind] = {}
        for path, places in sites.items():
            options = next((options for chosen, options in choices if chosen(places[0].node)), {})
            try:
                kinds[path] = dataclasses.replace(kind, **options).settled(firsts)
            except TypeError as error:
                raise InputError(f"{kind.kind} has no such option: {error}", where=f"{self.name}: overrides") from error
            if self.overrides and (reason := kinds[path].check(places[0])) is not None:
                raise InputError(reason, where=path)
        return kinds


def _foremost(refusals: Sequence[Refusal]) -> str:
    """The reason of a place that was meant, else of any."""
    meant = [each for each in refusals if not each.reason.startswith("not selected")]
    return str((meant or list(refusals))[0]) if refusals else "the program has no layer of the kind it goes to"


def _freeze(rewriter: Rewriter) -> None:
    program = rewriter.program
    adapters = {str(node.target) for node in program.nodes if node.op == "get_attr" and ADAPTER in tags_of(node)}
    for name, tensor in program.tensors().items():
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad and name not in adapters:
            rewriter.freeze(name)


def _loaded(saved: SavedSite, site: Site, kind: AdapterKind) -> dict[str, Factor]:
    """The saved tensors of a site, trained or not as the kind has them, in the dtype that the site needs."""
    factors = kind.like(site)
    for key, tensor in saved.tensors.items():
        values = tensor.detach().to(factors[key].value.dtype, copy=True)  # not mapped: it will be trained
        factors[key] = dataclasses.replace(factors[key], value=values)
    return factors


def _frozen_as(dtype: torch.dtype, factors: Mapping[str, Factor]) -> dict[str, Factor]:
    """Factors that do not train in the dtype in which they are used: they gain nothing from another."""
    return {
        key: factor
        if factor.trained or not factor.value.is_floating_point()
        else dataclasses.replace(factor, value=factor.value.to(dtype))
        for key, factor in factors.items()
    }


def _check_fits(
    program: Program, saved: SavedAdapter, sites: Mapping[str, list[Site]], kinds: Mapping[str, AdapterKind]
) -> None:
    """Compare a saved adapter's sites with those of the program; of shapes, what it says.

    Raises:
        InputError: some are missing or of another shape; names them.
    """
    wrong = [f"{path}: the program has no such layer" for path in saved.sites if path not in sites]
    for path, places in sites.items():
        there, here = saved.sites[path], places[0]
        if any(here.shapes().get(key) != value for key, value in there.shapes.items()):
            wrong.append(f"{path}: saved for {dict(there.shapes)}, the program has {here.shapes()}")
            continue
        like = kinds[path].like(here)
        for key in sorted({*like, *there.tensors} - (kinds[path].drawn() - set(there.tensors))):
            if key not in there.tensors or key not in like:
                wrong.append(f"{path}.{key}: {'missing' if key in like else 'unknown'}")
            elif like[key].value.shape != there.tensors[key].shape:
                wrong.append(f"{path}.{key}: {list(there.tensors[key].shape)}, not {list(like[key].value.shape)}")
    present = program.tensors()
    for name, tensor in saved.base.items():
        here_ = present.get(program.aliases.get(name, name))
        if here_ is None or here_.shape != tensor.shape or not torch.equal(here_, tensor.to(here_.dtype)):
            wrong.append(f"{name}: a weight of the base that was saved along, and that the program has otherwise")
    if wrong:
        raise InputError(
            f"the adapter was saved from {saved.title!r} and does not fit {program.title!r}: {len(wrong)} of "
            f"{len(saved.sites)} places differ",
            where=saved.source,
            hint="insert it into the model that it was trained in; before linears are fused, if they are",
            context=[*wrong[:8], *(["…"] if len(wrong) > 8 else [])],
        )
