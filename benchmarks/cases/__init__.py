"""What is measured: the cases (ours and the peers'), their inputs, and the float64 results that they are held against."""
