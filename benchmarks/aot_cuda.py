"""What nvcc made of the CUDA kernels, and whether that still is what the committed table says. No GPU is needed.

    python -m benchmarks.aot_cuda            # read, print, compare with benchmarks/results/aot_cuda.json
    python -m benchmarks.aot_cuda --check    # the same, and exit 1 where the comparison fails
    python -m benchmarks.aot_cuda --write    # replace the table

The kernels are those of the installed extension, which holds machine code for sm_80, sm_90a and sm_100: what is checked is
what runs. The check fails on a spill or a stack frame, on aligned row kernels without 16-byte accesses (whichever way
they read: into registers, by cp.async or by the bulk copy engine), and, with the nvcc version that wrote the
table, on registers more than 10% above it. Nothing here runs on a GPU or says anything of speed.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.aot.cuda_table import COLUMNS, TABLE, complaints, measure, nvcc_version
from benchmarks.aot.table import as_text, held_against, options_of
from vcpo_kernels.core import registry


def main() -> int:
    options = options_of("benchmarks.aot_cuda", __doc__)
    problem = registry.native_problem()
    if problem is not None:
        sys.exit(f"benchmarks.aot_cuda: {problem}")
    from vcpo_kernels import _native

    if not _native.cuda:
        print("the extension was built without the CUDA kernels, since there was no nvcc: nothing to check")
        return 1 if options.check and shutil.which("nvcc") else 0
    fresh = {"nvcc": nvcc_version(), "kernels": measure(Path(_native.__file__))}
    print(as_text(fresh, "nvcc", COLUMNS, width=55))
    return held_against(TABLE, fresh, "nvcc", complaints, options)


if __name__ == "__main__":
    sys.exit(main())
