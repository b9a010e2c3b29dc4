"""The kinds of adapters, by name; each is imported when it is asked for."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from graphwright.ir.errors import InputError
from graphwright.passes.adapters.base import AdapterKind

# name -> module of this package and class
KINDS: dict[str, tuple[str, str]] = {
    "bitfit": ("bitfit", "BitFit"),
    "compacter": ("compacter", "Compacter"),
    "dept": ("prompt", "DePT"),
    "dora": ("dora", "DoRA"),
    "ether": ("ether", "ETHER"),
    "ether-plus": ("ether", "ETHERPlus"),
    "houlsby": ("houlsby", "HoulsbyAdapter"),
    "ia3": ("ia3", "IA3"),
    "krona": ("krona", "KronA"),
    "krona-block": ("krona_block", "KronABlock"),
    "loda": ("loda", "LoDA"),
    "loha": ("loha", "LoHa"),
    "lokr": ("lokr", "LoKr"),
    "lora": ("lora", "LoRA"),
    "lora-fa": ("lora_fa", "LoRAFA"),
    "lora-xs": ("lora_xs", "LoRAXS"),
    "nola": ("nola", "NOLA"),
    "oft": ("oft", "OFT"),
    "parallel": ("parallel", "ParallelAdapter"),
    "prefix": ("prefix", "PrefixTuning"),
    "prompt": ("prompt", "PromptTuning"),
    "sora": ("sora", "SoRA"),
    "vera": ("vera", "VeRA"),
}


def kind_of(given: object, *, where: str) -> AdapterKind:
    """A kind by its name, by a mapping of name and options, or as it is.

    Args:
        given: ``"lora"``, ``{"kind": "lora", "rank": 8}`` or ``LoRA(rank=8)``.
        where: the option, for messages.

    Raises:
        InputError: there is none of that name, or it has no such option.
    """
    if isinstance(given, AdapterKind):
        return given
    table: Mapping[str, Any] = given if isinstance(given, Mapping) else {"kind": given}
    name = table.get("kind")
    if not isinstance(name, str) or name not in KINDS:
        near = difflib.get_close_matches(str(name), KINDS, n=1)
        raise InputError(
            f"there is no kind of adapter {name!r}",
            where=where,
            hint=f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(sorted(KINDS))}",
        )
    module, wanted = KINDS[name]
    found: type[AdapterKind] = getattr(importlib.import_module(f"{__name__}.{module}"), wanted)
    options = {key: value for key, value in table.items() if key != "kind"}
    known = [item.name for item in dataclasses.fields(found)]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            raise InputError(
                f"{name} has no option {option!r}",
                where=where,
                hint=f"did you mean {near[0]!r}?" if near else f"options: {', '.join(known)}",
            )
    return found(**options)
