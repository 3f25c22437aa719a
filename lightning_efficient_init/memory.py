"""How much memory is in use, and the most that was."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

SAMPLE_S = 0.005


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process, from ``/proc/self/status`` (Linux); 0 elsewhere.

    Anonymous memory is what the process has allocated and touched. Pages of mapped files, which the system can drop at
    any time, do not count.
    """
    try:
        with open("/proc/self/status", "rb") as status:
            for line in status:
                if line.startswith(b"RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class PeakMemory:
    """Watches memory while its context is open.

    Args:
        devices: CUDA devices to watch beside the host; others are passed over.
        in_background: Whether a thread takes samples. Otherwise ``sample`` has to be called.

    Attributes:
        host_bytes: The most by which the process's anonymous memory has grown, in bytes.
        device_bytes: The most memory in use on the devices together, in bytes.
    """

    def __init__(self, devices: Iterable[torch.device] = (), *, in_background: bool = False) -> None:
        self.host_bytes = 0
        self.device_bytes = 0
        self._devices = [device for device in devices if device.type == "cuda"]
        self._host_before = anonymous_bytes()
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
        self.host_bytes = max(self.host_bytes, anonymous_bytes() - self._host_before)
        in_use = sum(torch.cuda.memory_allocated(device) for device in self._devices)
        self.device_bytes = max(self.device_bytes, in_use)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.sample()
