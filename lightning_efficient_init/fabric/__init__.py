"""Strategies for Fabric."""

from __future__ import annotations

from lightning_efficient_init.fabric.ddp import EfficientDDPStrategy
from lightning_efficient_init.fabric.single_device import EfficientSingleDeviceStrategy

__all__ = ["EfficientDDPStrategy", "EfficientSingleDeviceStrategy"]
