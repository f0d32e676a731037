"""No command or snippet of the pages is forgotten: each is run by a test, or left out by name."""

from __future__ import annotations

import pytest

from tests.docs import pages
from tests.docs.pages import LEFT_OUT, PAGES, RUN_BY, SETTINGS_CHECKED, STARTS


def test_commands_are_commands() -> None:
    """A block without a language is a shell's, or a trainer's settings."""
    assert [c for c in pages.every_command() if not STARTS.match(c.text)] == []


def test_every_left_out_command_is_still_there() -> None:
    texts = [c.text for c in pages.every_command()]
    assert [start for start in LEFT_OUT if not any(t.startswith(start) for t in texts)] == []


def test_first_come_the_commands_that_install() -> None:
    ran = [c.text for c in pages.every_command() if c.left_out is None]
    assert ran[0].startswith("git clone <this repository> && cd vcpo_kernels")
    assert ran[1].startswith("pip install -e .")
    assert ran[2].startswith("python -m vcpo_kernels.env")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_its_test(page: str) -> None:
    languages = {block.language for block in pages.blocks(page)}
    assert languages <= {"", "python", "toml", "yaml", "mermaid"}
    assert ("python" in languages) == (page in RUN_BY)
    settings = languages & {"toml", "yaml"} or any(
        not b.language and all(pages.SETTINGS.match(line) for line in b.text.splitlines()) for b in pages.blocks(page)
    )
    assert bool(settings) == (page in SETTINGS_CHECKED)
    if page in RUN_BY:
        source = (pages.ROOT / RUN_BY[page]).read_text()
        assert page.split("/")[-1] in source


def test_the_summary_is_one_line_with_every_reason() -> None:
    text = pages.summary(7)
    assert text.startswith("docs: 7 commands ran as printed")
    assert "\n" not in text
    assert "`python -m examples.async_lab paper` (takes minutes)" in text
