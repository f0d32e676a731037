"""The picture of the package's layers, made of its imports: `python docs/layers.py` puts it into the pages, --check compares.

A room is a folder or a module at the top of vcpo_kernels/. Rooms import those before them in `ROOMS` and no others
(tests/test_layers.py). Of the arrows, those that others imply are left out.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vcpo_kernels"
PAGES = (ROOT / "docs" / "design.md", ROOT / "CONTRIBUTING.md")
BEGIN, END = "<!-- layers -->\n", "<!-- /layers -->"

# From the ground up, with what is in it.
ROOMS = {
    "core": "checks, definition of ops,<br/>registry of backends, dtypes",
    "parallel": "process groups: Ranks,<br/>VocabularyShard, collectives",
    "rows": "logits [N, V] -> tokens [N]:<br/>token_stats, weighted_logp",
    "head": "hidden states -> tokens [N]:<br/>linear_token_stats, patch_head",
    "sequences": "tokens -> sequences [B] -> scalars:<br/>Segments, ESS, baselines, vcpo_loss",
    "sequence_gradients": "exact norms by sequence:<br/>SequenceGradients, OPOBAccumulator",
    "objectives": "every stabilizer as a value,<br/>advantages",
    "step_size": "EssLearningRate",
    "backends": "one folder a backend, one module an op;<br/>the registry loads them by name",
    "integrations": "trainers",
    "env": "what runs here",
}


def room_of(module: str) -> str | None:
    """The room of a dotted module of ours; None for the package itself, its version and the compiled extension."""
    parts = module.split(".")
    inside = len(parts) > 1 and not parts[1].startswith("_")
    return parts[1] if inside else None


def imports_of(path: Path) -> set[str]:
    """Dotted modules of ours that a file imports, at its top or anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vcpo_kernels":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "vcpo_kernels"}
    return found


def arrows() -> dict[str, set[str]]:
    """Which rooms each room imports."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room.startswith("_"):  # the package's own __init__ imports all that is public
            continue
        others = {room_of(module) for module in imports_of(path)} - {None, room}
        found.setdefault(room, set()).update(other for other in others if other is not None)
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that a longer way implies."""

    def reachable(room: str) -> set[str]:
        return graph[room].union(*(reachable(other) for other in graph[room])) if graph[room] else set()

    return {
        room: {to for to in direct if not any(to in reachable(other) for other in direct if other != to)}
        for room, direct in graph.items()
    }


def picture() -> str:
    lines = ["```mermaid", "graph BT"]
    lines += [f'  {room}["<b>{room}</b><br/>{what}"]' for room, what in ROOMS.items()]
    direct = reduced(arrows())
    lines += [f"  {room} --> {to}" for room in ROOMS for to in ROOMS if to in direct.get(room, ())]
    return "\n".join([*lines, "```", ""])


def main(check: bool) -> int:
    """Exit status: 1 where a page's picture is not that of the imports."""
    status = 0
    for page in PAGES:
        text = page.read_text()
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        wanted = f"{before}{BEGIN}{picture()}{END}{after}"
        if check and wanted != text:
            print(f"{page.relative_to(ROOT)}: the picture of the layers is stale. Run `python docs/layers.py`.")
            status = 1
        elif not check:
            page.write_text(wanted)
    return status


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
