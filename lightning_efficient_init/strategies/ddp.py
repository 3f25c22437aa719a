"""What Fabric's and the Trainer's DDP strategies share."""

from __future__ import annotations

import torch
from torch import distributed
from torch.nn import Module

from lightning_efficient_init.deferred import equalize, is_deferred, materialize
from lightning_efficient_init.errors import QuantizationError, shorten
from lightning_efficient_init.load.replicas import Replicas, replicas_over, replicate
from lightning_efficient_init.quantize import QuantizedParameter
from lightning_efficient_init.rendezvous import agree, exchange


class HasReplicas:
    """A strategy whose ranks load together, whether each has the whole model or a part of it."""

    def replicas(self) -> Replicas | None:
        """All ranks, once there are processes."""
        return replicas_over(distributed.group.WORLD) if distributed.is_initialized() else None


def replicate_module(module: Module, device: torch.device) -> None:
    """Make ``module``, on ``device``, one of equal ones: what is not written yet is going to be as on rank 0.

    Of what has been written ``DistributedDataParallel`` takes care, which copies rank 0's memory.
    """
    assert distributed.group.WORLD is not None
    replicate(module, distributed.group.WORLD)
    with agree():
        equalize(module, device)


def share_quantized(module: Module) -> None:
    """Give every rank rank 0's quantized weights: of their statistics ``DistributedDataParallel`` does not know.

    Raises:
        QuantizationError: The ranks have quantized different weights.
    """
    params = dict(sorted(module.named_parameters()))
    weights = {name: param for name, param in params.items() if isinstance(param, QuantizedParameter)}
    _confirm({name: f"{param.packing.mode} of shape {param.packing.shape}" for name, param in weights.items()})
    for param in weights.values():
        for part in param.parts().values():
            distributed.broadcast(part, src=0)


def _confirm(mine: dict[str, str]) -> None:
    """Raise, on all ranks, unless all of them have quantized the same weights in the same way."""
    first, *others = exchange(mine)
    rank, theirs = next(((rank, other) for rank, other in enumerate(others, 1) if other != first), (0, first))
    if not rank:
        return
    differing = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
    here, there = (found.get(differing[0], "not quantized") for found in (first, theirs))
    raise QuantizationError(
        f"Rank {rank} has quantized other weights than rank 0: {shorten(differing)}. {differing[0]!r} is {here} on "
        f"rank 0, and {there} on rank {rank}. Build the same model on every rank, with the same "
        "EfficientInit(quantize=..., skip_modules=...)."
    )


def to_device(module: Module, device: torch.device) -> None:
    """Move a module; one whose construction was only recorded is built there."""
    if is_deferred(module):
        materialize(module, device=device)
    module.to(device)
