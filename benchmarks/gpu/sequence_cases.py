"""Inputs of sequence size under the name that tests/gpu has for them; they live in benchmarks/cases/sequences.py."""

from benchmarks.cases.sequences import make_sequences

__all__ = ["make_sequences"]
