"""A low-rank branch beside a quantised linear, for a part of what rounding its weight lost.

``y = x Ŵᵀ`` becomes ``x Ŵᵀ + (x Aᵀ) Bᵀ`` with ``B A ≈ W - Ŵ`` of rank ``r``. The closest such product is the truncated
singular value decomposition: of the residual itself (Yao et al. 2023, ZeroQuant-V2, "LoRC"), or in the metric of the
inputs, where ``|X (W - Ŵ - B A)ᵀ|`` is least. There, with ``H = Σ x xᵀ = L Lᵀ``, and ``U`` the first left singular
vectors of ``(W - Ŵ) L``, it is ``B = U`` and ``A = Uᵀ (W - Ŵ)``. Neither ``L`` nor its inverse is needed: ``U`` are the
first eigenvectors of ``(W - Ŵ) H (W - Ŵ)ᵀ``.

LoftQ (Li et al. 2023, algorithm 1) rounds ``W - B A`` and decomposes what is left, in turns, so that a quantised base
and its LoRA factors start training close to the original.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from graphwright.ir.errors import InputError
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.loss import Loss
from graphwright.passes.quantization.weights import quantize_weight

_FACTORS = ("int8", "float")
# Beyond the rank, and times that the subspace is multiplied: the spectrum of rounding errors falls slowly.
_OVERSAMPLED = 16
_ITERATIONS = 8


@dataclass(frozen=True)
class Branch:
    """The factors of one weight.

    Attributes:
        a: ``[rank, in]``, in the linear's dtype.
        b: ``[out, rank]``.
        tag: of the nodes.
        int8: stored in 8 bits, a scale for each row.
        trained: the factors are to be trained; they become parameters.
    """

    a: torch.Tensor
    b: torch.Tensor
    tag: str
    int8: bool
    trained: bool = False

    def __post_init__(self) -> None:
        for name in ("a", "b") if self.trained else ():
            object.__setattr__(self, name, nn.Parameter(getattr(self, name).detach()))

    def dense(self) -> torch.Tensor:
        """``B A``, ``[out, in]`` float32, of the factors as they are stored."""
        b, a = (self._stored(factor) for factor in (self.b, self.a))
        return b @ a

    def _stored(self, factor: torch.Tensor) -> torch.Tensor:
        wide = factor.detach().to(torch.float32)
        return quantize_weight(wide, _eight_bits()).dense() if self.int8 else wide

    def add(self, rewriter: Rewriter, base: str, x: fx.Node, y: fx.Node, *, like: fx.Node) -> fx.Node:
        """Put the branch beside a linear; gives the node of the sum.

        Args:
            rewriter: of the program.
            base: what the names of the factors begin with.
            x: the linear's input.
            y: its output.
            like: the node that the new ones take path and source from.
        """
        names = ("lora_A.loftq", "lora_B.loftq") if self.tag == "adapter" else ("low_rank_a", "low_rank_b")
        tags = (self.tag,)
        for name, factor in zip(names, (self.a, self.b), strict=True):
            if not self.int8:
                weight = rewriter.weight(f"{base}{name}", factor, like=like, tags=tags)
                x = rewriter.call("aten.linear", x, weight, None, like=like, tags=tags)
                continue
            packed = self._packed(rewriter, f"{base}{name}", factor)
            codes, scales = (
                rewriter.weight(f"{base}{name}_{part}", tensor, like=like, tags=tags)
                for part, tensor in zip(("qweight", "scales"), packed[:2], strict=True)
            )
            rest = (None, None, 8, packed[2])
            x = rewriter.call("graphwright.linear_nbits", x, codes, scales, *rest, like=like, tags=tags)
        return rewriter.call("aten.add.Tensor", y, x, like=like, tags=tags)

    @staticmethod
    def _packed(rewriter: Rewriter, name: str, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Codes, scales and group size; those that the program has already, where linears share the weight."""
        packed = quantize_weight(factor.detach(), _eight_bits(), name=name)
        present = rewriter.program.tensors()
        codes, scales = present.get(f"{name}_qweight"), present.get(f"{name}_scales")
        if codes is not None and scales is not None and torch.equal(codes, packed.qweight):
            return codes, scales, packed.group_size
        return packed.qweight, packed.scales, packed.group_size


def _eight_bits() -> Format:
    return Format(8, None, True, True)


@dataclass(frozen=True)
class Compensation(ABC):
    """What is put beside quantised linears; its fields are its options.

    Attributes:
        rank: of the branch; a weight with fewer rows or columns gets that many.
    """

    method: ClassVar[str]
    tag: ClassVar[str]
    rank: int = 8

    def __post_init__(self) -> None:
        _whole(self.method, "rank", self.rank)

    def as_option(self) -> dict[str, Any]:
        """As it stands in recipes and reports: ``method`` and all options."""
        return {"method": self.method, **asdict(self)}

    @property
    def turns(self) -> int:
        """How often a weight is rounded."""
        return 1

    def needs_inputs(self) -> bool:
        """Whether the inputs' second moment is asked for where there is calibration data."""
        return False

    def branch(
        self, weight: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor | None, dtype: torch.dtype
    ) -> Branch:
        """The branch for a weight ``[out, in]`` and what its codes stand for."""
        residual = weight.detach().to(torch.float32) - rounded
        b, a = low_rank(residual, self.rank, moment if self.needs_inputs() else None)
        return self._stored(b, a, dtype)

    def _stored(self, b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> Branch:
        return Branch(a.to(dtype), b.to(dtype), self.tag, False)


@dataclass(frozen=True)
class LowRank(Compensation):
    """Low-rank compensation (Yao et al. 2023), the truncated singular value decomposition of ``W - Ŵ``.

    Attributes:
        rank: of the branch.
        weighted: in the metric of the inputs, where there is calibration data. It keeps more of the output than the
            published form, which looks at the weight alone.
        factors: ``"int8"``, with a scale for each row, or ``"float"``: the linear's own dtype.
    """

    method: ClassVar[str] = "low-rank"
    tag: ClassVar[str] = "compensation"
    weighted: bool = True
    factors: str = "int8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factors not in _FACTORS:
            raise InputError(f"must be one of {_FACTORS}, not {self.factors!r}", where="low-rank: factors")

    def needs_inputs(self) -> bool:
        """If ``weighted``."""
        return self.weighted

    def _stored(self, b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> Branch:
        return Branch(a.to(dtype), b.to(dtype), self.tag, self.factors == "int8")


@dataclass(frozen=True)
class LoftQ(Compensation):
    """LoftQ (Li et al. 2023): a quantised base with LoRA factors that begin where it lost something.

    The factors are parameters, in the linear's dtype. They are a LoRA adapter of the program, named ``loftq``: trained,
    saved, merged and taken out like any other.

    Attributes:
        rank: of the factors.
        steps: how often the weight less the factors is rounded, and what is left decomposed.
    """

    method: ClassVar[str] = "loftq"
    tag: ClassVar[str] = "adapter"
    steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        _whole(self.method, "steps", self.steps)

    @property
    def turns(self) -> int:
        """``steps``."""
        return self.steps

    def _stored(self, b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> Branch:
        # Both of one size, as factors that are trained should be.
        size = a.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        a, b = a / size.unsqueeze(-1), b * size
        return Branch(a.to(dtype), b.to(dtype), self.tag, False, trained=True)


def low_rank(residual: torch.Tensor, rank: int, moment: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of rank ``rank`` that is closest to a residual.

    By subspace iteration with a projection at its end (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.3), so that
    large weights need no full decomposition; the start is fixed, so is the result.

    Args:
        residual: ``[out, in]`` float32.
        rank: at least 1; no more than the smaller side is used.
        moment: ``[in, in]``, the metric; ``None`` for all columns alike.

    Returns:
        ``[out, rank]`` with orthonormal columns, and ``[rank, in]``; float32.
    """
    rank = min(rank, *residual.shape)
    width = min(rank + _OVERSAMPLED, len(residual))
    wide = moment.to(torch.float32) if moment is not None else None

    def applied(vectors: torch.Tensor) -> torch.Tensor:
        across = residual.t() @ vectors
        return residual @ (wide @ across if wide is not None else across)

    start = torch.randn(len(residual), width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start)[0]
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(applied(basis))[0]
    small = basis.t() @ applied(basis)
    _, vectors = torch.linalg.eigh(((small + small.t()) / 2).to(torch.float64))
    left = basis @ vectors[:, -rank:].flip(1).to(torch.float32)
    return left, left.t() @ residual


def loss_with(weight: torch.Tensor, sum_: torch.Tensor, moment: torch.Tensor | None) -> Loss:
    """What is lost with the branch: of the outputs where the moment is given, of the weight elsewhere."""
    exact = weight.detach().to(torch.float32)
    if moment is not None:
        return Loss.of_outputs(sum_, exact, moment)
    loss = Loss()
    loss.add(sum_, exact)
    return loss


def _whole(method: str, option: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"must be an integer, 1 or more, not {value!r}", where=f"{method}: {option}")
