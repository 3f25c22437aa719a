"""How much memory is in use, and the most that was."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from lightning_efficient_init.cgroups import GROUPS, MEMBERSHIP, group_folders

SAMPLE_S = 0.005


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process, from ``/proc/self/status`` (Linux); 0 elsewhere.

    Anonymous memory is what the process has allocated and touched. Pages of mapped files, which the system can drop at
    any time, do not count.
    """
    return resident_bytes()[0]


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process, anonymous and of mapped files (Linux); zeros elsewhere."""
    anonymous = mapped = 0
    try:
        with open("/proc/self/status", "rb") as status:
            for line in status:
                if line.startswith(b"RssAnon:"):
                    anonymous = int(line.split()[1]) * 1024
                elif line.startswith(b"RssFile:"):
                    mapped = int(line.split()[1]) * 1024
                    break
    except OSError:
        pass
    return anonymous, mapped


def available_bytes() -> int:
    """Memory of the host that new allocations can have, from ``/proc/meminfo`` and the cgroups' limits (Linux).

    Elsewhere a number larger than any memory.
    """
    return min(_available_in_system(), cgroup_bytes())


def _available_in_system() -> int:
    try:
        with open("/proc/meminfo", "rb") as meminfo:
            return int(next(line for line in meminfo if line.startswith(b"MemAvailable:")).split()[1]) * 1024
    except (OSError, StopIteration):
        return sys.maxsize


def cgroup_bytes(groups: Path = GROUPS, membership: Path = MEMBERSHIP) -> int:
    """What the process's cgroup, and each above it, leaves; a number larger than any memory where nothing limits it.

    Pages of files that were read count as used there, but can be dropped.

    Args:
        groups: Where the hierarchy is mounted, version 1 or 2.
        membership: The file that says which groups the process is in.
    """
    folders = group_folders("memory", groups, membership)
    return min((left for folder in folders for left in _bytes_left(folder)), default=sys.maxsize)


def _bytes_left(folder: Path) -> Iterator[int]:
    """The versions have other names for the same; "max" is no limit."""
    for limit, used, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield max(0, left + int(stat.get(droppable, 0)))
        except (OSError, ValueError):
            continue


class PeakMemory:
    """Watches memory while its context is open.

    Args:
        devices: CUDA devices to watch beside the host; others are passed over.
        in_background: Whether a thread takes samples. Otherwise ``sample`` has to be called.

    Attributes:
        host_bytes: The most by which the process's anonymous memory has grown, in bytes.
        mapped_bytes: The most by which its resident pages of mapped files have grown, in bytes.
        device_bytes: The most memory in use on the devices together, in bytes.
    """

    def __init__(self, devices: Iterable[torch.device] = (), *, in_background: bool = False) -> None:
        self.host_bytes = 0
        self.mapped_bytes = 0
        self.device_bytes = 0
        self._devices = [device for device in devices if device.type == "cuda"]
        self._host_before, self._mapped_before = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if in_background else None

    def __enter__(self) -> PeakMemory:
        self.sample()
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()

    def sample(self) -> None:
        """Look at the memory in use now."""
        anonymous, mapped = resident_bytes()
        self.host_bytes = max(self.host_bytes, anonymous - self._host_before)
        self.mapped_bytes = max(self.mapped_bytes, mapped - self._mapped_before)
        in_use = sum(torch.cuda.memory_allocated(device) for device in self._devices)
        self.device_bytes = max(self.device_bytes, in_use)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.sample()
