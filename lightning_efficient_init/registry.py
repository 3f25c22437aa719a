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
    "efficient_init_deepspeed_stage_3": "DeepSpeed ZeRO-3: each rank builds and reads its part of the model",
    "efficient_init_deepspeed_stage_3_offload": "DeepSpeed ZeRO-3 that keeps its part in the memory of the CPU",
}
_CLASSES = {
    "efficient_init": "EfficientSingleDeviceStrategy",
    "efficient_init_ddp": "EfficientDDPStrategy",
    "efficient_init_fsdp": "EfficientFSDPStrategy",
    "efficient_init_fsdp2": "EfficientFSDP2Strategy",
    "efficient_init_deepspeed_stage_3": "EfficientDeepSpeedStrategy",
    "efficient_init_deepspeed_stage_3_offload": "EfficientDeepSpeedStrategy",
}
_OPTIONS = {"efficient_init_deepspeed_stage_3_offload": {"offload_optimizer": True, "offload_parameters": True}}


def register_strategies() -> None:
    """Add the strategies to both of Lightning's registries."""
    for registry, library in ((STRATEGY_REGISTRY, fabric), (StrategyRegistry, trainer)):
        for name, description in _DESCRIPTIONS.items():
            cls, options = getattr(library, _CLASSES[name]), _OPTIONS.get(name, {})
            registry.register(name, cls, description=description, override=True, **options)
