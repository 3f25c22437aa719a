"""The DDP strategy for the Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from lightning_efficient_init.deferred import deferred_init
from lightning_efficient_init.load.replicas import replicate, replicating
from lightning_efficient_init.strategies.ddp import HasReplicas, replicate_module, share_quantized, to_device
from lightning_efficient_init.trainer.streaming import StreamsCheckpoints


class EfficientDDPStrategy(HasReplicas, StreamsCheckpoints, DDPStrategy):
    """A model on each device, as ``Trainer(strategy="efficient_init_ddp")``.

    Models are built in place on every rank, and end up with the values of rank 0. ``ckpt_path`` is read once on each
    node: every rank reads its share of the bytes and gives them to the others; what fails on one rank fails on all.

    ``trainer.init_module()`` works before there are processes. Where they will be forked, construction is only
    recorded, so that the parent process has no use for a GPU; where they will be spawned, the model is built on the
    CPU, from where it is handed to them.

    It takes the arguments of Lightning's ``DDPStrategy``.
    """

    strategy_name = "efficient_init_ddp"

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Construct modules on the device, in the precision, empty if asked for; checkpoints stream into them."""
        group = distributed.group.WORLD if distributed.is_initialized() else None
        if self._start_method == "popen" or group is not None:
            with super().tensor_init_context(empty_init), nullcontext() if group is None else replicating(group):
                yield
            return
        is_forked = self._start_method == "fork"
        devices, self.parallel_devices = self.parallel_devices, [torch.device("cpu")] * self.num_processes
        try:  # never empty: recorded construction need not be, and recipes cannot be handed to spawned processes
            with deferred_init() if is_forked else nullcontext(), super().tensor_init_context(empty_init=False):
                yield
        finally:
            self.parallel_devices = devices

    def setup(self, trainer: pl.Trainer) -> None:
        """Wrap the module to train it; every rank gets the values of rank 0, also those yet to be initialized."""
        assert self.model is not None
        replicate_module(self.model, self.root_device)
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move the module; one whose construction was only recorded is built on the device, and quantized there."""
        assert self.model is not None
        to_device(self.model, self.root_device)
        share_quantized(self.model)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Stream the weights through the module's own ``load_state_dict``."""
        assert self.lightning_module is not None
        assert distributed.group.WORLD is not None
        replicate(self.lightning_module, distributed.group.WORLD)
        super().load_model_state_dict(checkpoint, strict=strict)
