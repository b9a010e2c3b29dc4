"""GPTQ of a Llama of 1.1 billion parameters with 128 windows of 512 tokens: wall time. Target: 40 minutes on two cores.

To INT4 in groups of 128; ``_calibrated_1b.py`` says what the model is and what ``--quick`` measures.
"""

from __future__ import annotations

from _calibrated_1b import parser, run

import graphwright as gw

MINUTES = 40.0


def main() -> int:
    """Run the benchmark; the exit code is 1 when the target is missed."""
    return int(
        run(
            "GPTQ INT4 g128",
            lambda data: gw.QuantizeLinears(bits=4, group_size=128, calibration=data),
            MINUTES,
            parser(__doc__).parse_args(),
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
