"""``load_from_checkpoint`` with this package and with stock Lightning, measured in fresh processes."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from lightning_efficient_init import EfficientInit
from lightning_efficient_init.memory import PeakMemory

WAYS = ("stock Lightning", "EfficientInit")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One way of loading, in one process.

    Attributes:
        first_s: Seconds to build and load the model, the first time in the process.
        again_s: The same, once more.
        host_bytes: Growth of the process's anonymous memory at its highest, the first time.
        device_bytes: Highest memory in use on the device, the first time; 0 on a CPU.
        device: Where the model was then.
    """

    first_s: float
    again_s: float
    host_bytes: int
    device_bytes: int
    device: str


def print_comparison(
    module_class: type[L.LightningModule], path: Path, accelerator: str, precision: str, rounds: int
) -> None:
    """Load ``path`` in every way, ``rounds`` times in turn, and print a table."""
    results: dict[str, list[Measurement]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, measurements in results.items():
            measurements.append(_in_fresh_process(way, module_class, path, accelerator, precision))
    Console(width=120).print(_table(results, path, precision, rounds))


def _in_fresh_process(*args: Any) -> Measurement:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(measure, *args).result()


def measure(
    way: str, module_class: type[L.LightningModule], path: Path, accelerator: str, precision: str
) -> Measurement:
    """Build and load twice in this process. Libraries are imported and the device is ready before the clock starts."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = _trainer(way, accelerator, precision)
    device = trainer.strategy.root_device
    torch.zeros(1, device=device)
    with PeakMemory([device], in_background=True) as memory:
        model, first_s = _load(trainer, module_class, path)
    device_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    ends_on = str(model.device)
    del model
    gc.collect()
    _, again_s = _load(trainer, module_class, path)
    return Measurement(first_s, again_s, memory.host_bytes, device_bytes, ends_on)


def _trainer(way: str, accelerator: str, precision: Any) -> L.Trainer:
    options: dict[str, Any] = (
        {"precision": precision} if way == "stock Lightning" else {"plugins": [EfficientInit(precision)]}
    )
    return L.Trainer(accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False, **options)


def _load(trainer: L.Trainer, module_class: type[L.LightningModule], path: Path) -> tuple[L.LightningModule, float]:
    started = time.perf_counter()
    with trainer.init_module(empty_init=True):
        model = module_class.load_from_checkpoint(path)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return model, time.perf_counter() - started


def _table(results: dict[str, list[Measurement]], path: Path, precision: str, rounds: int) -> Table:
    table = Table(
        title=f"load_from_checkpoint, {path.stat().st_size / 1e6:.0f} MB with optimizer state, {precision}",
        caption=f"median of {rounds} processes (range); the file is in the page cache; host peak: growth of anonymous "
        "memory",
    )
    for heading in ("", "first in a process, s", "again, s", "host peak, MB", "device peak, MB", "ends on"):
        table.add_column(heading, justify="right" if heading else "left")
    for way, measurements in results.items():
        table.add_row(
            way,
            _spread([m.first_s for m in measurements]),
            _spread([m.again_s for m in measurements]),
            f"{max(m.host_bytes for m in measurements) / 1e6:.0f}",
            f"{max(m.device_bytes for m in measurements) / 1e6:.0f}",
            measurements[0].device,
        )
    return table


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
