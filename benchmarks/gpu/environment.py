"""environment.json: which machine this is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.harness import machine


def main() -> None:
    """Write environment.json to --out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", default="gpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"plan": options.plan, **machine.description()}
    (options.out / "environment.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
