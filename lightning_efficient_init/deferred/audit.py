"""Empty memory: how it is recognized, and what becomes of it at first use.

`allocate` writes a *canary* into new memory: four values that no initializer yields and no training reaches, at the
start, at the end and between. As long as all of them are there nobody has written, whichever way he would have:
``load_state_dict``, ``copy_``, ``.data``, a loader of ours, a move to another device or dtype and back. Looking costs
one gather and one comparison for all parameters of a device and dtype. The recipe waits in the parameter object.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from lightning_efficient_init.deferred import parameter
from lightning_efficient_init.deferred.recipe import Recipe, Ref, recipe_of
from lightning_efficient_init.deferred.replay import evaluate
from lightning_efficient_init.errors import shorten
from lightning_efficient_init.sharding import part_of

_RECIPE = "_efficient_init_empty"
_PROBES = 4
_MOST_NAMES = 10
# Exact in bfloat16 (8 bits) and float16 (up to 65504), so a cast keeps them.
_CANARY = (-60928.0, 47360.0, -51712.0, 64256.0)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class UninitializedParameterWarning(UserWarning):
    """Parameters that nothing had written were initialized by their recipes at first use."""


class _Kept:
    """The recipe of an allocated parameter. A pickle of the parameter has None in its place."""

    __slots__ = ("ref",)

    def __init__(self, ref: Ref) -> None:
        self.ref = ref

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def allocate(groups: dict[Recipe, list[torch.Tensor]]) -> None:
    """Give deferred tensors, by recipe, memory with a canary, or values if they were loaded or cannot hold one."""
    valued = {r for r, tensors in groups.items() if r.is_loaded or not all(_can_be_empty(t) for t in tensors)}
    evaluate(valued, deliver=lambda recipe, storage: parameter.give_memory(groups[recipe], storage))
    empty = [t for recipe in groups if recipe not in valued for t in _allocate_empty(recipe, groups[recipe])]
    for probes, canary in _batches(_by_kind(map(_memory, empty))):
        torch._foreach_copy_(probes, [canary] * len(probes))


def _allocate_empty(recipe: Recipe, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Give memory, and keep the recipe at hand; returns who is to carry the canary."""
    if recipe.form is not None:
        tensors = [t for t in tensors if isinstance(t, torch.nn.Parameter)]
    refs = [Ref.to(tensor, recipe) for tensor in tensors]
    if recipe.form is None:
        parameter.give_memory(tensors, torch.UntypedStorage(recipe.num_bytes, device=recipe.device))
    else:
        for tensor in tensors:
            recipe.form.allocate(tensor, recipe.device)
    for tensor, ref in zip(tensors, refs, strict=True):
        tensor.__dict__[_RECIPE] = _Kept(ref)
    return tensors[:1]


def recipe_of_empty(tensor: torch.Tensor) -> Recipe | None:
    """The recipe of a tensor that `allocate` gave memory."""
    kept = tensor.__dict__.get(_RECIPE)
    return kept.ref.recipe if kept is not None else None


def forget(tensor: torch.Tensor) -> None:
    """Drop the recipe of an allocated tensor."""
    tensor.__dict__.pop(_RECIPE, None)


def keep(tensor: torch.Tensor, ref: Ref) -> bool:
    """Note that the memory of ``tensor``, or of this rank's part of it, is empty, if it can hold a canary."""
    memory = _memory(tensor)
    if memory.dtype not in _FLOATS or not memory.is_contiguous():
        return False
    tensor.__dict__[_RECIPE] = _Kept(ref)
    if memory.numel():
        for probes, canary in _batches(_by_kind([memory.detach()])):
            torch._foreach_copy_(probes, [canary])
    return True


def window_of(tensor: torch.Tensor) -> Ref:
    """What the recipe of an allocated tensor has for it."""
    kept: _Kept = tensor.__dict__[_RECIPE]
    return kept.ref


def fill(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Write the values of an allocated tensor, or of this rank's part of it."""
    form = window_of(tensor).recipe.form
    forget(tensor)
    part = part_of(tensor)
    if form is not None:
        form.write(tensor, whole)
    elif part is None:
        tensor.detach().copy_(whole)
    else:
        part.memory.copy_(part.take(whole))


def uninitialized_parameters(model: torch.nn.Module) -> list[str]:
    """Names of parameters whose memory nobody has written, deferred ones included; tied ones are named once.

    Names are those of ``named_parameters()``. One comparison for each device and dtype, whatever the sizes.
    """
    return _unwritten(model)[0]


def _unwritten(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Names of parameters that nobody has written, and of those that somebody has written in part."""
    with parameter.undisturbed():
        named = dict(model.named_parameters())
        deferred = {name for name, p in named.items() if p.is_meta and recipe_of(p) is not None}
        names = [name for name, p in named.items() if p.__dict__.get(_RECIPE) is not None and not p.is_meta]
        memory = {name: _memory(named[name]) for name in names}
        names = [name for name in names if memory[name].numel()]  # not what this rank has no part of
        intact = dict(zip(names, _intact([memory[name] for name in names]), strict=True))
    whole = [name for name in named if name in deferred or intact.get(name, 0) == 1]
    return whole, [name for name in named if 0 < intact.get(name, 0) < 1]


def watch(model: torch.nn.Module) -> None:
    """At first use (a forward, or saving) initialize what nobody has written by then, with one warning.

    The hooks remove themselves. Loading between now and the first use is normal, and silent. A model in which every
    parameter has been written for sure is left alone.
    """
    if not any(_is_pending(param) for param in model.parameters()):
        return
    forward_hooks: list[Any] = []
    saving_hooks: dict[torch.nn.Module, Any] = {}

    def audit(*_: Any, saving: torch.nn.Module | None = None) -> None:
        if not forward_hooks:
            return
        while forward_hooks:
            forward_hooks.pop().remove()
        for module, handle in saving_hooks.items():
            # torch iterates over the hooks of the module that is being saved: one in the middle stays, and does nothing
            if module is not saving or next(reversed(module._state_dict_pre_hooks)) == handle.id:
                handle.remove()
        _audit(model)

    def audit_before_saving(module: torch.nn.Module, *_: Any) -> None:
        audit(saving=module)

    for module in model.modules():
        forward_hooks.append(module.register_forward_pre_hook(audit, prepend=True))  # before FSDP's
        saving_hooks[module] = handle = module.register_state_dict_pre_hook(audit_before_saving)
        module._state_dict_pre_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]  # before FSDP's


def _is_pending(param: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return param.__dict__.get(_RECIPE) is not None or (param.is_meta and recipe_of(param) is not None)


def _audit(model: torch.nn.Module) -> None:
    from lightning_efficient_init.deferred.materialize import initialize  # noqa: PLC0415 (it stands on this module)

    whole, part = _unwritten(model)
    initialize(model, whole)
    for param in model.parameters():
        forget(param)
    messages = []
    if whole:
        messages.append(
            f"{len(whole)} parameters had not been written by a checkpoint or by you at first use, "
            f"and were initialized as their modules do it: {shorten(whole, _MOST_NAMES)}."
        )
    if part:
        messages.append(
            f"{len(part)} parameters have been written in part only, and the rest of their memory has undefined "
            f"values: {shorten(part, _MOST_NAMES)}. Write all of it, or call `initialize` on them before you write."
        )
    if messages:
        warnings.warn(" ".join(messages), UninitializedParameterWarning, stacklevel=4)


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """What there is of an allocated tensor in the memory of this rank, in whichever form."""
    recipe = recipe_of_empty(tensor)
    if recipe is not None and recipe.form is not None:
        return recipe.form.marked(tensor)
    part = part_of(tensor)
    return tensor if part is None else part.memory


def _can_be_empty(tensor: torch.Tensor) -> bool:
    return tensor.dtype in _FLOATS and tensor.numel() > 0 and _is_dense(tensor)


def _is_dense(tensor: torch.Tensor) -> bool:
    recipe = recipe_of(tensor)
    return recipe is not None and tensor.numel() * tensor.element_size() == recipe.num_bytes


def _probe(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a few elements in all parts of dense memory."""
    numel = tensor.numel()
    if numel < _PROBES:
        return tensor.as_strided((1,), (1,), tensor.storage_offset())
    return tensor.as_strided((_PROBES,), ((numel - 1) // (_PROBES - 1),), tensor.storage_offset())


def _by_kind(tensors: Iterable[torch.Tensor]) -> dict[Any, list[torch.Tensor]]:
    kinds: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype, tensor.numel() >= _PROBES), []).append(tensor)
    return kinds


def _batches(kinds: dict[Any, list[torch.Tensor]]) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    batches = []
    for (device, dtype, full), tensors in kinds.items():
        canary = torch.tensor(_CANARY if full else _CANARY[:1], dtype=dtype, device="cpu").to(device)
        batches.append(([_probe(tensor) for tensor in tensors], canary))
    return batches


def _intact(tensors: list[torch.Tensor]) -> list[float]:
    """The share of each tensor's canary that is still there."""
    kinds = _by_kind(tensors)
    intact: dict[int, float] = {}
    for members, (probes, canary) in zip(kinds.values(), _batches(kinds), strict=True):
        found = torch.stack(probes).eq(canary).double().mean(dim=1).tolist()
        intact.update(zip(map(id, members), found, strict=True))
    return [intact[id(tensor)] for tensor in tensors]
