"""memory="auto" takes what the process may take, not what the machine has, and goes on where that was an error."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import vcpo_kernels as vk
from vcpo_kernels.head import free_memory, kept_scores

MIB = 1 << 20
CPU = torch.device("cpu")


def machine(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """A file system of a machine with 8000 MiB available."""
    proc = {
        "meminfo": "MemTotal: 16384000 kB\nMemAvailable: 8192000 kB\n",
        "self/cgroup": cgroup,
        "self/mountinfo": mounts,
    }
    for name, text in [*((f"proc/{name}", text) for name, text in proc.items()), *files.items()]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
NO_LIMIT_V1 = "9223372036854771712"

MACHINES = {
    "no cgroup": ("", "", {}, 8000),
    "v2, no limit": (
        "0::/job\n",
        V2,
        {"sys/fs/cgroup/job/memory.max": "max\n", "sys/fs/cgroup/job/memory.current": "5\n"},
        8000,
    ),
    "v2": (
        "0::/job\n",
        V2,
        {"sys/fs/cgroup/job/memory.max": f"{900 * MIB}\n", "sys/fs/cgroup/job/memory.current": f"{200 * MIB}\n"},
        700,
    ),
    "v2, of which the kernel could drop cached files": (
        "0::/job\n",
        V2,
        {
            "sys/fs/cgroup/job/memory.max": f"{900 * MIB}\n",
            "sys/fs/cgroup/job/memory.current": f"{200 * MIB}\n",
            "sys/fs/cgroup/job/memory.stat": f"anon 1\ninactive_file {150 * MIB}\n",
        },
        850,
    ),
    "v2, throttled before": (
        "0::/job\n",
        V2,
        {
            "sys/fs/cgroup/job/memory.max": f"{900 * MIB}\n",
            "sys/fs/cgroup/job/memory.high": f"{600 * MIB}\n",
            "sys/fs/cgroup/job/memory.current": f"{200 * MIB}\n",
        },
        400,
    ),
    "v2, the limit is of the group above": (
        "0::/jobs/mine\n",
        V2,
        {
            "sys/fs/cgroup/jobs/mine/memory.max": "max\n",
            "sys/fs/cgroup/jobs/mine/memory.current": f"{10 * MIB}\n",
            "sys/fs/cgroup/jobs/memory.max": f"{500 * MIB}\n",
            "sys/fs/cgroup/jobs/memory.current": f"{450 * MIB}\n",
        },
        50,
    ),
    "v2, over the limit": (
        "0::/job\n",
        V2,
        {"sys/fs/cgroup/job/memory.max": f"{100 * MIB}\n", "sys/fs/cgroup/job/memory.current": f"{101 * MIB}\n"},
        0,
    ),
    "v1": (
        "5:cpu:/\n4:memory:/job\n",
        V1,
        {
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{900 * MIB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{300 * MIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT_V1,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{4000 * MIB}\n",
        },
        600,
    ),
    "v1 in a container, which sees its own group as the root": (
        "4:cpu,memory:/docker/abc\n",
        V1.replace(" / /sys", " /docker/abc /sys").replace("rw,memory", "rw,cpu,memory"),
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{900 * MIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{100 * MIB}\n",
        },
        800,
    ),
    "v2 in a container, whose path is the host's": (
        "0::/kubepods/pod1/abc\n",
        V2.replace(" / /sys", " /../../.. /sys"),
        {"sys/fs/cgroup/memory.max": f"{900 * MIB}\n", "sys/fs/cgroup/memory.current": f"{100 * MIB}\n"},
        800,
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_cgroups(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup, mounts, files, want = MACHINES[name]
    monkeypatch.setattr(free_memory, "ROOT", machine(tmp_path, cgroup, mounts, files))
    assert free_memory.free_bytes(CPU) == want * MIB


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "ROOT", tmp_path)
    assert free_memory.free_bytes(CPU) == 0


@pytest.mark.parametrize("limit", ("RLIMIT_AS", "RLIMIT_DATA"))
def test_limits_of_the_process(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    status = {"proc/self/status": f"Name:\tpython\nVmSize:\t{300 << 10} kB\nVmData:\t{300 << 10} kB\n"}
    monkeypatch.setattr(free_memory, "ROOT", machine(tmp_path, "", "", status))
    soft = {getattr(resource, limit): 1000 * MIB}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft.get(which, resource.RLIM_INFINITY),) * 2)
    assert free_memory.free_bytes(CPU) == 700 * MIB


@pytest.mark.parametrize(("fraction", "want"), ((1.0, 6), (0.5, 3)))
def test_fraction_of_a_gpu(fraction: float, want: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 in all, 5 free at the driver, 3 reserved of which 2 are in use."""
    says = {"memory_reserved": 3, "memory_allocated": 2, "mem_get_info": (5, 10)}
    for name, value in {**says, "get_per_process_memory_fraction": fraction}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value, raising=False)
    assert free_memory.free_bytes(torch.device("cuda", 0)) == want


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    return hidden, weight, torch.randint(0, 40, (50,))


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """No score matrix of all rows can be allocated."""
    asked: list[tuple[int, ...]] = []

    def empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        asked.append(shape)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(kept_scores, "empty_large", empty)
    return asked


def test_auto_falls_back_where_the_matrix_cannot_be_allocated(no_room: list[tuple[int, ...]]) -> None:
    hidden, weight, ids = inputs()
    stats = vk.linear_token_stats(hidden, weight, ids, fast_bytes=1 << 40)
    assert no_room == [(50, 40)]
    got = torch.autograd.grad(stats.logp.sum(), (hidden, weight))
    lean = vk.linear_token_stats(hidden, weight, ids, memory="lean")
    assert torch.equal(stats.logp, lean.logp)
    for a, b in zip(got, torch.autograd.grad(lean.logp.sum(), (hidden, weight)), strict=True):
        assert torch.equal(a, b)


def test_fast_as_asked_says_what_to_do(no_room: list[tuple[int, ...]]) -> None:
    with pytest.raises(
        torch.OutOfMemoryError, match=r'matrix \[50, 40\] of .* GiB.*memory="lean".*can\'t allocate memory'
    ):
        vk.linear_token_stats(*inputs(), memory="fast")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is enforced on Linux")
@pytest.mark.parametrize("memory", ("auto", "lean"))
def test_under_a_real_limit(memory: str) -> None:
    """ulimit -v: what a scheduler sets. S takes 480 MB and 400 MiB are left."""
    script = f"""
        import os, resource, torch, vcpo_kernels as vk
        torch.set_num_threads(1)
        hidden, weight = torch.randn(3000, 16, requires_grad=True), torch.randn(40000, 16, requires_grad=True)
        ids = torch.randint(0, 40000, (3000,))
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
        vk.linear_token_stats(hidden, weight, ids, memory="{memory}", chunk_bytes=32 << 20).logp.sum().backward()
        print("done", flush=True)
        os._exit(0)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert ran.stdout == "done\n", ran.stderr[-400:]
