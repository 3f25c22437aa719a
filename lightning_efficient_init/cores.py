"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def available_cores() -> int:
    """Cores that this process may run on, and no more than the CPU time that its cgroup has (Linux)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cgroup_quota())))


def cgroup_quota(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """CPU time per second that the process's cgroup, or one above it, has; infinite where nothing limits it.

    Args:
        groups: Where the hierarchy is mounted, version 1 or 2.
        membership: The file that says which groups the process is in.
    """
    return min((quota for folder in _folders(groups, membership) for quota in _quotas(folder)), default=math.inf)


def _folders(groups: Path, membership: Path) -> Iterator[Path]:
    """The process's groups up to the root; in a container the root is often all there is to see."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for root, controllers in ((groups, ""), (groups / "cpu", "cpu")):
        yield root
        for line in lines:
            _, names, path = line.split(":", 2)
            if controllers in names.split(","):
                group = root / path.lstrip("/")
                yield from (group, *(parent for parent in group.parents if root in parent.parents))


def _quotas(folder: Path) -> Iterator[float]:
    """Version 2 has both numbers in one file, version 1 has a file for each; "max" and -1 are no limit."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = (int(word) for name in files for word in (folder / name).read_text().split())
        except (OSError, ValueError):
            continue
        if quota > 0 and period > 0:
            yield quota / period
