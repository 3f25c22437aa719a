"""One row, measured; this runs in a process of its own."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import Module

from lightning_efficient_init.bench.files import stored_weights
from lightning_efficient_init.bench.task import Task
from lightning_efficient_init.bench.ways import WAYS, Way
from lightning_efficient_init.memory import PeakMemory


@dataclass(frozen=True, slots=True)
class Row:
    """What one run of one way took.

    Attributes:
        way: Its name.
        cache: "warm": the files were in the page cache; "cold": they were not.
        build_s: Seconds to build the model, or None where that is one step with loading.
        load_s: Seconds from there to the last value in place.
        total_s: Seconds of both.
        ends_on: The device that the model is on afterwards.
        device_bytes: Most memory allocated on the device; 0 on a CPU.
        host_bytes: Growth of anonymous memory at its highest.
        mapped_bytes: Growth of resident pages of mapped files at its highest.
        is_equal: Whether every value is that of the file; None where it was not compared, or cannot be.
    """

    way: str
    cache: str
    build_s: float | None
    load_s: float
    total_s: float
    ends_on: str
    device_bytes: int
    host_bytes: int
    mapped_bytes: int
    is_equal: bool | None


def measure(name: str, task: Task, cache: str, *, check: bool) -> Row:
    """Build and load in one way.

    The clock starts with libraries imported and CUDA initialized, and stops when all values are in place.
    """
    _be_quiet()
    way = WAYS[name]
    for package in way.packages:
        importlib.import_module(package)
    if task.accelerator == "cuda":
        torch.zeros(1, device=task.device)
    steps = way.run(task)
    next(steps)
    gc.collect()
    model, marks, memory = _timed(steps, task)
    result = Row(
        way=name,
        cache=cache,
        build_s=marks[1] - marks[0] if len(marks) > 2 else None,
        load_s=marks[-1] - marks[-2],
        total_s=marks[-1] - marks[0],
        ends_on=str(next(model.parameters()).device),
        device_bytes=torch.cuda.max_memory_allocated() if task.accelerator == "cuda" else 0,
        host_bytes=memory.host_bytes,
        mapped_bytes=memory.mapped_bytes,
        is_equal=_is_equal(model, way, task) if check else None,
    )
    return result


def _timed(steps: Iterator[Module | None], task: Task) -> tuple[Module, list[float], PeakMemory]:
    model, marks = None, [time.perf_counter()]
    with PeakMemory(in_background=True) as memory:  # the device keeps count itself
        for step in steps:
            model = step
            if task.accelerator == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
    assert model is not None
    return model, marks, memory


def _is_equal(model: Module, way: Way, task: Task) -> bool | None:
    if not way.is_exact:
        return None
    state, weights = model.state_dict(), stored_weights(task)
    return state.keys() == weights.keys() and all(
        torch.equal(state[key], value.to(state[key])) for key, value in weights.items()
    )


def _be_quiet() -> None:
    """Only for a process that measures: nothing of what libraries print is part of the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
