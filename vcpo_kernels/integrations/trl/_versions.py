"""Which TRL this integration was tested with. It overrides private methods, so another version is refused, by name."""

from __future__ import annotations

import importlib.metadata

TESTED_FROM, TESTED_BELOW = (1, 16), (1, 17)


def check_trl() -> None:
    """Raise ImportError unless the installed TRL is of the tested range."""
    wanted = f"trl>={_text(TESTED_FROM)},<{_text(TESTED_BELOW)}"
    fix = f"Install a tested one: pip install '{wanted}'."
    try:
        installed = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"vcpo_kernels.integrations.trl needs TRL, which is not installed. {fix}") from None
    if not TESTED_FROM <= _release(installed) < TESTED_BELOW:
        raise ImportError(
            f"vcpo_kernels.integrations.trl is tested with {wanted}, and trl {installed} is installed. It overrides "
            f"private methods of its trainers, which change between versions. {fix}"
        )


def _release(version: str) -> tuple[int, ...]:
    """(major, minor) of a version such as 1.16.0rc1."""
    parts = version.split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
