"""What the pages print: commands and Python. Each is run by a test, or left out here, by name and with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
SETTINGS = re.compile(r"--?\w|[\w.]+=\S+$")  # a trainer's options, for which the reader's own launcher is wanted
STARTS = re.compile(r"([A-Z_]+=\S+ )*(git|pip|python3?|torchrun|accelerate|make|pytest)( |$)")

# How a command begins -> why `make test-docs` does not run it. What is not here is run.
MINUTES = "takes minutes"
GPU = "needs a GPU"
LEFT_OUT = {
    "make setup": "needs minutes and an index; CI runs it",
    "make PYTHON=": "the same with another interpreter",
    "make test-slow": MINUTES,
    "make test-ranks": f"{MINUTES}; CI runs those of two",
    "make test-oldest": MINUTES,
    "make test-docs": "it is what runs the others",
    "make test": f"{MINUTES}; CI runs it",
    "make lint": "CI runs it",
    "make figures": "rewrites the pages; `make lint` checks that they would stay as they are",
    "make sanitize": f"{MINUTES}; `make test` runs it",
    "make aot": "rewrites the committed tables; `make test` checks them",
    "make bench": f"{MINUTES}; tests/benchmarks runs its first command at a tiny size",
    "make demo-trl": MINUTES,
    "make demo-verl": "wants its own environment; `make test-verl` runs three steps of it",
    "make demo": "docs/async_lab.md's demo after `make setup`",
    "make gpu": GPU,
    "python3 -m benchmarks.gpu": f"{GPU}; tests/benchmarks/gpu runs its phases",
    "python -m benchmarks.gpu.": "wants the folder of a GPU's run; tests/benchmarks/gpu calls it",
    "python docs/layers.py": "rewrites the pages; tests/test_layers.py checks them",
    "VCPO_NATIVE=OFF pip": "would replace the installation under test",
    "pip install .": "named as what not to do; tests/core/test_installation.py",
    "pip install --no-index": "a part of `make gpu`",
    "pip install -e '.[examples]'": "the README's installation with packages that the tests have",
    "pip install 'trl": "its packages are the tests' own",
    'python -c "import vcpo_kernels.integrations.verl_plugin"': "wants verl; `make test-verl` loads the plugin",
    "accelerate launch": GPU,
    "python -m examples.baseline_study": MINUTES,
    "python -m examples.async_lab grid": MINUTES,
    "python -m examples.async_lab paper": MINUTES,
    "python -m examples.async_lab race": f"{MINUTES}, on two idle cores",
}

# Page -> the test that runs its Python as printed, one snippet after another.
RUN_BY = {
    "README.md": "tests/test_readme.py",
    "docs/usage.md": "tests/test_readme.py",
    "docs/objectives.md": "tests/objectives/test_docs.py",
    "docs/trl.md": "tests/integrations/test_trl_docs.py",
    "docs/prime_rl.md": "tests/integrations/test_prime_rl.py",
    "docs/accelerate.md": "tests/docs/test_snippets.py",
    "docs/ddp.md": "tests/docs/test_snippets.py",
    "docs/huggingface.md": "tests/docs/test_snippets.py",
    "docs/verl.md": "tests/docs/test_snippets.py",
    "docs/parallel.md": "tests/distributed/test_page.py",
    "docs/megatron.md": "tests/distributed/test_megatron_training.py",
}
# Blocks of trainers' settings: what of them a test holds.
SETTINGS_CHECKED = {
    "docs/verl.md": "keys and names against verl's configuration, tests/integrations/test_verl.py",
    "docs/slime.md": "import paths and keys, tests/integrations/test_slime.py",
    "docs/prime_rl.md": "the import path is the snippet's above; prime-rl is on no index",
}


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One line of a shell block, or a command in a sentence."""

    page: str
    line: int
    text: str

    @property
    def left_out(self) -> str | None:
        """Why it is not run; None where it is."""
        return next((reason for start, reason in LEFT_OUT.items() if self.text.startswith(start)), None)


def blocks(page: str) -> list[Block]:
    found, text = [], (ROOT / page).read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        found.append(Block(page, text.count("\n", 0, match.start(2)) + 1, match[1], match[2]))
    return found


def commands(page: str) -> list[Command]:
    """In the page's order: of its shell blocks, then those in its sentences."""
    found = [
        Command(page, block.line + i, line)
        for block in blocks(page)
        if not block.language
        for i, line in enumerate(block.text.splitlines())
        if line.strip() and not SETTINGS.match(line)
    ]
    text = (ROOT / page).read_text()
    prose = re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", prose):
        span = " ".join(match[1].split())
        if STARTS.match(span) and " " in span:
            found.append(Command(page, prose.count("\n", 0, match.start()) + 1, span))
    return found


def every_command() -> list[Command]:
    """The README's first: they install what the others run."""
    return [command for page in PAGES for command in commands(page)]


def snippets(page: str) -> list[str]:
    return [block.text for block in blocks(page) if block.language == "python"]


def summary(ran: int) -> str:
    """The last line of `make test-docs`."""
    left = {c.text.split("#")[0].strip(): c.left_out for c in every_command() if c.left_out}
    python = sum(len(snippets(page)) for page in PAGES)
    reasons = "; ".join(f"`{command}` ({reason})" for command, reason in left.items())
    settings = "; ".join(f"{page}'s settings ({how})" for page, how in SETTINGS_CHECKED.items())
    return (
        f"docs: {ran} commands ran as printed; {python} Python snippets are run by {', '.join(sorted(set(RUN_BY.values())))}; "
        f"left out: {reasons}; {settings}"
    )
