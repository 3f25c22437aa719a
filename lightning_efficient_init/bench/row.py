"""One row, measured; this runs in a process of its own."""

from __future__ import annotations

import importlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_efficient_init.bench.files import stored_weights
from lightning_efficient_init.bench.task import Task
from lightning_efficient_init.bench.ways import WAYS
from lightning_efficient_init.load.bind import named_state
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
        device_end_bytes: What is allocated there in the end.
        host_bytes: Growth of anonymous memory at its highest.
        mapped_bytes: Growth of resident pages of mapped files at its highest.
        is_equal: Whether every value is that of the file, or what bitsandbytes makes of it; None where it was not
            compared.
    """

    way: str
    cache: str
    build_s: float | None
    load_s: float
    total_s: float
    ends_on: str
    device_bytes: int
    device_end_bytes: int
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
    model, marks, memory = _timed(steps, task)
    is_cuda = task.accelerator == "cuda"
    return Row(
        way=name,
        cache=cache,
        build_s=marks[1] - marks[0] if len(marks) > 2 else None,
        load_s=marks[-1] - marks[-2],
        total_s=marks[-1] - marks[0],
        ends_on=str(next(model.parameters()).device),
        device_bytes=torch.cuda.max_memory_allocated() if is_cuda else 0,
        device_end_bytes=torch.cuda.memory_allocated() if is_cuda else 0,
        host_bytes=memory.host_bytes,
        mapped_bytes=memory.mapped_bytes,
        is_equal=_is_equal(model, stored_weights(task)) if check else None,
    )


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


def _is_equal(model: Module, weights: Mapping[str, Tensor]) -> bool:
    found = named_state(model)
    return found.keys() == weights.keys() and all(_holds(found[name], weights[name]) for name in weights)


def _holds(found: Tensor, weight: Tensor) -> bool:
    """Whether a tensor has these values, or what bitsandbytes' own functions make of them."""
    weight = weight.to(found.device)
    if found.dtype == torch.int8:
        expected = _bitsandbytes().int8_vectorwise_quant(weight.half())[0]
    elif (state := getattr(found, "quant_state", None)) is not None:
        expected = _bitsandbytes().quantize_4bit(
            weight.to(state.dtype), blocksize=state.blocksize, quant_type=state.quant_type
        )[0]
    else:
        expected = weight.to(found.dtype)
    return torch.equal(found.detach(), expected)


def _bitsandbytes() -> Any:
    """Its functions; it is imported for rows that quantize only."""
    return importlib.import_module("bitsandbytes.functional")


def _be_quiet() -> None:
    """Only for a process that measures: nothing of what libraries print is part of the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
