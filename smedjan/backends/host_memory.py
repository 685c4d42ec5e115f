"""How much memory a process of this machine may still take: what the kernel says is free, within its cgroups' limits.

Linux alone says so: proc(5), /proc/meminfo; the kernel's admin-guide/cgroup-v2 and cgroup-v1/memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 1 << 60
"""From where on a limit of cgroup v1, which has no word for none, is none."""


def available_bytes(root: Path = Path("/")) -> int | None:
    """None where the machine does not say. `root` holds proc and sys."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    return max(0, min([free, *_left(root)]))


def _left(root: Path) -> Iterator[int]:
    """What each cgroup that the process is in, from its own to the outermost, leaves of its limit. Files that it has
    read count as used there, and are given up when memory is short."""
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit, used, cached = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, used, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        inner = base / path.lstrip("/")
        for group in (inner, *inner.parents):
            # In a namespace of its own, a process sees its group as the outermost one, and paths above are not there.
            if (group / limit).exists():
                most = (group / limit).read_text().strip()
                if most != "max" and int(most) < UNLIMITED:
                    stat = dict(each.split() for each in (group / "memory.stat").read_text().splitlines())
                    yield int(most) - int((group / used).read_text()) + int(stat.get(cached, 0))
            if group == base:
                break
