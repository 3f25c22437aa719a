"""The single-device strategy for the Trainer."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_efficient_init.strategies.single_device import FollowsAcceleratorDevice
from lightning_efficient_init.trainer.streaming import StreamsCheckpoints


class EfficientSingleDeviceStrategy(FollowsAcceleratorDevice, StreamsCheckpoints, SingleDeviceStrategy):
    """One device, as ``Trainer(strategy="efficient_init")``: models are built in place and checkpoints stream.

    ``ckpt_path`` in ``fit``, ``validate``, ``test`` and ``predict`` streams; optimizer states are read by ``fit`` only.

    Args:
        device: The device; by default the accelerator's.
        accelerator: See Lightning's ``SingleDeviceStrategy``.
        checkpoint_io: See Lightning's ``SingleDeviceStrategy``. One of your own also does the loading.
        precision_plugin: See Lightning's ``SingleDeviceStrategy``.
    """

    strategy_name = "efficient_init"

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        accelerator: pl.accelerators.Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            device="cpu" if device is None else device,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self._is_device_chosen = device is not None
