"""Efficient initialization of large models for PyTorch Lightning."""

from __future__ import annotations

from lightning_efficient_init.deferred import (
    deferred_init,
    eager,
    is_deferred,
    materialize,
    uninitialized_parameters,
)
from lightning_efficient_init.load import LoadPlan, LoadReport, load_checkpoint, plan_load
from lightning_efficient_init.memory_plan import MemoryPlan, plan_memory
from lightning_efficient_init.precision import EfficientInit
from lightning_efficient_init.registry import register_strategies
from lightning_efficient_init.trainer import ConfigureModelMixin

__version__ = "0.1.0"

__all__ = [
    "ConfigureModelMixin",
    "EfficientInit",
    "LoadPlan",
    "LoadReport",
    "MemoryPlan",
    "deferred_init",
    "eager",
    "is_deferred",
    "load_checkpoint",
    "materialize",
    "plan_load",
    "plan_memory",
    "uninitialized_parameters",
]

register_strategies()
