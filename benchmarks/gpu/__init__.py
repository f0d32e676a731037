"""`make gpu`: build, tests, compute-sanitizer and benchmark on a machine with a GPU, in one command and nine minutes.

    python -m benchmarks.gpu --out FOLDER [--dry-run]

`plan.py` says what runs and for how long, `phases.py` runs it, `bench.py` measures by the `jobs`, `targets.py` holds the
figures that must be reached. benchmarks/report writes what came of it. docs/gpu.md is the manual.
"""
