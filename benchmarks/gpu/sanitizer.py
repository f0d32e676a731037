"""compute-sanitizer's tools over every row kernel at tiny shapes; with --kernels, the kernels themselves."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.cases.shapes import Shape
from benchmarks.gpu.plan import PLANS, Plan

ERROR_STATUS = 9
# Odd and even widths, several blocks, and a row that spans a cluster. Racecheck follows every shared-memory access.
SHAPES = (
    Shape(3, 33, "bfloat16"),
    Shape(2, 4100, "float32"),
    Shape(2, 70001, "bfloat16"),
    Shape(2, 151936, "bfloat16"),
)


def run_kernels(plan: Plan) -> None:
    """Every backend's forward, states, backward and score_rows on every shape, and the sequence kernels."""
    import torch

    import vcpo_kernels as vk
    from benchmarks.cases import rows, sequences
    from benchmarks.gpu.jobs.workbench import objections

    device = torch.device(plan.device)
    for shape in SHAPES:
        x = rows.make_inputs_in_parts(shape, device)
        for backend in plan.backends:
            if objections(plan, backend, "token_stats", x.logits.dtype):
                continue
            for case in rows.CASES:
                copy = type(x)(x.logits.clone(), x.token_ids, x.g)
                with vk.use_backend(backend):
                    case.run(copy)
            with vk.use_backend(backend):  # as a shard: of ids from the second entry on
                torch.ops.vcpo_kernels.token_states(x.logits, x.token_ids, None, 1.0, None, False, 1, shape.vocabulary)
    sequences.make_sequences(plan.small, device).coefficients()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("kernels done")


def main() -> None:
    """Run the plan's tools side by side and fail where one finds something."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plan", choices=PLANS, default="gpu")
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args()
    plan = PLANS[options.plan]
    if options.kernels:
        run_kernels(plan)
        return
    kernels = [sys.executable, "-m", "benchmarks.gpu.sanitizer", "--kernels", "--plan", plan.name]
    tools = {
        t: ["compute-sanitizer", "--tool", t, "--error-exitcode", str(ERROR_STATUS), *kernels] for t in plan.sanitizers
    }
    # Without its cache, the allocator gives every tensor a block of its own, past whose end memcheck can see.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {
        tool: subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for tool, command in (tools or {"no tool": kernels}).items()
    }
    failed = 0
    for tool, process in running.items():
        text = process.communicate()[0]
        print(f"=== {tool}: exit status {process.returncode}\n{text}", flush=True)
        failed += process.returncode != 0
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
