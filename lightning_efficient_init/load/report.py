"""What a load did, measured."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from lightning_efficient_init.errors import shorten
from lightning_efficient_init.memory import PeakMemory

_PROGRESS_DELAY_S = 1.0


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What ``load_checkpoint`` did.

    Attributes:
        loaded: Names of the model's tensors that took their values from the checkpoint.
        initialized: Names of parameters that ran their own initializer because the checkpoint had no value for them.
        missing: Names of the model's tensors that the checkpoint lacks.
        unexpected: Keys of the checkpoint that match nothing in the model.
        mismatched: Names of tensors that have another shape in the checkpoint.
        num_bytes: Bytes of tensors that this rank read from the files.
        elapsed_s: Seconds from the call to the last value in place, planning included.
        peak_host_bytes: Growth of the process's anonymous memory at its highest, sampled; on a CPU this includes the
            parameters themselves where the load gave them memory. 0 where the system does not tell.
        peak_device_bytes: Highest memory in use on the model's device during the load, sampled; 0 on a CPU.
        bytes_per_rank: ``num_bytes`` of every rank that took part, by rank.
        is_postponed: Whether all of this is yet to come: a strategy is going to shard the model, and the checkpoint,
            which fits, is read once it has. Nothing is measured then.
    """

    loaded: tuple[str, ...]
    initialized: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    num_bytes: int
    elapsed_s: float
    peak_host_bytes: int
    peak_device_bytes: int
    bytes_per_rank: tuple[int, ...] = ()
    is_postponed: bool = False

    @property
    def bytes_per_s(self) -> float:
        """Bytes read per second of the whole load."""
        return self.num_bytes / self.elapsed_s if self.elapsed_s else 0.0

    def __str__(self) -> str:
        parts = self._figures()
        for title in ("initialized", "missing", "unexpected", "mismatched"):
            if names := getattr(self, title):
                parts.append(f"{title}: {shorten(names)}")
        return "; ".join(parts)

    def _figures(self) -> list[str]:
        if self.is_postponed:
            return [f"{len(self.loaded)} tensors are going to be read once the model is sharded"]
        figures = [
            f"loaded {len(self.loaded)} tensors, {self.num_bytes / 1e9:.3f} GB in {self.elapsed_s:.3f} s "
            f"({self.bytes_per_s / 1e9:.2f} GB/s)",
            f"host memory peak +{self.peak_host_bytes / 1e9:.3f} GB",
        ]
        if self.peak_device_bytes:
            figures.append(f"device memory peak {self.peak_device_bytes / 1e9:.3f} GB")
        return figures


class Meter:
    """Measures a load while it runs, and shows its progress.

    Args:
        total_bytes: What will be read.
        devices: The devices to watch.
        progress: ``True`` shows a bar, ``False`` shows none, ``None`` shows one on a terminal if the load takes more
            than a moment.
    """

    def __init__(self, total_bytes: int, devices: set[torch.device], progress: bool | None) -> None:
        self.memory = PeakMemory(devices)
        self._bar = _bar(total_bytes, 0 if progress else _PROGRESS_DELAY_S) if _is_shown(progress) else None

    def __enter__(self) -> Meter:
        self.memory.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.memory.__exit__()
        if self._bar is not None:
            self._bar.close()

    def tick(self, num_bytes: int) -> None:
        """Note that ``num_bytes`` have been read so far."""
        if self._bar is not None:
            self._bar.update(num_bytes - self._bar.n)
        self.memory.sample()


def _is_shown(progress: bool | None) -> bool:
    """Decided here: a bar that tqdm disables has by then started tqdm's own thread, which stays."""
    return sys.stderr.isatty() if progress is None else progress


def _bar(total_bytes: int, delay_s: float) -> tqdm[Any]:
    return tqdm(total=total_bytes, desc="Loading", unit="B", unit_scale=True, delay=delay_s, leave=False)
