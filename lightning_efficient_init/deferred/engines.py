"""Sharding engines that are called while construction is recorded, as ``configure_model`` does.

They take tensors apart, which is no construction: what they do is not recorded, and the parts that they make remember
the window on the whole. It hangs on the storage of the (meta) part, as recipes hang on storages.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

from lightning_efficient_init.deferred import parameter
from lightning_efficient_init.deferred.recipe import Ref, recipe_of
from lightning_efficient_init.patching import ScopedPatch, patching
from lightning_efficient_init.sharding import is_dtensor

_WINDOW = "_efficient_init_whole"


def unrecorded_engines() -> AbstractContextManager[None]:
    """Let ``fully_shard`` and tensor parallelism work on what is deferred."""
    return patching(_patches())


def window_of(tensor: Any) -> Ref | None:
    """The window on a recipe's memory that a deferred tensor is, or is a part of; None for any other."""
    if not isinstance(tensor, torch.Tensor):
        return None
    with torch._C.DisableTorchFunction():
        if not tensor.is_meta:
            return None
        if is_dtensor(tensor):
            return tensor._local_tensor.untyped_storage().__dict__.get(_WINDOW)
        recipe = recipe_of(tensor)
        return None if recipe is None else Ref.to(tensor, recipe)


@cache
def _patches() -> tuple[ScopedPatch, ...]:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam  # noqa: PLC0415 (slow to import)
    from torch.distributed.tensor import _api  # noqa: PLC0415
    from torch.distributed.tensor.parallel import style  # noqa: PLC0415

    return (
        ScopedPatch(FSDPParam, "_init_sharded_param", _init_sharded),
        ScopedPatch(_api, "distribute_tensor", _distribute),
        ScopedPatch(style, "distribute_tensor", _distribute),
    )


def _init_sharded(original: Callable[..., None], managed: Any, param: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    window = window_of(param)
    if window is None:
        original(managed, param, *args, **kwargs)
        return
    with parameter.undisturbed():
        parameter.unguard(param)
        original(managed, param, *args, **kwargs)
        managed.sharded_param._local_tensor.untyped_storage().__dict__[_WINDOW] = window


def _distribute(original: Callable[..., Any], tensor: Any, *args: Any, **kwargs: Any) -> Any:
    window = window_of(tensor)
    if window is None:
        return original(tensor, *args, **kwargs)
    with parameter.undisturbed():
        parameter.unguard(tensor)
        made = original(tensor, *args, **kwargs)
        made._local_tensor.untyped_storage().__dict__[_WINDOW] = window
    return made
