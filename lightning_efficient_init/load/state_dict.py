"""``module.load_state_dict`` with lazy tensors: the same rules, one pass of the pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.module import _IncompatibleKeys

from lightning_efficient_init.checkpoint import LazyTensor, Seal
from lightning_efficient_init.deferred import eager
from lightning_efficient_init.errors import DeferredParameterError, shorten
from lightning_efficient_init.garbage import collections_paused
from lightning_efficient_init.load.bind import bind
from lightning_efficient_init.load.load import run_plan
from lightning_efficient_init.load.own_code import read_attributes
from lightning_efficient_init.load.pipeline import Settings
from lightning_efficient_init.load.plan import LoadPlan, check
from lightning_efficient_init.load.replicas import agreed, replicas_of
from lightning_efficient_init.load.tree import read_tree
from lightning_efficient_init.patching import ScopedPatch

log = logging.getLogger(__name__)


@collections_paused()
def _load_lazy(
    original: Callable[..., Any],
    module: Module,
    state_dict: Mapping[str, Any],
    strict: bool = True,
    assign: bool = False,
) -> Any:
    """Stream the lazy tensors of ``state_dict``; a state dict without any goes to ``original``."""
    entries = [value.entry for value in state_dict.values() if isinstance(value, LazyTensor)]
    if not entries:
        return original(module, state_dict, strict, assign)
    path = next((entry.file for entry in entries if entry is not None), "The state dict")
    replicas = replicas_of(module)
    with eager(), agreed(replicas):
        read_attributes(module)  # that hooks of the user have taken out of the checkpoint
        _check_memory(module)
        if assign:
            device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
            return original(
                module,
                read_tree(state_dict if isinstance(state_dict, dict) else dict(state_dict), device),
                strict,
                assign,
            )
        binding = bind(module, state_dict, getattr(state_dict, "_metadata", None))
        check(binding, path, strict=strict)
        plan = LoadPlan(
            path=path,
            format="state dict",
            entries=binding.entries,
            missing=tuple(binding.missing),
            unexpected=tuple(binding.unexpected),
            mismatched=binding.mismatched,
            binding=binding,
            seal=Seal.of(binding.entries.values()),
        )
        log.info("%s: %s", path, run_plan(plan, Settings(), replicas=replicas))
    return _IncompatibleKeys(list(plan.missing), list(plan.unexpected))


def _check_memory(module: Module) -> None:
    """Raise for parameters that point into nowhere: C++ takes a lazy tensor for ``p.data = x``, and nobody is asked."""
    with torch._C.DisableTorchFunction():
        lost = [name for name, p in module.named_parameters() if not p.is_meta and _has_lost_its_memory(p)]
    if lost:
        raise DeferredParameterError(
            f"{shorten(lost)}: expected memory, found that .data was set to a tensor of the checkpoint, which is not "
            "read before it is used. Set it to a copy, p.data = x.clone(), or make a parameter of it."
        )


def _has_lost_its_memory(param: torch.Tensor) -> bool:
    if type(param) is not torch.nn.Parameter or param.layout is not torch.strided or not param.numel():
        return False
    storage = param.untyped_storage()
    try:
        return storage.nbytes() > 0 and storage.data_ptr() == 0
    except RuntimeError:  # the storage is a wrapper's, which never has any
        return True


#: Open while Lightning hands lazy state dicts to modules.
streaming_load_state_dict = ScopedPatch(Module, "load_state_dict", _load_lazy)
