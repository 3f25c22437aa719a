"""The names under which the strategies are known to Fabric and to the Trainer."""

from __future__ import annotations

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from lightning_efficient_init import fabric, trainer

_DESCRIPTIONS = {
    "efficient_init": "One device: models built in place, checkpoints streamed",
    "efficient_init_ddp": "DDP: models built in place, checkpoints read once on each node",
    "efficient_init_fsdp": "FSDP: each rank builds and reads its part of the model",
    "efficient_init_fsdp2": "FSDP2: each rank builds and reads its part of the model",
}
_CLASSES = {
    "efficient_init": "EfficientSingleDeviceStrategy",
    "efficient_init_ddp": "EfficientDDPStrategy",
    "efficient_init_fsdp": "EfficientFSDPStrategy",
    "efficient_init_fsdp2": "EfficientFSDP2Strategy",
}


def register_strategies() -> None:
    """Add the strategies to both of Lightning's registries."""
    for registry, library in ((STRATEGY_REGISTRY, fabric), (StrategyRegistry, trainer)):
        for name, description in _DESCRIPTIONS.items():
            registry.register(name, getattr(library, _CLASSES[name]), description=description, override=True)
