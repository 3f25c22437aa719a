"""Strategies for Fabric."""

from __future__ import annotations

from lightning_efficient_init.fabric.ddp import EfficientDDPStrategy
from lightning_efficient_init.fabric.deepspeed import EfficientDeepSpeedStrategy
from lightning_efficient_init.fabric.fsdp import EfficientFSDPStrategy
from lightning_efficient_init.fabric.fsdp2 import EfficientFSDP2Strategy
from lightning_efficient_init.fabric.single_device import EfficientSingleDeviceStrategy

__all__ = [
    "EfficientDDPStrategy",
    "EfficientDeepSpeedStrategy",
    "EfficientFSDP2Strategy",
    "EfficientFSDPStrategy",
    "EfficientSingleDeviceStrategy",
]
