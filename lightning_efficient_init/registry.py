"""The names under which the strategies are known to Fabric and to the Trainer."""

from __future__ import annotations

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from lightning_efficient_init import fabric, trainer


def register_strategies() -> None:
    """Add the strategies to both of Lightning's registries."""
    description = "One device: models built in place, checkpoints streamed"
    for registry, library in ((STRATEGY_REGISTRY, fabric), (StrategyRegistry, trainer)):
        registry.register(
            "efficient_init", library.EfficientSingleDeviceStrategy, description=description, override=True
        )
