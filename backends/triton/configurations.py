"""Sizes of blocks, warps and stages: a small table for each kernel and architecture, and which of them is taken.

The first of each list is taken unless tuning (:mod:`graphwright.backends.triton.tuning`) has found another one for the
device and the class of shapes. Nothing is ever tuned as a model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        blocks: constants of the kernel by name.
        warps: to a program.
        stages: of loads in flight.
    """

    blocks: Mapping[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2

    def __str__(self) -> str:
        """``BN=64 BM=16, 4 warps, 3 stages``."""
        blocks = " ".join(f"{name}={value}" for name, value in self.blocks.items())
        return f"{blocks}, {self.warps} warps, {self.stages} stages".lstrip(", ")

    def with_blocks(self, **blocks: int) -> Config:
        """With further constants, or others."""
        return Config({**self.blocks, **blocks}, self.warps, self.stages)


def _linear(*rows: tuple[int, int, int, int]) -> tuple[Config, ...]:
    return tuple(Config({"BN": bn, "BM": bm}, warps, stages) for bn, bm, warps, stages in rows)


# kernel and class of shapes -> (oldest architecture they are for -> configurations, best guess first). An architecture
# takes those of the newest entry that is not newer than itself.
TABLE: dict[str, dict[int, tuple[Config, ...]]] = {
    # Few rows: bytes of weights in flight are what counts. Splits along the input fill the GPU (linear_nbits.py).
    "linear_nbits few": {
        80: _linear((64, 16, 4, 4), (32, 16, 4, 5), (128, 16, 4, 3)),
        90: _linear((64, 16, 4, 5), (32, 16, 4, 6), (128, 16, 4, 4), (64, 16, 8, 4)),
        942: _linear((64, 16, 4, 2)),
    },
    # Many rows: outputs are the rows of the tensor cores' left operand, which is unpacked in registers.
    "linear_nbits many": {
        80: _linear((64, 64, 4, 3), (128, 64, 4, 3), (128, 128, 8, 3)),
        90: _linear((128, 128, 8, 3), (128, 64, 4, 4)),
        942: _linear((64, 64, 4, 2)),
    },
    # With more to do before the result is stored.
    "linear_nbits many fused": {
        80: _linear((64, 64, 4, 3)),
        90: _linear((128, 64, 4, 4)),
        942: _linear((64, 64, 4, 2)),
    },
    "linear_nbits input gradient": {
        80: tuple(Config({"BN": 32, "BM": bm}, 4, 2) for bm in (64, 32)),
    },
    "linear_int8": {
        80: tuple(
            Config({"BM": bm, "BN": bn, "BK": 64}, warps, stages)
            for bm, bn, warps, stages in ((64, 128, 4, 3), (128, 128, 8, 3), (16, 64, 4, 4))
        ),
        90: tuple(
            Config({"BM": bm, "BN": bn, "BK": 128}, warps, stages)
            for bm, bn, warps, stages in ((128, 128, 8, 3), (64, 128, 4, 4), (16, 64, 4, 4))
        ),
    },
    # BK becomes the size of the groups.
    "linear_int8 groups": {80: (Config({"BM": 64, "BN": 64, "BK": 128}, 4, 3),)},
    "linear_fp8": {
        80: (Config({"BM": 64, "BN": 64, "BK": 64}, 4, 3),),
        90: (Config({"BM": 128, "BN": 128, "BK": 128}, 8, 3), Config({"BM": 64, "BN": 128, "BK": 128}, 4, 4)),
        942: (Config({"BM": 64, "BN": 64, "BK": 64}, 4, 1),),
    },
    "attention 64": {
        80: (Config({"BQ": 128, "BT": 64}, 8, 3), Config({"BQ": 64, "BT": 64}, 4, 3)),
        90: (Config({"BQ": 128, "BT": 128}, 8, 2), Config({"BQ": 128, "BT": 64}, 8, 3)),
        942: (Config({"BQ": 64, "BT": 64}, 4, 1),),
    },
    "attention 128": {
        80: (Config({"BQ": 64, "BT": 32}, 4, 2), Config({"BQ": 64, "BT": 64}, 4, 2)),
        90: (Config({"BQ": 128, "BT": 64}, 8, 2), Config({"BQ": 64, "BT": 64}, 4, 2)),
        942: (Config({"BQ": 64, "BT": 32}, 4, 1),),
    },
    "attention 256": {
        80: (Config({"BQ": 32, "BT": 32}, 4, 2),),
        90: (Config({"BQ": 64, "BT": 32}, 8, 2),),
        942: (Config({"BQ": 32, "BT": 32}, 4, 1),),
    },
    "attention float32": {80: (Config({"BQ": 16, "BT": 32}, 4, 2),)},
    "cached_attention": {
        80: (Config({"BT": 64}, 4, 3), Config({"BT": 32}, 4, 3), Config({"BT": 128}, 8, 2)),
        942: (Config({"BT": 32}, 4, 1),),
    },
    "cached_attention float32": {80: (Config({"BT": 32}, 4, 2),), 90: (Config({"BT": 16}, 4, 2),)},
    "kron_linear": {80: (Config({"B1": 32, "A1": 32, "A2": 32, "B2": 32}, 4, 2),)},
    "linear_blocks": {80: (Config({"BM": 32}, 4, 3), Config({"BM": 64}, 4, 3))},
}

# (kernel and class, architecture) -> what tuning found for this process's device.
_TUNED: dict[tuple[str, int], Config] = {}


def candidates(name: str, arch: int) -> tuple[Config, ...]:
    """The configurations of a kernel and class of shapes on an architecture, the default one first."""
    table = TABLE[name]
    return table[max(oldest for oldest in table if oldest <= max(arch, min(table)))]


def choose(name: str, arch: int) -> Config:
    """The configuration to launch with."""
    return _TUNED.get((name, arch)) or candidates(name, arch)[0]


def take_tuned(name: str, arch: int, config: Config | None) -> None:
    """Take a configuration from now on, or the default one again."""
    if config is None:
        _TUNED.pop((name, arch), None)
    else:
        _TUNED[name, arch] = config
