"""The pass that rotates hidden states, so that no feature stands out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Exact
from graphwright.passes.quantization.equivalence.folding import renew
from graphwright.passes.quantization.equivalence.hadamard import hadamard, random_orthogonal, random_rotation
from graphwright.passes.quantization.equivalence.heads import rotate_heads, value_heads
from graphwright.passes.quantization.equivalence.residual import HiddenStates, hidden_states
from graphwright.passes.quantization.targets import LinearTarget, linear_target

# Rows of a weight that are widened to float64 at once.
_ROWS = 4096

_KINDS = ("hadamard", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class RotateHiddenStates(Pass):
    """Multiply hidden states with an orthogonal matrix ``Q``, folded into weights (Ashkboos et al. 2024, QuaRot).

    Outliers of single features are spread over all of them, which makes weights and activations easier to round.

    ::

        %h = aten.embedding(%e, %ids)                        %h' = aten.embedding(%e Q, %ids)
        %n = graphwright.rms_norm(%h, %g, 1e-05)       ->    %n' = graphwright.rms_norm(%h', ones, 1e-05)
        %u = aten.linear(%n, %wu)                            %u  = aten.linear(%n', (%wu * g) Q)
        %d = aten.linear(%a, %wd)                            %d' = aten.linear(%a, Qᵀ %wd)
        %r = aten.add.Tensor(%h, %d)                         %r' = aten.add.Tensor(%h', %d')

    Layer norms become RMS norms: their means are subtracted in the weights that make the hidden states, their biases
    added in those that read them. With ``heads``, what attention gathers is rotated within each head as well, between
    the value projection and the output projection.

    It does not fire on hidden states that something other than norms, sums and linears meets: that leave the model,
    come in as an input (``inputs_embeds``), or are what a norm gives (BERT, whose norms stand behind the sums); on
    norms that are not one operator (run ``FuseAll`` first); where a weight is shared, computed, or protected by a tag;
    and, with ``untie=False``, on a head whose weight is the embedding's.

    Attributes:
        seed: of the signs or the matrix.
        kind: ``"hadamard"``: with random signs, for widths that have such a matrix; ``"orthogonal"``: any.
        heads: rotate within attention heads too.
        untie: give the head a weight of its own where it shares the embedding's: what norms scale goes into the head
            alone. The report says how many bytes that costs (``untied_bytes``).
    """

    name: ClassVar[str] = "rotate-hidden-states"
    contract: ClassVar[Contract] = Exact(tolerance=1e-6, stored=True)
    before: ClassVar[tuple[str, ...]] = (
        "smooth-activations",
        "scale-salient-channels",
        "train-equivalent-scales",
        "quantize-linears",
        "quantize-embeddings",
    )
    after: ClassVar[tuple[str, ...]] = ("fuse-layer-norm", "fuse-rms-norm")
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "masked", "quantized"})

    seed: int = 0
    kind: str = "hadamard"
    heads: bool = True
    untie: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or self.seed < 0:
            raise InputError(f"must be 0 or more, not {self.seed!r}", where=f"{self.name}: seed")
        if self.kind not in _KINDS:
            raise InputError(
                f"must be one of {', '.join(map(repr, _KINDS))}, not {self.kind!r}", where=f"{self.name}: kind"
            )

    def run(self, program: Program) -> bool:
        """Rotate all hidden states that can be.

        Raises:
            InputError: there is no Hadamard matrix for their width.
        """
        chosen = self.selected(program)
        regions: list[HiddenStates] = []
        refusals: list[Refusal] = []
        for node in program.nodes:
            if op_name(node) != "aten.embedding" or any(node in region.embeddings for region in regions):
                continue
            found = hidden_states(program, node, self.respects, chosen)
            reason = found if isinstance(found, str) else self._tied(program, found)
            if reason is not None:
                refusals.append(Refusal(self.name, node.name, path_of(node), reason, 2))
            elif isinstance(found, HiddenStates):
                regions.append(found)
        heads = value_heads(program, chosen, self.respects) if self.heads else []
        with program.edit() as rewriter:
            for each in heads:
                turn = hadamard(each.width)
                if turn is not None:
                    rotate_heads(rewriter, each, turn)
            untied = 0
            for region in regions:
                untied += _untie(rewriter, region)
                _rotate(rewriter, region, self._matrix(region.width))
            program.notes["hidden_states"] = len(regions)
            program.notes["attention_heads"] = len(heads)
            program.notes["untied_bytes"] = untied
            program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
            return rewriter.changed

    def _matrix(self, width: int) -> torch.Tensor:
        return random_rotation(width, self.seed) if self.kind == "hadamard" else random_orthogonal(width, self.seed)

    def _tied(self, program: Program, region: HiddenStates) -> str | None:
        """Why the tables cannot be rotated: what else reads them."""
        readers = {target.node for target, _ in region.readers}
        for node in region.embeddings:
            table = str(arguments_of(node)["weight"].target)
            for other in (each for each in program.nodes if each.op == "get_attr" and each.target == table):
                for user in other.users:
                    if user not in region.embeddings and user not in readers:
                        return f"the table {table!r} is also read by %{user.name}"
                    if user in readers and not self.untie:
                        return f"the table {table!r} is tied to %{user.name} (set untie=True to give that its own)"
        return None


def _untie(rewriter: Rewriter, region: HiddenStates) -> int:
    """Give readers that share a table a weight of their own; how many bytes that adds."""
    program, added = rewriter.program, 0
    tables = {str(arguments_of(node)["weight"].target) for node in region.embeddings}
    for place, (target, norm) in enumerate(region.readers):
        if str(target.weight.target) not in tables:
            continue
        old, name = program.tensor(target.weight), f"{path_of(target.node)}.weight"
        if program.aliases.get(name) == target.weight.target:
            del program.aliases[name]
        own = rewriter.weight(name, torch.nn.Parameter(old.detach().clone(), old.requires_grad), like=target.node)
        exchanged = fx.node.map_arg((target.node.args, target.node.kwargs), _exchange(target.weight, own))
        rewriter.set_arguments(target.node, *exchanged[0], **exchanged[1])
        now = linear_target(program, target.node)
        assert isinstance(now, LinearTarget)
        region.readers[place] = (now, norm)
        added += old.nbytes
    return added


def _rotate(rewriter: Rewriter, region: HiddenStates, turn: torch.Tensor) -> None:
    program = rewriter.program
    made = turn - turn.mean(0, keepdim=True) if region.centred else turn  # (1 - 11ᵀ/d) Q
    for table in {arguments_of(node)["weight"]: None for node in region.embeddings}:
        _change(rewriter, table, lambda rows: rows @ made)
    for target, norm in region.readers:
        gain, shift = _affine(program, norm)
        if shift is not None:
            target = _with_bias(rewriter, target, shift)
        if target.transposed:
            whole = program.tensor(target.weight).detach()
            held = whole.double() * gain.unsqueeze(1) if gain is not None else whole.double()
            rewriter.rebind(target.weight, (turn.T @ held).to(whole.dtype))
        else:
            _change(rewriter, target.weight, _scaled_and_turned(gain, turn))
    for target in region.writers:
        if target.transposed:
            _change(rewriter, target.weight, lambda rows: rows @ made)
        else:
            whole = program.tensor(target.weight).detach()
            rewriter.rebind(target.weight, (made.T @ whole.double()).to(whole.dtype))
        if target.bias is not None:
            bias = program.tensor(target.bias).detach()
            rewriter.rebind(target.bias, (bias.double() @ made).to(bias.dtype))
    for norm in region.norms:
        weight = arguments_of(norm)["weight"]
        if weight is not None:
            rewriter.rebind(weight, torch.ones_like(program.tensor(weight)))
    _renew(rewriter, region)


def _exchange(old: fx.Node, new: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda node: new if node is old else node


def _scaled_and_turned(gain: torch.Tensor | None, turn: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda rows: (rows if gain is None else rows * gain) @ turn


def _renew(rewriter: Rewriter, region: HiddenStates) -> None:
    for node in region.changed:
        if op_name(node) != "aten.layer_norm":
            renew(rewriter, [node])
            continue
        given = arguments_of(node)
        weight = given["weight"]
        new = rewriter.call(
            "graphwright.rms_norm", given["input"], weight, given["eps"], like=node, name=f"{node.name}_rotated"
        )
        rewriter.replace(node, new, equivalent=False)


def _affine(program: Program, norm: fx.Node | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A norm's weight and bias, float64."""
    given = arguments_of(norm) if norm is not None else {}
    held = (given.get("weight"), given.get("bias"))
    weight, bias = (program.tensor(each).detach().double() if each is not None else None for each in held)
    return weight, bias


def _with_bias(rewriter: Rewriter, target: LinearTarget, shift: torch.Tensor) -> LinearTarget:
    """A linear with what a norm's bias gives behind its weight added to its own bias."""
    program = rewriter.program
    weight = program.tensor(target.weight).detach()
    added = shift @ weight.double() if target.transposed else weight.double() @ shift
    if target.bias is not None:
        old = program.tensor(target.bias).detach()
        rewriter.rebind(target.bias, (old.double() + added).to(old.dtype))
        return target
    name = str(target.weight.target).removesuffix("weight") + "bias"
    bias = rewriter.weight(name, added.to(weight.dtype), like=target.node)
    rewriter.set_arguments(target.node, target.x, target.weight, bias)
    found = linear_target(program, target.node)
    assert isinstance(found, LinearTarget)
    return found


def _change(rewriter: Rewriter, weight: fx.Node, rule: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Compute a weight anew, some rows at a time in float64."""
    old = rewriter.program.tensor(weight).detach()
    new = torch.empty_like(old, memory_format=torch.contiguous_format)
    for start in range(0, len(old), _ROWS):
        new[start : start + _ROWS] = rule(old[start : start + _ROWS].double()).to(old.dtype)
    rewriter.rebind(weight, new)
