"""Strategies for the Trainer, and what LightningModules can inherit."""

from __future__ import annotations

from lightning_efficient_init.trainer.ddp import EfficientDDPStrategy
from lightning_efficient_init.trainer.deepspeed import EfficientDeepSpeedStrategy
from lightning_efficient_init.trainer.fsdp import EfficientFSDPStrategy
from lightning_efficient_init.trainer.fsdp2 import EfficientFSDP2Strategy
from lightning_efficient_init.trainer.mixin import ConfigureModelMixin
from lightning_efficient_init.trainer.single_device import EfficientSingleDeviceStrategy

__all__ = [
    "ConfigureModelMixin",
    "EfficientDDPStrategy",
    "EfficientDeepSpeedStrategy",
    "EfficientFSDP2Strategy",
    "EfficientFSDPStrategy",
    "EfficientSingleDeviceStrategy",
]
