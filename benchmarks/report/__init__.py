"""What turns result files into the tables and pictures of the README, the docs and a run's own report. Measures nothing."""
