"""Checkpoints that are loaded into a module before a strategy has sharded it: checked at once, read afterwards.

Reading at once would take the memory of the whole model on every rank. So the plan, which has been checked, waits with
the module. When the module has been sharded its tensors are others, under the names that they had.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch.nn import Module

from lightning_efficient_init.deferred import claim, is_postponed
from lightning_efficient_init.errors import CheckpointError
from lightning_efficient_init.load.bind import Binding, named_state
from lightning_efficient_init.load.keys import strip_wrappers
from lightning_efficient_init.load.pipeline import Settings
from lightning_efficient_init.load.plan import LoadPlan
from lightning_efficient_init.load.report import LoadReport

_V = TypeVar("_V")
_orders = itertools.count()


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    order: int
    plan: LoadPlan
    settings: Settings


_waiting: weakref.WeakKeyDictionary[Module, list[_Waiting]] = weakref.WeakKeyDictionary()


def must_wait(plan: LoadPlan) -> bool:
    """Whether the module that ``plan`` is for has yet to be sharded."""
    tensors = map(plan.binding.tensors.__getitem__, _names(plan.binding))
    with torch._C.DisableTorchFunction():  # while construction is recorded, a deferred tensor hides where it is
        return any(map(is_postponed, [tensor for tensor in tensors if tensor.is_meta]))


def postpone(plan: LoadPlan, settings: Settings, *, mmap: bool = False) -> LoadReport:
    """Keep a plan until its module has been sharded.

    Returns:
        What is going to be loaded; nothing has been read.

    Raises:
        CheckpointError: Parameters were to be mappings of the file, which parts of tensors cannot be.
    """
    if mmap:
        raise CheckpointError(
            f"{plan.path}: mmap=True makes parameters of the file's own pages, and this model is going to be sharded. "
            "Load it with mmap=False; each rank reads no more than its part."
        )
    binding = plan.binding
    claim((binding.tensors[name] for name in _names(binding)), plan.path)
    bare = replace(plan, binding=replace(binding, module=Module()))  # what waits for a module does not keep it alive
    _waiting.setdefault(binding.module, []).append(_Waiting(next(_orders), bare, settings))
    return LoadReport(
        loaded=tuple(_names(binding)),
        initialized=(),
        missing=plan.missing,
        unexpected=plan.unexpected,
        mismatched=tuple(plan.mismatched),
        num_bytes=0,
        elapsed_s=0.0,
        peak_host_bytes=0,
        peak_device_bytes=0,
        is_postponed=True,
    )


def has_waiting(module: Module) -> bool:
    """Whether plans wait for ``module``, or for what is in it."""
    return any(child in _waiting for child in module.modules())


def take_waiting(module: Module) -> list[tuple[LoadPlan, Settings]]:
    """The plans that have waited for ``module``, in order, for the tensors that it has now.

    Raises:
        CheckpointReadError: A file of theirs has been replaced, or is gone.
    """
    found = [(waiting, child) for child in module.modules() for waiting in _waiting.pop(child, [])]
    for waiting, _ in found:
        waiting.plan.seal.check_all()
    found.sort(key=lambda one: one[0].order)
    return [(_renewed(waiting.plan, child), waiting.settings) for waiting, child in found]


def _renewed(plan: LoadPlan, module: Module) -> LoadPlan:
    """The same plan for the tensors that ``module`` has now."""
    binding = plan.binding
    now = {strip_wrappers(name): (name, tensor) for name, tensor in named_state(module).items()}
    names = {old: now[strip_wrappers(old)][0] for old in binding.tensors}
    fresh = replace(
        binding,
        module=module,
        tensors={names[old]: now[strip_wrappers(old)][1] for old in binding.tensors},
        entries=_renamed(binding.entries, names),
        direct={},
        values=_renamed(binding.values, names),
        loaded_by_calls=[names[name] for name in binding.loaded_by_calls],
    )
    return replace(plan, binding=fresh, entries=fresh.entries)


def _renamed(values: Mapping[str, _V], names: Mapping[str, str]) -> dict[str, _V]:
    return {names[old]: value for old, value in values.items()}


def _names(binding: Binding) -> list[str]:
    return [*binding.entries, *binding.values, *binding.loaded_by_calls]
