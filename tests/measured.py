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
