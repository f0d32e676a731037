"""Imports between the rooms of benchmarks/ run one way, and among its modules in no circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from benchmarks import __file__ as package

ROOT = Path(package).parent
# A room -> the rooms that it may import. The commands at the top may import all, and nobody imports them.
ARROWS = {
    "harness": set(),
    "aot": set(),
    "cases": {"harness"},
    "report": {"harness"},
    "comparisons": {"cases", "harness"},
    "gpu": {"aot", "cases", "harness", "report"},
}


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package's is that of its folder."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("benchmarks", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> dict[str, set[str]]:
    """Which modules of benchmarks/ each imports, wherever in it the import stands."""
    known = modules()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, (
                    f"{name}, line {node.lineno}: a relative import, which this test does not follow"
                )
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= {w if w in known else str(node.module) for w in whole}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        found[name] = {t for t in targets if t.split(".")[0] == "benchmarks"}
    return found


def room(module: str) -> str:
    """ "" of the commands at the top."""
    first = module.split(".")[1:2]
    return first[0] if first and first[0] in ARROWS else ""


def test_every_folder_is_a_room() -> None:
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == set(ARROWS)


def test_arrows_between_rooms_point_down() -> None:
    wrong = [
        f"{module} -> {target}"
        for module, targets in imports().items()
        for target in targets
        if room(module) and room(target) != room(module) and room(target) not in ARROWS[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_in_a_circle() -> None:
    TopologicalSorter(imports()).prepare()  # raises CycleError, which names the circle
