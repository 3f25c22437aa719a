"""The verbs: give deferred parameters memory, and values."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Sequence
from functools import partial

import torch

from lightning_efficient_init.deferred import audit, kept, parameter, recurrent
from lightning_efficient_init.deferred.active import current
from lightning_efficient_init.deferred.arguments import indexed
from lightning_efficient_init.deferred.reach import named_parameters, named_tensors
from lightning_efficient_init.deferred.recipe import Recipe, living, recipe_of
from lightning_efficient_init.deferred.replay import evaluate
from lightning_efficient_init.deferred.sharded import evaluate_each
from lightning_efficient_init.errors import DeferredParameterError, shorten
from lightning_efficient_init.sharding import refresh


def is_deferred(module_or_tensor: torch.nn.Module | torch.Tensor) -> bool:
    """Whether a tensor, or any parameter or buffer of a module, has a recipe and no memory."""
    with torch._C.DisableTorchFunction():
        if isinstance(module_or_tensor, torch.Tensor):
            return module_or_tensor.is_meta and recipe_of(module_or_tensor) is not None
        return any(t.is_meta and recipe_of(t) is not None for _, t in named_tensors(module_or_tensor))


def has_recipe(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` can still be initialized: it is deferred, or it is empty and nobody forgot its recipe."""
    return have_recipes((tensor,))


def have_recipes(tensors: Iterable[torch.Tensor]) -> bool:
    """`has_recipe`, of any of what may be 100,000."""
    with torch._C.DisableTorchFunction():
        return any(kept.recipe_of_empty(t) is not None or (t.is_meta and recipe_of(t) is not None) for t in tensors)


def is_postponed(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is deferred until a strategy has sharded its module."""
    with torch._C.DisableTorchFunction():
        recipe = recipe_of(tensor) if tensor.is_meta else None
    if recipe is None:
        return False
    recorder = current()
    return recipe.is_postponed or (recorder is not None and recorder.is_postponed)


def materialize(
    module: torch.nn.Module, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """Give the deferred parameters of ``module`` memory, and the values that eager construction gives.

    Identity, ties, views, ``requires_grad`` and references that optimizers hold stay. Generators are left as they
    were. A part of a model gets the values that it gets in the whole.

    Args:
        module: A model, or part of one. What is not deferred is moved and cast as well.
        device: Build it here, drawing from this device's generator as if the recorded code had been run under
            ``with torch.device(device)``. The device it was recorded for unless given.
        dtype: Cast floating-point parameters to this in the end. Buffers keep theirs: code that asks for float32
            frequencies means it.

    Returns:
        ``module``.

    Raises:
        DeferredParameterError: A tensor is on the meta device, or in memory that nobody has written, without a recipe.
        TypeError: ``dtype`` is not one of floating-point or complex numbers.
        ValueError: ``device`` is the meta device.
    """
    _check_wishes(device, dtype)
    target = None if device is None else indexed(device)
    with parameter.undisturbed():
        layers = recurrent.scattered(module.modules())
        _check_unclaimed(module)
        materialize_deferred(module, target, dtype)
        initialize(module)  # what `allocate` gave memory, and nobody has written
        audit.check_recipes(module, audit.uninitialized_parameters(module))
        _move(module, target, dtype)
        recurrent.flatten(layers)
    return module


def materialize_deferred(
    module: torch.nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """`materialize`, for what is deferred alone: nothing else is initialized, moved or cast."""
    tensors = [tensor for _, tensor in named_tensors(module)]
    companions = _companions(tensors)
    materialize_tensors(tensors, device, dtype)
    materialize_tensors(companions, device)
    _check_complete(module)


def _companions(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Deferred tensors that were recorded with some of ``tensors``, and that no module has registered."""
    with torch._C.DisableTorchFunction():
        recipes = [recipe for tensor in tensors if tensor.is_meta and (recipe := recipe_of(tensor)) is not None]
        recorded = {id(recipe.companions): recipe.companions for recipe in recipes}
        found = [(t, recipe_of(t)) for t in living(itertools.chain(*recorded.values())) if t.is_meta]
        return [tensor for tensor, recipe in found if recipe is not None and not recipe.is_postponed]


def give_bare_memory(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Give deferred tensors, and all that shares their memory, memory without values or a way to tell."""
    with parameter.undisturbed():
        for recipe, sharing in _groups(tensors).items():
            parameter.give_memory(sharing, torch.UntypedStorage(recipe.num_bytes, device=device))


def materialize_tensors(
    tensors: Iterable[torch.Tensor], device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """`materialize`, for those of ``tensors`` that are deferred, and all that shares their memory."""
    with parameter.undisturbed():
        groups = _groups(tensors)

        def deliver(recipe: Recipe, storage: torch.UntypedStorage) -> None:
            tensors = groups[recipe]
            parameter.give_memory(tensors, storage)
            if dtype is not None and all(_is_cast(tensor, dtype) for tensor in tensors):
                parameter.cast(tensors, dtype)

        evaluate(groups, device=device, deliver=deliver)


def allocate(module: torch.nn.Module, *, tensors: Iterable[torch.Tensor] | None = None) -> None:
    """Give deferred parameters memory without values; their recipes stay at hand for `initialize`.

    Args:
        module: A model.
        tensors: Parameters and buffers of it; all parameters unless given.
    """
    with parameter.undisturbed():
        layers = recurrent.scattered(module.modules())
        audit.allocate(_groups(module.parameters() if tensors is None else tensors))
        recurrent.flatten(layers)


def initialize(model: torch.nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Run the recipes of exactly these parameters, in the memory they have or (if deferred) get now.

    Args:
        model: A model.
        names: Of parameters, as in ``named_parameters(remove_duplicate=False)``, or as `uninitialized_parameters`
            calls them; all of the latter unless given.

    Returns:
        The names of those that were initialized: a parameter without a recipe is left alone.
    """
    chosen = audit.uninitialized_parameters(model) if names is None else list(names)
    with parameter.undisturbed():
        known = dict(named_parameters(model, remove_duplicate=names is None))
        params = {name: known[name] for name in chosen}
        layers = recurrent.scattered(model.modules())
        deferred = _groups(params.values())
        empty = [p for p in params.values() if kept.recipe_of_empty(p) is not None]
        done = [name for name, p in params.items() if has_recipe(p)]
        evaluate(deferred, deliver=lambda recipe, storage: parameter.give_memory(deferred[recipe], storage))
        fill_empty(empty)
        recurrent.flatten(layers)
    return done


def fill_empty(tensors: Sequence[torch.Tensor]) -> None:
    """Run the recipes of tensors that `allocate` gave memory."""
    with parameter.undisturbed():
        evaluate_each((kept.window_of(p), partial(audit.fill, p)) for p in {id(p): p for p in tensors}.values())
        refresh(tensors)


def initialize_empty(model: torch.nn.Module, names: Container[str]) -> None:
    """Run the recipes of those of these parameters that have memory which nobody has written, and of their copies."""
    with parameter.undisturbed():
        params = dict(named_parameters(model))
        empty = [params[name] for name in audit.uninitialized_parameters(model) if name in names]
        empty = [param for param in empty if not param.is_meta]
        fill_empty([*empty, *audit.empty_copies(empty)])


def settle(module: torch.nn.Module) -> None:
    """Do to ``module`` now what waits for the recording to end, if one is under way: it is about to be loaded."""
    recorder = current()
    if recorder is not None:
        with parameter.undisturbed():
            recorder.settle(module)


def forget(tensors: Iterable[torch.Tensor], members: Iterable[torch.Tensor] = ()) -> None:
    """Drop the recipes of parameters that have been written; deferred ones keep theirs.

    Deep copies that were made while these were empty, and have not been written themselves, get their values now.

    Args:
        tensors: The parameters.
        members: Of the same model: no copies of it, even if they are made as copies of each other.
    """
    tensors = [tensor for tensor in tensors if kept.recipe_of_empty(tensor) is not None]
    if tensors:
        fill_empty(audit.empty_copies(tensors, members))
    for tensor in tensors:
        kept.forget(tensor)


def _groups(params: Iterable[torch.Tensor]) -> dict[Recipe, list[torch.Tensor]]:
    """Deferred tensors by recipe, each with whatever else shares its memory."""
    groups: dict[Recipe, dict[int, torch.Tensor]] = {}
    for tensor in params:
        recipe = recipe_of(tensor) if tensor.is_meta else None
        if recipe is None:
            continue
        group = groups.setdefault(recipe, {})
        group[id(tensor)] = tensor
        known = [alias for alias in living(recipe.aliases) if recipe_of(alias) is recipe]
        group |= {id(alias): alias for alias in (*known, *_aliases_being_recorded(recipe))}
    return {recipe: list(group.values()) for recipe, group in groups.items()}


def _aliases_being_recorded(recipe: Recipe) -> list[torch.Tensor]:
    recorder = current()
    return recorder.aliases(recipe) if recorder is not None else []


def _check_complete(module: torch.nn.Module) -> None:
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    lost = [name for name, tensor in tensors if tensor.is_meta]
    if lost:
        raise DeferredParameterError(
            f"{shorten(lost)}: on the meta device without a recipe. "
            "What was made under `torch.device('meta')`, computed from deferred parameters, or copied from them by "
            "other means than `copy.deepcopy`, has none: build the module under `deferred_init`."
        )


def _check_unclaimed(module: torch.nn.Module) -> None:
    recipes = {name: recipe_of(p) for name, p in module.named_parameters() if p.is_meta}
    claimed = {name: recipe.claimed_by for name, recipe in recipes.items() if recipe is not None and recipe.claimed_by}
    if claimed:
        raise DeferredParameterError(
            f"{shorten(claimed)}: {next(iter(claimed.values()))} has been loaded into it, and will be read when the "
            "strategy sets the module up. Set it up (fabric.setup, or trainer.fit) instead of materializing it."
        )


def claim(tensors: Iterable[torch.Tensor], path: str) -> None:
    """Note that a checkpoint will provide the values of deferred tensors, once they have been sharded."""
    with torch._C.DisableTorchFunction():
        for tensor in tensors:
            recipe = recipe_of(tensor) if tensor.is_meta else None
            if recipe is not None:
                recipe.claimed_by = path


def _check_wishes(device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    if device is not None and torch.device(device).type == "meta":
        raise ValueError(
            "device: expected one with memory, found 'meta'. `materialize` gives parameters memory: name the device "
            "that they are to be on, or leave it out for the one they were recorded for."
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        raise TypeError(
            f"dtype: expected a torch.dtype of floating-point or complex numbers, found {dtype!r}. Parameters are cast "
            "to it, and integers would lose their values."
        )


def _is_cast(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.dtype != dtype


def _move(module: torch.nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Move what was real already, and cast parameters, keeping identity."""
    if device is None and dtype is None:
        return
    for _, param in named_parameters(module):
        wanted = dtype if param.is_floating_point() and dtype is not None else param.dtype
        if (device is not None and param.device != device) or param.dtype != wanted:
            param.data = param.data.to(device=device, dtype=wanted)
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and device is not None and buffer.device != device:
                child._buffers[name] = buffer.to(device)
