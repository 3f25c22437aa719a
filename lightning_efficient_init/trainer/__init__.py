"""Strategies for the Trainer."""

from __future__ import annotations

from lightning_efficient_init.trainer.ddp import EfficientDDPStrategy
from lightning_efficient_init.trainer.fsdp import EfficientFSDPStrategy
from lightning_efficient_init.trainer.fsdp2 import EfficientFSDP2Strategy
from lightning_efficient_init.trainer.single_device import EfficientSingleDeviceStrategy

__all__ = ["EfficientDDPStrategy", "EfficientFSDP2Strategy", "EfficientFSDPStrategy", "EfficientSingleDeviceStrategy"]
