"""How it is measured: clock, memory, agreement with float64, result files, and what machine it was. Knows no case."""
