"""What every layer stands on: checks, the definition of ops, the registry of backends, dtypes. Imports nothing of ours."""
