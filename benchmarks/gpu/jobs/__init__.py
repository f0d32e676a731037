"""What the parts of the benchmark do: every case of a plan verified and timed, each result a row as soon as it is known."""
