"""Benchmarks: the modules here are commands (`python -m benchmarks.run` and so on), which parse options and call the rooms.

    cases        what is measured: the one Case type, ours and the peers', inputs, float64
    harness      clock, memory, agreement with float64, result files, machine
    comparisons  the loops behind `make bench`
    gpu          `make gpu`: plan, phases, jobs, targets
    aot          machine code of every kernel, without a GPU
    report       tables and pictures of result files

tests/benchmarks/test_rooms.py says which room may import which.
"""
