"""What a load really takes; these functions run in processes of their own."""

from __future__ import annotations

import gc
import logging
import warnings

import lightning as L
import torch

from lightning_efficient_init import EfficientInit
from lightning_efficient_init.memory import PeakMemory
from lightning_efficient_init.model_names import constructor_of


def bytes_read():
    with open("/proc/self/io", "rb") as io:
        return int(next(line for line in io if line.startswith(b"rchar:")).split()[1])


def load(model, path, precision, accelerator, optimizer=None):
    """Build, load, and step once if there is an optimizer; peaks of the host, of the device, and bytes read."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    fabric = L.Fabric(accelerator=accelerator, devices=1, strategy="efficient_init", plugins=[EfficientInit(precision)])
    construct = constructor_of(model)
    _warm_up(fabric.device, optimizer)
    before = bytes_read()
    with PeakMemory(in_background=True) as memory:
        with fabric.init_module(empty_init=True):
            module = construct()
        fabric.load_raw(path, module)
        read = bytes_read() - before
        if optimizer is not None:
            step = optimizer(list(module.parameters()))
            for parameter in module.parameters():
                parameter.grad = torch.ones_like(parameter)
            step.step()
    device_peak = torch.cuda.max_memory_allocated() if accelerator == "cuda" else 0
    return memory.host_bytes, device_peak, read


def _warm_up(device, optimizer):
    """Libraries that are imported at the first step are not what is measured."""
    parameter = torch.nn.Parameter(torch.zeros(2, device=device))
    if optimizer is not None:
        parameter.grad = torch.zeros_like(parameter)
        optimizer([parameter]).step()
    gc.collect()


class Blocks(torch.nn.Module):
    """Eight blocks of 32 MiB, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(2048, 4096, bias=False) for _ in range(8))
        self.head = torch.nn.Linear(2048, 100)


def load_on_rank(rank, strategy, world_size, path):
    """Build, shard and load on one of several ranks; peak of the host, and bytes read."""
    warnings.simplefilter("ignore")
    fabric = L.Fabric(accelerator="cpu", devices=world_size, strategy=strategy, precision="32-true")
    fabric.launch()
    with fabric.init_module(empty_init=True):
        small = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    fabric.setup(small)  # libraries that are imported at the first use are not what is measured
    gc.collect()
    before = bytes_read()
    with PeakMemory(in_background=True) as memory:
        with fabric.init_module(empty_init=True):
            module = Blocks()
        module = fabric.setup(module)
        fabric.load_raw(path, module)
        read = bytes_read() - before
    return memory.host_bytes, read
