"""How much memory a process may still take: the smallest of what the machine, its containers and its own limits leave.

Layer: rows. A scheduler's or a container's limit is often far below what the machine has, and crossing it kills the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

ROOT = Path("/")


def free_bytes(device: torch.device) -> int:
    """Memory that could still be allocated; 0 where the system does not say."""
    return _on_gpu(device) if device.type == "cuda" else _on_cpu(ROOT)


def _on_gpu(device: torch.device) -> int:
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return max(0, min(free + reserved - allocated, int(fraction * total) - allocated))


def _on_cpu(root: Path) -> int:
    available = _fields(root / "proc/meminfo").get("MemAvailable:")
    if available is None:
        return 0
    left = [available << 10, *_under_cgroups(root), *_under_rlimits(root)]
    return max(0, min(left))


def _under_rlimits(root: Path) -> Iterator[int]:
    try:
        import resource
    except ImportError:
        return
    used = _fields(root / "proc/self/status")
    for limit, name in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and name in used:
            yield soft - (used[name] << 10)


def _under_cgroups(root: Path) -> Iterator[int]:
    """What each group leaves that this process is in, its own and those above. Cached files do not count: they can go."""
    for group, mounted, version in _memory_groups(root):
        maximum, used, cached = _FILES[version]
        for level in (group, *group.parents):
            folder = mounted / level.relative_to("/")
            limits = [n for n in (_number(folder / name) for name in maximum) if n is not None]
            usage = _number(folder / used)
            if limits and usage is not None:
                yield min(limits) - usage + _fields(folder / "memory.stat").get(cached, 0)


# Of each version of cgroups: its limits, what is used, and which line of memory.stat counts the cached files in that.
_FILES = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def _memory_groups(root: Path) -> Iterator[tuple[PurePosixPath, Path, str]]:
    """(group's path below the mount, mount point, version) of the hierarchies that account for memory."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):  # 0::/path, or 4:memory:/path
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers or "memory" in controllers.split(","):
            groups["cgroup" if controllers else "cgroup2"] = PurePosixPath(path)
    for line in _lines(root / "proc/self/mountinfo"):  # 35 31 0:32 <root> <mount point> rw - cgroup cgroup rw,memory
        before, _, after = line.partition(" - ")
        kind, *_, options = after.split(" ") if after else ["", ""]
        if kind not in groups or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        of_hierarchy, mount_point = before.split(" ")[3:5]
        group = groups[kind]
        # In a container the mount shows its own group as the root, and the path may be written from the host's.
        inside = group.relative_to(of_hierarchy) if group.is_relative_to(of_hierarchy) else PurePosixPath()
        yield PurePosixPath("/") / inside, root / mount_point.lstrip("/"), kind


def _fields(path: Path) -> dict[str, int]:
    """The first number of each line, by the line's first word."""
    words = (line.split() for line in _lines(path))
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}


def _number(path: Path) -> int | None:
    """None where there is no such file, or no limit ("max")."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
