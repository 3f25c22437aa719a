"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from lightning_efficient_init.cgroups import GROUPS, MEMBERSHIP, group_folders


def available_cores() -> int:
    """Cores that this process may run on, and no more than the CPU time that its cgroup has (Linux)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cgroup_quota())))


def cgroup_quota(groups: Path = GROUPS, membership: Path = MEMBERSHIP) -> float:
    """CPU time per second that the process's cgroup, or one above it, has; infinite where nothing limits it.

    Args:
        groups: Where the hierarchy is mounted, version 1 or 2.
        membership: The file that says which groups the process is in.
    """
    folders = group_folders("cpu", groups, membership)
    return min((quota for folder in folders for quota in _quotas(folder)), default=math.inf)


def _quotas(folder: Path) -> Iterator[float]:
    """Version 2 has both numbers in one file, version 1 has a file for each; "max" and -1 are no limit."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = (int(word) for name in files for word in (folder / name).read_text().split())
        except (OSError, ValueError):
            continue
        if quota > 0 and period > 0:
            yield quota / period
