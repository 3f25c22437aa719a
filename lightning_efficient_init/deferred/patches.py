"""Patches: what no mode sees. They are there while any thread records, and act in those that do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from lightning_efficient_init.deferred import recurrent
from lightning_efficient_init.deferred.active import current
from lightning_efficient_init.deferred.arguments import is_deferred
from lightning_efficient_init.deferred.parameter import undisturbed
from lightning_efficient_init.deferred.reach import named_tensors
from lightning_efficient_init.deferred.recipe import recipe_of
from lightning_efficient_init.deferred.wording import misuse
from lightning_efficient_init.patching import ScopedPatch, patching


def patched() -> AbstractContextManager[None]:
    """All of them."""
    return patching(_PATCHES)


def _new_parameter(original: Callable[..., Any], cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
    recorder = current()
    if recorder is None or recorder.paused:
        return original(cls, data, requires_grad)
    if type(data) in (torch.Tensor, torch.nn.Parameter):
        data = recorder.defer(data)
    made = original(cls, data, requires_grad)
    if isinstance(made, torch.Tensor):
        with torch._C.DisableTorchFunction():
            recorder.adopt(made)
    return made


def _trunc_normal(original: Callable[..., Any], tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """Since torch 2.13 it draws until all values are in range: a loop on values, recorded whole."""
    recorder = current()
    with torch._C.DisableTorchFunction():
        is_recorded = recorder is not None and is_deferred(tensor)
    if recorder is None or not is_recorded:
        return original(tensor, *args, **kwargs)
    with undisturbed():
        return recorder.tape.write_whole(original, tensor, *args, **kwargs)


def _reduce(original: Callable[..., Any], tensor: torch.Tensor, protocol: Any) -> Any:
    with torch._C.DisableTorchFunction():
        if is_deferred(tensor):
            raise misuse(tensor, "saved or pickled")
    return original(tensor, protocol)


def _flatten(original: Callable[..., Any], layer: torch.nn.RNNBase) -> None:
    if (recorder := current()) is not None:
        recorder.recurrent.append(weakref.ref(layer))
    recurrent.flatten_unless_deferred(original, layer)


def _register(original: Callable[..., Any], module: torch.nn.Module, name: str, param: torch.Tensor | None) -> None:
    """Know a parameter by its place, for messages; and parameters that were made in unusual ways."""
    original(module, name, param)
    recorder = current()
    if recorder is None or param is None:
        return
    with torch._C.DisableTorchFunction():
        recipe = recipe_of(param) if param.is_meta else None
        if recipe is not None:
            recipe.label = recipe.label or f"{name} of {type(module).__name__}"
            recorder.adopt(param)


def _script(original: Callable[..., Any], module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """TorchScript hands tensors to C++, where nobody can exchange them: they get their values now."""
    recorder = current()
    if recorder is not None:
        with undisturbed():
            for tensor in [tensor for _, tensor in named_tensors(module) if is_deferred(tensor)]:
                recorder.bind(tensor, is_overwritten=False)
    return original(module, *args, **kwargs)


_PATCHES = (
    ScopedPatch(torch.nn.Parameter, "__new__", _new_parameter),
    ScopedPatch(torch.nn.init, "_no_grad_trunc_normal_", _trunc_normal),
    ScopedPatch(torch.Tensor, "__reduce_ex__", _reduce),
    ScopedPatch(torch.nn.RNNBase, "flatten_parameters", _flatten),
    ScopedPatch(torch.nn.Module, "register_parameter", _register),
    ScopedPatch(torch.jit._recursive, "create_script_module", _script),  # for `torch.jit.trace`, too
)
