"""`python -m examples.async_lab`."""

from .cli import app

if __name__ == "__main__":  # spawned workers import this module under another name
    app(prog_name="python -m examples.async_lab")
