"""`make test-docs` ends by saying what it ran and what it left out, and why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docs import pages

_RAN = pytest.StashKey[int]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" and report.passed and item.name.startswith("test_command["):
        item.config.stash[_RAN] = item.config.stash.get(_RAN, 0) + 1
    return report


def pytest_unconfigure(config: pytest.Config) -> None:
    if _RAN in config.stash:
        print(pages.summary(config.stash[_RAN]))
