"""Recurrent layers: cuDNN wants the weights of one layer in one piece of memory.

``nn.LSTM`` and its kin see to that when they are built, moved or cast, by looking at addresses, which deferred weights
do not have. So nothing is done while any weight is deferred, and it is made good when all of them have memory. The
values are the same either way; without it cuDNN copies the weights at each forward, with a warning.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from lightning_efficient_init.deferred.recipe import Recipe, recipe_of


def flatten_unless_deferred(original: Callable[..., None], layer: torch.nn.RNNBase, *args: Any, **kwargs: Any) -> None:
    """In the place of ``RNNBase.flatten_parameters`` while somebody records."""
    with torch._C.DisableTorchFunction():
        is_deferred = any(recipe is not None for recipe in _recipes(layer))
    if not is_deferred:
        original(layer, *args, **kwargs)


def scattered(modules: Iterable[torch.nn.Module]) -> list[torch.nn.RNNBase]:
    """The recurrent layers with deferred weights, of which nothing else shows the memory."""
    layers = [module for module in modules if isinstance(module, torch.nn.RNNBase)]
    with torch._C.DisableTorchFunction():
        return [layer for layer in layers if _is_scattered(_recipes(layer))]


def remember(layers: Iterable[torch.nn.RNNBase]) -> None:
    """Let the recipes of layers that are `scattered` know, for weights that come by memory one by one."""
    for layer in layers:
        for recipe in _recipes(layer):
            if recipe is not None:
                recipe.layer = weakref.ref(layer)


def flatten(layers: Iterable[torch.nn.RNNBase]) -> None:
    """Bring the weights of layers that were `scattered` together, where cuDNN is to use them."""
    with torch._C.DisableTorchFunction():
        for layer in layers:
            if not any(isinstance(weight, torch.Tensor) and weight.is_meta for weight in layer._flat_weights):
                layer.flatten_parameters()


def _is_scattered(recipes: list[Recipe | None]) -> bool:
    deferred = [recipe for recipe in recipes if recipe is not None]
    return bool(deferred) and not any(len(recipe.aliases) > 1 for recipe in deferred)


def _recipes(layer: torch.nn.RNNBase) -> list[Recipe | None]:
    """Those of the layer's weights that are deferred."""
    weights = getattr(layer, "_flat_weights", ())
    return [recipe_of(weight) if isinstance(weight, torch.Tensor) and weight.is_meta else None for weight in weights]
