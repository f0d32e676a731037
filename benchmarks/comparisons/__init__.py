"""What `make bench` does with the cases: verify, weigh and time them in one run. A module for each of the three commands."""
