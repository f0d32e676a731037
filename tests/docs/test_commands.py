"""Every command of the pages as it is printed, as a newcomer would: a fresh clone, a fresh environment, one after another."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Command, every_command

pytestmark = pytest.mark.slow

# What a command must print, besides ending with status 0.
PRINTS = {
    "python -m vcpo_kernels.env": r"(?s)imported from +\S+/clones/vcpo_kernels/.*native on cpu +available \(default\)",
    "python -m examples.async_lab demo": r"Curves: runs/async_lab/demo.png",
}
LOOPS = re.compile(r"(torchrun --nproc-per-node 2 -m|python -m) (examples\.loops\.\w+)")
RATIO = re.compile(r"ESS/B (\d\.\d+)|'vcpo/ess_ratio': '?(\d\.\d+)")


@dataclass
class Machine:
    """Where the commands run. place: the folder that the last one was left in. seen: ESS of each loop on one process."""

    environment: dict[str, str]
    place: Path
    repository: Path
    seen: dict[str, list[str]]

    def run(self, text: str) -> str:
        text = text.replace("<this repository>", f"{self.repository} vcpo_kernels")
        left_in = self.repository.parent / "left_in"
        done = subprocess.run(
            ["bash", "-c", f"set -e\n{text}\npwd > {left_in}"],
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        self.place = Path(left_in.read_text().strip())
        return done.stdout


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The working tree as a repository, and an environment that has the tests' packages but not this one."""
    folder = tmp_path_factory.mktemp("newcomer")
    repository = folder / "repository"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, repository / name)
    commit = "git init -q && git add -A && git -c user.name=t -c user.email=t commit -qm t"
    subprocess.run(["bash", "-c", commit], cwd=repository, check=True)
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    bin_ = folder / "venv" / "bin"
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # not the editable installation's finder in it
    for name in ("torchrun", "accelerate"):  # in the new environment's interpreter
        script = Path(sys.executable).parent / name
        if script.exists():
            (bin_ / name).write_text(f"#!{bin_ / 'python'}\n" + script.read_text().split("\n", 1)[1])
            (bin_ / name).chmod(0o755)
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHONPATH", "TRITON_INTERPRET"))
    }
    environment |= {"PATH": f"{bin_}:{environment['PATH']}", "VIRTUAL_ENV": str(folder / "venv")}
    environment |= {"CMAKE_ARGS": "-DVCPO_CUDA=OFF", "HF_HUB_OFFLINE": "1"}
    (folder / "clones").mkdir()
    return Machine(environment, folder / "clones", repository, {})


@pytest.mark.parametrize(
    "command", [c for c in every_command() if c.left_out is None], ids=lambda c: f"{c.page}:{c.line}"
)
def test_command(machine: Machine, command: Command) -> None:
    """Two processes besides print the ESS of one, as the pages say."""
    output = machine.run(command.text)
    for start, wanted in PRINTS.items():
        if command.text.startswith(start):
            assert re.search(wanted, output), output
    if loop := LOOPS.match(command.text):
        ratios = [a or b for a, b in RATIO.findall(output)]
        assert len(ratios) == 4, output
        if loop[1].startswith("python"):
            machine.seen[loop[2]] = ratios
        else:
            want = machine.seen[loop[2]]
            assert [float(r) for r in ratios] == pytest.approx([float(r) for r in want], abs=2e-3)
