"""Imports run downwards only, and the picture of the layers in the pages is that of the imports."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def layers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "docs" / "layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_room_is_known(layers: ModuleType) -> None:
    """A new folder or module at the top has a place among the layers."""
    assert set(layers.arrows()) == set(layers.ROOMS)


def test_imports_run_downwards(layers: ModuleType) -> None:
    order = list(layers.ROOMS)
    upwards = [
        f"{room} imports {other}"
        for room, others in layers.arrows().items()
        for other in others
        if order.index(other) >= order.index(room)
    ]
    assert not upwards


def test_nobody_imports_the_leaves(layers: ModuleType) -> None:
    """Backends are loaded by the registry, by name; trainers and the report stand alone."""
    leaves = {"backends", "integrations", "env"}
    assert not {(room, other) for room, others in layers.arrows().items() for other in others if other in leaves}


def test_only_integrations_import_the_package_itself(layers: ModuleType) -> None:
    """`import vcpo_kernels as vk` runs through every layer: within the layers it would be an arrow upwards."""
    offenders = [
        path
        for path in layers.PACKAGE.rglob("*.py")
        if "vcpo_kernels" in layers.imports_of(path) and "integrations" not in path.parts
    ]
    assert not offenders


def test_the_test_finds_an_upward_import(layers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one inside a function, and one of a module by its package."""
    for name, text in (
        ("core/a.py", "def f():\n    from vcpo_kernels.rows import views\n"),
        ("rows/views.py", "from vcpo_kernels import core\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(layers, "PACKAGE", tmp_path)
    assert layers.arrows() == {"core": {"rows"}, "rows": {"core"}}


def test_the_picture_is_that_of_the_imports(layers: ModuleType) -> None:
    assert layers.main(check=True) == 0
