"""Empty memory: how it comes into being, and how it is found.

`allocate` writes a *canary* (canary.py) into new memory. As long as all of it is there nobody has written, whichever
way he would have: ``load_state_dict``, ``copy_``, ``.data``, a loader of ours, a move to another device or dtype and
back. The recipe waits in the parameter object (kept.py). A canary without a recipe is found as well: memory that was
copied in a way that nobody could follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch

from lightning_efficient_init.deferred import canary, kept, parameter
from lightning_efficient_init.deferred.reach import named_parameters
from lightning_efficient_init.deferred.recipe import Recipe, Ref, recipe_of
from lightning_efficient_init.deferred.replay import evaluate
from lightning_efficient_init.errors import DeferredParameterError, shorten
from lightning_efficient_init.sharding import part_of


def allocate(groups: dict[Recipe, list[torch.Tensor]], bare: Set[Recipe] = frozenset()) -> None:
    """Give deferred tensors memory with a canary; or values, if they were loaded or cannot hold one.

    Args:
        groups: The tensors, by recipe.
        bare: Recipes of those that get values in any case.
    """
    valued = bare | {r for r, tensors in groups.items() if r.is_loaded or not all(_can_be_empty(t) for t in tensors)}
    evaluate(valued, deliver=lambda recipe, storage: parameter.give_memory(groups[recipe], storage))
    empty = {recipe: _allocate_empty(recipe, groups[recipe]) for recipe in groups if recipe not in valued}
    canary.write(kept.memory_of(tensor) for tensors in empty.values() for tensor in tensors)
    for recipe, tensors in empty.items():
        if recipe.original in empty:
            kept.note_copy(tensors[0], empty[recipe.original][0])


def _allocate_empty(recipe: Recipe, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Give memory, and keep the recipe at hand; returns who is to carry the canary."""
    if recipe.form is not None:
        tensors = [t for t in tensors if isinstance(t, torch.nn.Parameter)]
    refs = {tensor: Ref.to(tensor, recipe) for tensor in tensors}
    if recipe.form is None:
        parameter.show(refs, torch.UntypedStorage(recipe.num_bytes, device=recipe.device))
    else:
        for tensor in tensors:
            recipe.form.allocate(tensor, recipe.device)
    for tensor, ref in refs.items():
        kept.keep(tensor, ref)
    return tensors[:1]


def keep(tensor: torch.Tensor, ref: Ref) -> bool:
    """Note that the memory of ``tensor``, or of this rank's part of it, is empty, if it can hold a canary."""
    memory = kept.memory_of(tensor)
    if not canary.can_hold(memory) or not memory.is_contiguous():
        return False
    kept.keep(tensor, ref)
    if memory.numel():
        canary.write([memory.detach()])
    return True


def fill(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Write the values of an allocated tensor, or of this rank's part of it."""
    form, part = kept.window_of(tensor).recipe.form, part_of(tensor)
    if form is not None:
        form.write(tensor, whole)
    elif part is None:
        tensor.detach().copy_(whole)
    else:
        part.memory.copy_(part.take(whole))
    kept.forget(tensor)


def uninitialized_parameters(model: torch.nn.Module) -> list[str]:
    """Names of parameters whose memory nobody has written, deferred ones included; tied ones are named once.

    Names are those of ``named_parameters()``; parameters that no module has registered, in lists or in modules in
    lists, are called by their path, such as ``teacher[0].weight``. One comparison for each device and dtype, whatever
    the sizes.
    """
    return unwritten(model)[0]


def unwritten(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Names of parameters that nobody has written, and of those that somebody has written in part."""
    with parameter.undisturbed():
        named = dict(named_parameters(model))
        deferred = {name for name, p in named.items() if _is_deferred(p)}
        memory = {name: found for name, p in named.items() if (found := _marked(p)) is not None}
        shares = dict(zip(memory, canary.intact(list(memory.values())), strict=True))
    whole = [name for name in named if name in deferred or shares.get(name, 0) == 1]
    part = [name for name in named if 0 < shares.get(name, 0) < 1]
    return whole, part


def empty_copies(tensors: Iterable[torch.Tensor], members: Iterable[torch.Tensor] = ()) -> list[torch.Tensor]:
    """Deep copies of ``tensors`` that were made while these were empty, and still are; none of these or ``members``.

    Had the parameters been initialized when they were made, these would have the same values, whatever was loaded into
    the originals since. Code that swaps values with a copy, as averages of weights do, relies on it.
    """
    with parameter.undisturbed():
        tensors = list(tensors)
        copies = {id(copy): copy for tensor in tensors for copy in kept.copies_of(tensor)}
        own = set(map(id, (*tensors, *members))) if copies else set()
        copies = {key: copy for key, copy in copies.items() if key not in own}
        found = [(copy, memory) for copy in copies.values() if (memory := _marked(copy)) is not None]
        shares = canary.intact([memory for _, memory in found])
    return [copy for (copy, _), share in zip(found, shares, strict=True) if share == 1]


def check_recipes(model: torch.nn.Module, names: list[str]) -> None:
    """Raise for those of the parameters ``names``, which nobody has written, that nothing can initialize."""
    params = dict(named_parameters(model))
    lost = [name for name in names if not params[name].is_meta and not kept.recipe_of_empty(params[name])]
    if lost:
        raise DeferredParameterError(
            f"{shorten(lost)}: the memory of these parameters has never been written, and their recipes are gone, as "
            "this is a copy from another process, or one that was made while they were empty by other means than "
            "`copy.deepcopy`. Load a checkpoint into the model, or copy it once it has values."
        )


def is_pending(model: torch.nn.Module) -> bool:
    """Whether there is any parameter of which it is not certain that it has been written.

    A model without recipes is looked at, too, even where nothing has ever been recorded: its memory may have been
    handed over, or saved, by a process that left it empty.
    """
    with parameter.undisturbed():
        params = [param for _, param in named_parameters(model)]
        if any(_is_deferred(p) or kept.recipe_of_empty(p) is not None for p in params):
            return True
        return any(canary.intact([memory for p in params if (memory := _marked(p)) is not None]))


def _is_deferred(param: torch.Tensor) -> bool:
    return param.is_meta and recipe_of(param) is not None


def _marked(param: torch.Tensor) -> torch.Tensor | None:
    """Where in the memory of a parameter a canary would be; None if there cannot be one."""
    if param.is_meta:
        return None
    if kept.recipe_of_empty(param) is not None:
        memory = kept.memory_of(param)
        return memory if memory.numel() else None  # this rank may have no part of it
    is_plain = type(param) in (torch.Tensor, torch.nn.Parameter) and param.layout is torch.strided
    return param if is_plain and canary.is_unmistakable(param) and param.is_contiguous() else None


def _can_be_empty(tensor: torch.Tensor) -> bool:
    return canary.can_hold(tensor) and tensor.numel() > 0 and _is_dense(tensor)


def _is_dense(tensor: torch.Tensor) -> bool:
    recipe = recipe_of(tensor)
    return recipe is not None and tensor.numel() * tensor.element_size() == recipe.num_bytes
