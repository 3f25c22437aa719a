"""What ``fully_shard`` (FSDP2) keeps beside the parameters, and has to be told when those get memory.

The attributes are private to torch and have had these names from 2.6 to 2.13 (``_fsdp_param_groups`` from 2.12 on).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn import Module


def settle(module: Module) -> None:
    """Let FSDP2 know the memory that its parameters have by now; it pads (and, if asked for, offloads and pins) it."""
    with torch.no_grad():
        for managed in _managed(module):
            managed.reset_sharded_param()


def offloaded(module: Module) -> set[int]:
    """Identities of the parameters that FSDP2 wants in the memory of the CPU."""
    return {id(managed.sharded_param) for managed in _managed(module) if managed.offload_to_cpu}


def reshard_managed(modules: Iterable[Module]) -> None:
    """Cut the parameters of ``modules`` again that a forward without a backward has left whole."""
    for module in modules:
        for hook in module._load_state_dict_pre_hooks.values():
            if is_fsdp2_hook(hook):  # which a module has also where it was sharded as a part of another
                hook()


def is_fsdp2_hook(hook: Any) -> bool:
    """Whether a hook before or after loading is FSDP2's own, which looks after memory and lets values be."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp._fully_shard.")


def _managed(module: Module) -> Iterator[Any]:
    for child in module.modules():
        get_state: Any = getattr(child, "_get_fsdp_state", None)
        if get_state is not None:
            state = get_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            for group in [state._fsdp_param_group] if groups is None else groups:
                yield from group.fsdp_params if group is not None else ()
