"""Which cgroups this process is in (Linux): each of them may limit it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def group_folders(controller: str, groups: Path = GROUPS, membership: Path = MEMBERSHIP) -> Iterator[Path]:
    """The process's groups up to the root; in a container the root is often all there is to see.

    Args:
        controller: Of version 1, where each has a hierarchy of its own, such as "cpu".
        groups: Where the hierarchy is mounted, version 1 or 2.
        membership: The file that says which groups the process is in.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for root, controllers in ((groups, ""), (groups / controller, controller)):
        yield root
        for line in lines:
            _, names, path = line.split(":", 2)
            if controllers in names.split(","):
                group = root / path.lstrip("/")
                yield from (group, *(parent for parent in group.parents if root in parent.parents))
