"""Deferred construction: record how a module is built, give it memory and values later, exactly."""

from __future__ import annotations

from lightning_efficient_init.deferred.answers import know_mode
from lightning_efficient_init.deferred.audit import uninitialized_parameters
from lightning_efficient_init.deferred.distribute import (
    distribute,
    equalize,
    fill_own,
    initialize_required,
    keep_recipes,
    move_whole,
    prepare,
    share_buffers,
)
from lightning_efficient_init.deferred.engines import unrecorded_engines
from lightning_efficient_init.deferred.materialize import (
    allocate,
    claim,
    forget,
    has_recipe,
    have_recipes,
    initialize,
    is_deferred,
    is_postponed,
    materialize,
    settle,
)
from lightning_efficient_init.deferred.parameter import undisturbed
from lightning_efficient_init.deferred.reach import hidden_parameters, named_tensors
from lightning_efficient_init.deferred.record import (
    deferred_init,
    eager,
    empty_init,
    layerwise_init,
    postponed_init,
    recording,
)
from lightning_efficient_init.deferred.watch import UninitializedParameterWarning, look, watch

__all__ = [
    "UninitializedParameterWarning",
    "allocate",
    "claim",
    "deferred_init",
    "distribute",
    "eager",
    "empty_init",
    "equalize",
    "fill_own",
    "forget",
    "has_recipe",
    "have_recipes",
    "hidden_parameters",
    "initialize",
    "initialize_required",
    "is_deferred",
    "is_postponed",
    "keep_recipes",
    "know_mode",
    "layerwise_init",
    "look",
    "materialize",
    "move_whole",
    "named_tensors",
    "postponed_init",
    "prepare",
    "recording",
    "settle",
    "share_buffers",
    "undisturbed",
    "uninitialized_parameters",
    "unrecorded_engines",
    "watch",
]
