"""What a load really takes; these functions run in processes of their own."""

from __future__ import annotations

import ctypes
import gc
import logging
import warnings

import lightning as L
import torch
from lightning.fabric.strategies import DeepSpeedStrategy

from lightning_efficient_init import EfficientInit
from lightning_efficient_init.memory import PeakMemory
from lightning_efficient_init.model_names import constructor_of
from lightning_efficient_init.quantize import QuantizedLayer

_M_MMAP_THRESHOLD = -3


def bytes_read():
    with open("/proc/self/io", "rb") as io:
        return int(next(line for line in io if line.startswith(b"rchar:")).split()[1])


def load(model, path, precision, accelerator, optimizer=None, quantize=None):
    """Build, load, and step once if there is an optimizer; peaks of the host, of the device, and bytes read."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    plugin = EfficientInit(precision, quantize=quantize)
    fabric = L.Fabric(accelerator=accelerator, devices=1, strategy="efficient_init", plugins=[plugin])
    construct = constructor_of(model)
    _warm_up(fabric.device, optimizer)
    before = bytes_read()
    with PeakMemory(in_background=True) as memory:
        with fabric.init_module(empty_init=True):
            module = construct()
        fabric.load_raw(path, module)
        read = bytes_read() - before
        assert any(isinstance(layer, QuantizedLayer) for layer in module.modules()) == (quantize is not None)
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


class Block(torch.nn.Sequential):
    """32 MiB at a width of 1024."""

    def __init__(self, width):
        up, down = torch.nn.Linear(width, 4 * width, bias=False), torch.nn.Linear(4 * width, width, bias=False)
        super().__init__(up, down)


class Blocks(torch.nn.Module):
    """Eight blocks, and a head that is in none."""

    def __init__(self, width=1024):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(8))
        self.head = torch.nn.Linear(width, 8 * width)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def load_on_rank(rank, strategy, world_size, path, optimizer=None):
    """Build, shard and load on one of several ranks, and train for two steps if there is an optimizer.

    Peak of the host, and bytes read.
    """
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)  # what is freed goes back to the system at once
    fabric = L.Fabric(accelerator="cpu", devices=world_size, strategy=strategy, precision="32-true")
    fabric.launch()
    # libraries that are imported at the first use are not what is measured
    _run_on_rank(fabric, lambda: Blocks(8), 8, None, optimizer)
    gc.collect()
    before = bytes_read()
    with PeakMemory(in_background=True) as memory:
        read = _run_on_rank(fabric, Blocks, 1024, path, optimizer) - before
    return memory.host_bytes, read


def _run_on_rank(fabric, construct, width, path, optimizer):
    with fabric.init_module(empty_init=True):
        module = construct()
    module, optimizer = _set_up(fabric, module, optimizer)
    if path is not None:
        fabric.load_raw(path, module)
    read = bytes_read()
    for _ in range(0 if optimizer is None else 2):
        fabric.backward(module(torch.ones(1, width)).sum(), model=module if _is_deepspeed(fabric) else None)
        optimizer.step()
    return read


def _set_up(fabric, module, make_optimizer):
    if make_optimizer is None:
        return fabric.setup(module), None
    if _is_deepspeed(fabric):  # takes both at once, and before parameters are parts
        return fabric.setup(module, make_optimizer(list(module.parameters())))
    module = fabric.setup_module(module)
    return module, fabric.setup_optimizers(make_optimizer(list(module.parameters())))


def _is_deepspeed(fabric):
    return isinstance(fabric.strategy, DeepSpeedStrategy)
