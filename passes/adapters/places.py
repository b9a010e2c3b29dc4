"""Where a merge writes: the layer that an adapter lies beside, or the rows of one that several were stacked into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from graphwright.ir.arguments import argument, arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import tags_of
from graphwright.ir.pruned import follow, is_masked
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import VAL
from graphwright.passes.adapters.base import Dense
from graphwright.passes.adapters.builder import exit_tag, tag_of
from graphwright.passes.adapters.inserted import Inserted, InsertedSite, base_of, fed_by
from graphwright.passes.adapters.packed import PackedBase
from graphwright.passes.adapters.sites import ADAPTER, Site
from graphwright.passes.quantization.loss import Loss


@dataclass(frozen=True)
class Place:
    """A layer, or some rows of one.

    Attributes:
        site: the layer.
        rows: first row and the one behind the last, where it is a part of a stacked weight; ``None`` for all.
        part: the node that gives those rows' outputs; ``None`` for all.
        packed: the weight, where it is packed.
    """

    site: Site
    rows: tuple[int, int] | None = None
    part: fx.Node | None = None
    packed: PackedBase | None = None

    @property
    def stored(self) -> fx.Node:
        """The node of the weight, of its codes where it is packed."""
        if self.packed is not None:
            return self.packed.codes
        assert self.site.weight is not None
        return self.site.weight

    @property
    def is_masked(self) -> bool:
        """Whether the weight was pruned."""
        return is_masked(self.site.node)

    @property
    def span(self) -> slice:
        """The rows."""
        return slice(None) if self.rows is None else slice(*self.rows)


def place_of(program: Program, adapter: Inserted, site: InsertedSite, exit_: fx.Node) -> Place:
    """The layer that an adapter lies beside, or before.

    Raises:
        InputError: it lies on another adapter, or beside something that is no layer.
    """
    fed = fed_by(exit_, adapter.name)
    base = base_of(exit_, adapter.name) if fed is None else fed
    if ADAPTER in tags_of(base):
        raise InputError(
            f"adapter {adapter.name!r} lies on another one",
            where=site.path,
            hint="merge them in the order in which they were put in, or all at once",
        )
    stacked = _stacked_in(base)
    node, rows = (base, None) if stacked is None else stacked
    found = site.kind.site_at(program, node)
    if not isinstance(found, Site) or (fed is not None and found.x is not exit_):
        raise InputError(
            f"the layer cannot take an adapter in: {found or f'%{node.name} is none that it lies beside'}",
            where=site.path,
        )
    inputs = {base_of(found.x, adapter.name), found.x, found.node, base}
    other = next((each for each in _reads(exit_, adapter.name, found) if each not in inputs), None)
    if other is not None:
        raise InputError(
            f"adapter {adapter.name!r} reads %{other.name}, but its layer reads %{found.x.name}, which another adapter "
            "gives",
            where=site.path,
            hint="merge first the one that was put in last, or keep them",
        )
    packed = PackedBase.at(program, node, rows) if found.packed else None
    return Place(found, rows, None if rows is None else base, packed)


def _reads(exit_: fx.Node, name: str, place: Site) -> Iterator[fx.Node]:
    """What an adapter's nodes read that is neither theirs nor a weight."""
    tag, stack, seen = tag_of(name), [exit_], set[fx.Node]()
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            if source in seen or source.op == "get_attr" or not isinstance(source.meta[VAL], torch.Tensor):
                continue
            seen.add(source)
            if tag in tags_of(source) and source is not place.x and exit_tag(name) not in tags_of(source):
                stack.append(source)
            else:
                yield source


def _stacked_in(node: fx.Node) -> tuple[fx.Node, tuple[int, int]] | None:
    """The linear and its rows, where a node is a part of a linear's output (:class:`FuseQKV`)."""
    split = node.args[0] if op_name(node) == "py.getitem" else None
    if not isinstance(split, fx.Node) or op_name(split) != "aten.split_with_sizes":
        return None
    linear, sizes, dim = (argument(split, key) for key in ("self", "split_sizes", "dim"))
    index = node.args[1]
    if not isinstance(index, int) or dim not in (-1, linear.meta["val"].dim() - 1):
        return None
    start = sum(sizes[:index])
    return linear, (start, start + sizes[index])


def check_readers(program: Program, place: Place, places: Iterable[Place], name: str) -> None:
    """Refuse a weight that something without this adapter reads too.

    Raises:
        InputError: names the other reader.
    """
    adapted = {each.site.node for each in places}
    own = tag_of(name)  # such as DoRA's norm of the weight, which goes
    nodes = [node for node in program.nodes if node.op == "get_attr" and node.target == place.stored.target]
    others = [user for node in nodes for user in node.users if user not in adapted and own not in tags_of(user)]
    if others:
        raise InputError(
            f"the weight is also read by %{others[0].name}, which has no adapter",
            where=place.site.path,
            hint="keep the adapter beside the weight",
        )


@dataclass(frozen=True)
class Rounded:
    """What rounding a merged weight cost.

    Attributes:
        loss: of the weight.
        of_adapter: root mean square error as a fraction of what the adapter changed; 1: as much is lost as it brings.
    """

    loss: Loss
    of_adapter: float


def write_merged(
    rewriter: Rewriter, place: Place, site: InsertedSite
) -> tuple[fx.Node | None, Rounded | None, float | None]:
    """Give the weight and bias the values with the adapter in them; zeros of a pruned weight stay.

    Returns:
        the bias, a new one where the layer had none and the adapter has; what rounding lost, where it is packed; and
        the fraction (root mean square) of the adapter's change that the mask drops, where it was pruned.
    """
    program, target = rewriter.program, place.site
    factors = {key: program.tensor(name).detach().double() for key, name in site.tensors.items()}
    bias = program.tensor(target.bias).detach()[place.span].double() if target.bias is not None else None
    if place.packed is not None:
        dense = place.packed.dense(program)
    else:
        stored = program.tensor(place.stored).detach()
        dense = (stored.t() if target.transposed else stored)[place.span].double()
    merged = site.kind.merged(target, Dense(dense, bias), factors)
    new_bias = _write_bias(rewriter, place, bias, merged.bias)
    whole, lost, name = merged.weight, None, str(place.stored.target)
    if place.is_masked:
        brought, gone = whole - dense, dense == 0
        size = float(brought.square().sum())
        lost = (float(brought[gone].square().sum()) / size) ** 0.5 if size > 0 else 0.0
        whole = torch.where(gone, 0, whole)
    if place.packed is not None:
        change = float((whole - dense).square().sum())
        loss = place.packed.write(rewriter, whole)
        if place.is_masked:
            values = replace(place.packed, rows=None).dense(program)
            follow(program, [name], name, values)
        return new_bias, Rounded(loss, (loss.error / change) ** 0.5 if change > 0 else float("inf")), lost
    new = whole.to(stored.dtype)
    if place.rows is not None:
        new, part = (stored.t() if target.transposed else stored).clone(), new
        new[place.span] = part
    rewriter.rebind(place.stored, (new.t() if target.transposed else new).contiguous())
    if place.is_masked:
        follow(program, [name], name, program.tensor(place.stored))
    return new_bias, None, lost


def _write_bias(rewriter: Rewriter, place: Place, old: torch.Tensor | None, new: torch.Tensor | None) -> fx.Node | None:
    """Give the bias its merged values, and the layer one where it had none; returns its node."""
    program, target = rewriter.program, place.site
    if new is None or (old is not None and torch.equal(new, old)):
        return target.bias
    if target.bias is not None:
        values = program.tensor(target.bias).detach().clone()
        values[place.span] = new.to(values.dtype)
        rewriter.rebind(target.bias, values)
        return target.bias
    if "bias" not in arguments_of(target.node):
        raise InputError(
            f"%{target.node.name} is a product that takes no bias, and the adapter has one",
            where=target.path,
            hint="run Cleanup first, which makes it a linear",
        )
    made = torch.zeros(target.node.meta[VAL].shape[-1] if place.rows is not None else len(new), dtype=target.dtype)
    made[place.span] = new.to(made.dtype)
    stored = program.tensor(place.stored)
    if isinstance(stored, nn.Parameter):
        made = nn.Parameter(made, stored.requires_grad)
    return rewriter.weight(f"{target.path}.bias".lstrip("."), made, like=target.node)


def called_anew(rewriter: Rewriter, place: Place, x: fx.Node, bias: fx.Node | None) -> fx.Node:
    """The layer as a node of its own, because the bare one's value, by whose name it is known, is another.

    Where several linears are stacked, the other parts read the new one as well.

    Args:
        rewriter: of the program.
        place: the layer.
        x: its input.
        bias: its bias.

    Returns:
        the node that gives what the merged layer does.
    """
    old = place.site.node
    given = {**arguments_of(old), place.site.input_name: x}
    if bias is not place.site.bias:
        given["bias"] = bias
    new = rewriter.call(old.target, like=old, name=old.name, **given)
    if place.part is None:
        return new
    old_split = place.part.args[0]
    assert isinstance(old_split, fx.Node)
    split = rewriter.call(old_split.target, new, *old_split.args[1:], like=old_split)
    merged: fx.Node | None = None
    for old_part in list(old_split.users):
        part = rewriter.call(old_part.target, split, *old_part.args[1:], like=old_part)
        if old_part is place.part:
            merged = part
        else:
            rewriter.replace(old_part, part)
    assert merged is not None
    return merged
