"""Where this package was imported from, and what to do where its compiled extension does not load.

A source folder that Python runs in is imported before the package that pip installed elsewhere, and has no extension unless
it was built there (`pip install -e .`). The advice then is another one than to install a compiler.
"""

from __future__ import annotations

import importlib.machinery
import shutil
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parents[1]
EXTENSION = "_native"


def is_source() -> bool:
    """True where the package was imported from a checkout, or an unpacked source distribution."""
    return (PACKAGE.parent / "setup.py").exists() and (PACKAGE.parent / "csrc").is_dir()


def hidden_installation() -> Path | None:
    """The folder of another vcpo_kernels that has the extension, and that the imported one hides."""
    folders = [Path(entry or ".") / PACKAGE.name for entry in sys.path]
    for finder in sys.meta_path:  # editable installations of other folders
        try:
            spec = None if finder is importlib.machinery.PathFinder else finder.find_spec(PACKAGE.name, None)
        except Exception:  # anybody's, and we are on the way to a warning
            continue
        if spec is not None and spec.origin is not None:
            folders.append(Path(spec.origin).parent)
    for folder in folders:
        if folder.resolve() != PACKAGE.resolve() and _loadable(folder):
            return folder.resolve()
    return None


def owns(extension: ModuleType) -> bool:
    """False for the extension of another installation, which an editable one hands to every folder that lacks its own."""
    return extension.__file__ is not None and Path(extension.__file__).parent.resolve() == PACKAGE.resolve()


def _loadable(folder: Path) -> bool:
    return any((folder / (EXTENSION + suffix)).exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES)


def advice() -> str:
    """What to do where the extension does not load."""
    source = PACKAGE.parent
    build = (
        f"`pip install -e .` in {source} builds it" if is_source() else "reinstall vcpo_kernels from its source folder"
    )
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    needs = "" if compiler else "; install a C++17 compiler first (apt-get install g++), there is none on the PATH"
    if _loadable(PACKAGE):
        return f"it does not fit this machine or this Python: {build} anew{needs}"
    if (hidden := hidden_installation()) is not None:
        return (
            f"the package was imported from the folder {PACKAGE}, which has no extension and hides the installed "
            f"one in {hidden}, which has it: run Python from another folder than {source}, or build it there too by "
            f"`pip install -e .`{needs}"
        )
    others = sorted(path.name for path in PACKAGE.glob(f"{EXTENSION}*.so"))
    if others:
        return f"there is only {', '.join(others)}, built for another Python: {build} for this one{needs}"
    if is_source():
        return f"the package was imported from the folder {PACKAGE}, where it was not built: {build}{needs}"
    return f"the package in {PACKAGE} was installed without it (VCPO_NATIVE=OFF): {build} without that{needs}"
