"""What Fabric's and the Trainer's DDP strategies share."""

from __future__ import annotations

import torch
from torch import distributed
from torch.nn import Module

from lightning_efficient_init.deferred import is_deferred, materialize, reseed, seeds
from lightning_efficient_init.load.replicas import Replicas, replicas_over, replicate
from lightning_efficient_init.quantize import QuantizedParameter
from lightning_efficient_init.rendezvous import exchange


class HasReplicas:
    """A strategy whose ranks load together, whether each has the whole model or a part of it."""

    def replicas(self) -> Replicas | None:
        """All ranks, once there are processes."""
        return replicas_over(distributed.group.WORLD) if distributed.is_initialized() else None


def replicate_module(module: Module) -> None:
    """Make ``module`` one of equal ones: what is not written yet draws from rank 0's generators, on every rank."""
    assert distributed.group.WORLD is not None
    replicate(module, distributed.group.WORLD)
    _share_quantized(module)
    states = exchange(seeds(module))
    if distributed.get_rank():
        reseed(module, states[0])


def _share_quantized(module: Module) -> None:
    """Give every rank rank 0's quantized weights: of their statistics ``DistributedDataParallel`` does not know."""
    for param in module.parameters():
        if isinstance(param, QuantizedParameter):
            for part in param.parts().values():
                distributed.broadcast(part, src=0)


def to_device(module: Module, device: torch.device) -> None:
    """Move a module; one whose construction was only recorded is built there."""
    if is_deferred(module):
        materialize(module, device=device)
    module.to(device)
