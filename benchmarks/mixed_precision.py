"""Mixed precision at 3.5 bits a weight: a small Llama's perplexity, beside uniform formats and a blind allocation.

Formats of 2, 3 and 4 bits are given to the linears by an integer programme, once with the sensitivities that were
measured and once with those that sizes alone would tell, within 3.5 bits a weight, scales included. Uniform INT3 and
INT4 in groups of 128 take 3.125 and 4.125; between their perplexities one is interpolated at 3.5. All are rounded to
the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import _rows
from _text import calibration_windows, evaluation_windows, inputs, llama_folder, perplexity

import graphwright as gw
from graphwright.passes.quantization.rounding import rounding_of
from graphwright.passes.quantization.sensitivity.candidates import format_of, rounded

BUDGET = 3.5
CANDIDATES: list[dict[str, Any]] = [
    {"bits": 2, "group_size": 64},
    {"bits": 3, "group_size": 128},
    {"bits": 4, "group_size": 128},
    {"bits": 4, "group_size": 64},
]
INT3, INT4 = 1, 2


def main() -> int:
    """Run the comparison; the exit code is 1 when a target is missed."""
    parser = _rows.parser(__doc__)
    parser.add_argument("--windows", type=int, default=1, metavar="N", help="judge on every N-th window of the text")
    options = parser.parse_args()
    step, count = (47, 8) if options.quick else (options.windows, 32)
    rows = _rows.Rows()
    folder = llama_folder()
    windows = evaluation_windows(folder)[::step]
    calibration = [inputs(window) for window in calibration_windows(folder, count)]
    program = gw.load_huggingface(folder, dtype="float32")

    def judged(case: str, overrides: Mapping[str, Any], bits: float) -> float:
        found: float = perplexity(with_rounded(program, overrides), windows)
        rows.add(case, "graphwright", perplexity=found, bits=bits, windows=len(windows))
        return found

    tables = {
        measure: gw.sensitivities(program, calibration, candidates=CANDIDATES, measure=measure)
        for measure in ("fisher", "first_order")
    }
    linears = tables["fisher"].linears
    rows.add("fp32", "graphwright", perplexity=perplexity(program, windows), bits=32.0, windows=len(windows))
    uniform: dict[int, tuple[float, float]] = {}
    for index in (INT3, INT4):
        bits = 8 * sum(row.stored[index] for row in linears) / tables["fisher"].parameters
        same = {row.weight: CANDIDATES[index] for row in linears}
        uniform[index] = bits, judged(f"INT{CANDIDATES[index]['bits']} g128", same, bits)
    blind = gw.allocate(tables["fisher"].uniform(), budget_bits=BUDGET)
    beaten = {"uniform sensitivities": judged("allocated by size alone", blind.overrides, blind.bits)}
    (low_bits, low), (high_bits, high) = uniform[INT3], uniform[INT4]
    share = (BUDGET - low_bits) / (high_bits - low_bits)
    beaten["uniform formats, interpolated geometrically"] = math.exp(
        (1 - share) * math.log(low) + share * math.log(high)
    )
    beaten["uniform formats, interpolated linearly"] = (1 - share) * low + share * high
    for name in list(beaten)[1:]:
        rows.add(name, "graphwright", perplexity=beaten[name], bits=BUDGET)
    for measure, table in tables.items():
        found = gw.allocate(table, budget_bits=BUDGET)
        mixed = judged(f"allocated by {measure}", found.overrides, found.bits)
        for name, other_perplexity in beaten.items():
            rows.require(
                mixed < other_perplexity, f"{measure}: {mixed:.1f} is not below {other_perplexity:.1f}, {name}"
            )
    return int(rows.finish(options.json))


def with_rounded(program: gw.Program, overrides: Mapping[str, Any]) -> gw.Program:
    """The program with what the formats' codes stand for in place of its weights."""
    made = program.clone()
    nearest = rounding_of("nearest", where="benchmark")
    for name, options in overrides.items():
        form = format_of(options)
        assert form is not None
        made.set_tensor(name, rounded(made.tensors()[name], form, nearest, None)[0])
    return made


if __name__ == "__main__":
    raise SystemExit(main())
