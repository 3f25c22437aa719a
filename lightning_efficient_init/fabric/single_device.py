"""The single-device strategy for Fabric."""

from __future__ import annotations

import torch
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins import CheckpointIO, Precision
from lightning.fabric.strategies import SingleDeviceStrategy

from lightning_efficient_init.fabric.streaming import StreamsCheckpoints
from lightning_efficient_init.strategies.single_device import FollowsAcceleratorDevice


class EfficientSingleDeviceStrategy(FollowsAcceleratorDevice, StreamsCheckpoints, SingleDeviceStrategy):
    """One device, as ``Fabric(strategy="efficient_init")``: models are built in place and checkpoints stream.

    ``fabric.load_raw`` and ``fabric.load`` read every format that ``load_checkpoint`` does. What is not asked for, an
    optimizer's state say, comes back in a dict that reads it when somebody takes it out.

    Args:
        device: The device; by default the accelerator's.
        accelerator: See Lightning's ``SingleDeviceStrategy``.
        checkpoint_io: See Lightning's ``SingleDeviceStrategy``. One of your own also does the loading.
        precision: See Lightning's ``SingleDeviceStrategy``.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(
            device="cpu" if device is None else device,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision=precision,
        )
        self._is_device_chosen = device is not None
