"""What users name stays: the public names with their parameters or fields, the ops' schemas, the commands, the plugin.

public_surface.json lists them. A name that is added is added there; one that is renamed keeps a deprecated alias for a version.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import vcpo_kernels

SURFACE = json.loads((Path(__file__).parent / "public_surface.json").read_text())
NAMES = [(module, name) for module, names in SURFACE["names"].items() for name in names]


@pytest.mark.parametrize("module", SURFACE["names"])
def test_public_names(module: str) -> None:
    assert sorted(importlib.import_module(module).__all__) == sorted(SURFACE["names"][module])


def takes(thing: Any) -> list[str]:
    """Fields of a dataclass, keys of a TypedDict, parameters of anything else that can be called."""
    if typing.is_typeddict(thing):
        return list(thing.__annotations__)
    if dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing)]
    return list(inspect.signature(thing).parameters) if callable(thing) else []


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_parameters_and_fields(module: str, name: str) -> None:
    """In their order, as far as they can be given by position; further ones may follow."""
    thing, wanted = getattr(importlib.import_module(module), name), SURFACE["names"][module][name]
    found = takes(thing)
    assert all(n in found or hasattr(thing, n) for n in wanted)  # a field may have become a property
    wanted = [n for n in wanted if n in found]
    if inspect.isfunction(thing) and not typing.is_typeddict(thing):
        parameters = inspect.signature(thing).parameters.values()
        found = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        wanted = [n for n in wanted if n in found]
    assert [n for n in found if n in wanted] == wanted


def test_ops() -> None:
    schemas = torch._C._jit_get_all_schemas()
    ours = sorted(str(s) for s in schemas if s.name.startswith(f"{vcpo_kernels.__name__}::"))
    assert ours == SURFACE["ops"]


@pytest.mark.parametrize("command", SURFACE["commands"])
def test_commands(command: str) -> None:
    """`python -m <command>` finds something to run."""
    spec = importlib.util.find_spec(command)
    assert spec is not None
    if spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{command}.__main__")
    assert spec is not None


def test_verl_finds_its_plugin() -> None:
    (plugin,) = importlib.metadata.entry_points(group="verl.plugins", name="vcpo")
    assert plugin.value == "vcpo_kernels.integrations.verl_plugin"
