"""Compile every Triton kernel ahead of time, without a GPU, and hold the result against a committed table.

    python -m benchmarks.aot            # compile, print, compare with benchmarks/results/aot_triton.json
    python -m benchmarks.aot --check    # the same, and exit 1 where the comparison fails
    python -m benchmarks.aot --write    # compile and replace the table

Each kernel is compiled for sm_80, sm_90 and sm_100 at its table's launch parameters
(`backends/triton/launch.py`), with the types and alignments that a launch on real tensors has. From the
machine code come registers per thread, spills, static shared memory, and the widest access to global memory.
The check fails on a spill, on row kernels without 128-bit loads and stores, and, with the triton version that
wrote the table, on registers more than 10% above it. Nothing here runs on a GPU or says anything of speed.
"""

from __future__ import annotations

import os
import sys

if os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""):
    sys.exit("benchmarks.aot compiles, so it cannot run under TRITON_INTERPRET: unset it for this command.")

from benchmarks.aot.table import as_text, held_against, options_of
from benchmarks.aot.triton_table import COLUMNS, TABLE, complaints, measure


def main() -> int:
    options = options_of("benchmarks.aot", __doc__)
    fresh = measure()
    print(as_text(fresh, "triton", COLUMNS, width=52))
    return held_against(TABLE, fresh, "triton", complaints, options)


if __name__ == "__main__":
    sys.exit(main())
