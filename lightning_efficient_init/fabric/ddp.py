"""The DDP strategy for Fabric."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from lightning.fabric.strategies import DDPStrategy
from torch import distributed
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient_init.fabric.streaming import StreamsCheckpoints
from lightning_efficient_init.load.replicas import replicating
from lightning_efficient_init.strategies.ddp import HasReplicas, replicate_module, share_quantized, to_device


class EfficientDDPStrategy(HasReplicas, StreamsCheckpoints, DDPStrategy):
    """A model on each device, as ``Fabric(strategy="efficient_init_ddp")``.

    Models are built in place on every rank, and end up with the values of rank 0. Checkpoints are read once on each
    node: every rank reads its share of the bytes and gives them to the others. So all ranks have to take part when a
    checkpoint is loaded (``fabric.load``, ``fabric.load_raw``, or ``load_checkpoint`` with a model from
    ``init_module`` or ``setup``); what fails on one rank fails on all.

    It takes the arguments of Lightning's ``DDPStrategy``.
    """

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Construct modules on the device, in the precision, empty if asked for; checkpoints stream into them."""
        group = distributed.group.WORLD if distributed.is_initialized() else None
        with super().module_init_context(empty_init), nullcontext() if group is None else replicating(group):
            yield

    def module_to_device(self, module: Module) -> None:
        """Move the module; one whose construction was only recorded is built on the device."""
        to_device(module, self.root_device)

    def setup_module(self, module: Module) -> DistributedDataParallel:
        """Wrap the module; every rank gets the values of rank 0, also those that are yet to be initialized."""
        replicate_module(module, self.root_device)
        share_quantized(module)
        return super().setup_module(module)  # type: ignore[return-value]
