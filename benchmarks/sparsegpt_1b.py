"""SparseGPT of a Llama of 1.1 billion parameters with 128 windows of 512 tokens. Target: 60 minutes on two cores.

To half zeros; ``_calibrated_1b.py`` says what the model is and what ``--quick`` measures.
"""

from __future__ import annotations

from _calibrated_1b import parser, run

import graphwright as gw

MINUTES = 60.0


def main() -> int:
    """Run the benchmark; the exit code is 1 when the target is missed."""
    options = parser(__doc__)
    options.add_argument("--pattern", default="unstructured", help="of the zeros (default: %(default)s)")
    given = options.parse_args()
    return int(
        run(
            f"SparseGPT {given.pattern} 50 %",
            lambda data: gw.PruneLinears(sparsity=0.5, pattern=given.pattern, method="sparsegpt", calibration=data),
            MINUTES,
            given,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
