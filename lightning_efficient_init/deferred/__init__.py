"""Deferred construction: record how a module is built, give it memory and values later, exactly."""

from __future__ import annotations

from lightning_efficient_init.deferred.audit import UninitializedParameterWarning, uninitialized_parameters, watch
from lightning_efficient_init.deferred.materialize import (
    allocate,
    forget,
    has_recipe,
    initialize,
    is_deferred,
    materialize,
    settle,
)
from lightning_efficient_init.deferred.parameter import undisturbed
from lightning_efficient_init.deferred.record import deferred_init, eager, empty_init, layerwise_init, recording

__all__ = [
    "UninitializedParameterWarning",
    "allocate",
    "deferred_init",
    "eager",
    "empty_init",
    "forget",
    "has_recipe",
    "initialize",
    "is_deferred",
    "layerwise_init",
    "materialize",
    "recording",
    "settle",
    "undisturbed",
    "uninitialized_parameters",
    "watch",
]
