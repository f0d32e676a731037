"""Advice where the extension does not load: never to do again what has just been done."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vcpo_kernels.core import installation

NAME = installation.EXTENSION + importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source folder that was imported and has no extension, on a path with nothing else."""
    package = tmp_path / "checkout" / "vcpo_kernels"
    package.mkdir(parents=True)
    (package.parent / "csrc").mkdir()
    (package.parent / "setup.py").touch()
    monkeypatch.setattr(installation, "PACKAGE", package)
    monkeypatch.setattr(sys, "path", [str(package.parent)])
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return package


def installed(tmp_path: Path, name: str = NAME) -> Path:
    package = tmp_path / "site" / "vcpo_kernels"
    package.mkdir(parents=True)
    (package / name).touch()
    return package


def test_hidden_installation(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip install .` in a checkout, and Python started there: the copy is not what was imported."""
    other = installed(tmp_path)
    monkeypatch.setattr(sys, "path", [str(checkout.parent), str(other.parent)])
    text = installation.advice()
    assert f"hides the installed one in {other}" in text
    assert f"run Python from another folder than {checkout.parent}" in text
    assert "C++17" not in text


def test_hidden_editable_installation(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another checkout: pip puts a finder on the meta path. A finder that raises hides nothing."""

    def broken(name: str, path: object) -> None:
        raise RuntimeError

    other = installed(tmp_path)
    spec = importlib.machinery.ModuleSpec("vcpo_kernels", None, origin=str(other / "__init__.py"))
    finders = [SimpleNamespace(find_spec=broken), SimpleNamespace(find_spec=lambda name, path: spec)]
    monkeypatch.setattr(sys, "meta_path", finders)
    assert installation.hidden_installation() == other


def test_an_installation_without_extension_is_not_hidden(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(checkout.parent), str(installed(tmp_path, "other.so").parent)])
    assert installation.hidden_installation() is None
    assert installation.advice().startswith(f"the package was imported from the folder {checkout}, where it was not")


def test_no_compiler(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where there is none is one to be installed."""
    assert "C++17" not in installation.advice()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "install a C++17 compiler first" in installation.advice()


def test_another_pythons_extension(checkout: Path) -> None:
    (checkout / "_native.cpython-27-x86.so").touch()
    assert "only _native.cpython-27-x86.so, built for another Python: `pip install -e .`" in installation.advice()
    (checkout / NAME).touch()
    assert "does not fit this machine or this Python" in installation.advice()


def test_installed_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "vcpo_kernels")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    assert "was installed without it (VCPO_NATIVE=OFF)" in installation.advice()


def test_warning_and_report_in_a_checkout(tmp_path: Path) -> None:
    """The whole way: the source folder is imported, the installed package is what it hides. Where an editable installation
    of yet another folder offers its extension, that is not taken: it may be of other sources.
    """
    source = Path(__file__).parents[2]
    where, other = tmp_path / "checkout", installed(tmp_path)
    shutil.copytree(source / "vcpo_kernels", where / "vcpo_kernels", ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    (where / "csrc").mkdir()
    (where / "setup.py").touch()
    code = """
import torch, warnings
import vcpo_kernels as vk
from vcpo_kernels import env
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    vk.token_stats(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
print([str(w.message) for w in caught if "slow reference" in str(w.message)])
env.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=where,
        env=os.environ | {"PYTHONPATH": str(other.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    warning, *report = done.stdout.splitlines()
    assert f"hides the installed one in {other}" in warning
    lines = {line[:18].strip(): line[18:].strip() for line in report}
    assert lines["imported from"] == f"{where / 'vcpo_kernels'} (a source folder, which hides the installed {other})"
    assert lines["instruction set"].startswith("none: the compiled extension does not load")
    assert lines["reference on cpu"] == "available (default)"
