"""From a deferred module to a sharded one, by an engine that knows nothing of recipes.

`fully_shard`, tensor parallelism and their like take plain meta tensors apart without looking at values. So they come
first, on modules that are still deferred; then each rank gives memory to the parts that it is left with and fills them,
one parameter at a time. Where every rank has the whole module, `equalize` is all there is to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import distributed
from torch.nn import Module

from lightning_efficient_init.deferred import audit, kept, parameter
from lightning_efficient_init.deferred.engines import window_of
from lightning_efficient_init.deferred.materialize import (
    allocate,
    fill_empty,
    give_bare_memory,
    initialize,
    initialize_empty,
    is_deferred,
    materialize_deferred,
    materialize_tensors,
)
from lightning_efficient_init.deferred.reach import named_parameters
from lightning_efficient_init.deferred.recipe import Recipe, Ref, recipe_of
from lightning_efficient_init.deferred.sharded import Windows, agree, evaluate_each, from_first, release, windows
from lightning_efficient_init.errors import DeferredInitError, DeferredParameterError, shorten
from lightning_efficient_init.rendezvous import exchange, is_alone
from lightning_efficient_init.sharding import give_local_memory, is_dtensor, offloaded, part_of, settle

Engine = Callable[[Module], Module]


def distribute(
    module: Module, engine: Engine, device: torch.device, *, is_empty: bool = False, known: Windows | None = None
) -> Module:
    """Let ``engine`` shard a deferred module, and give each rank's parts their memory and values.

    Together the ranks hold what rank 0 alone would hold. All ranks come here.

    Args:
        module: A deferred module, or one that is deferred in part; what is real goes to the engine as it is.
        engine: Shards the module, in place or not, and returns it.
        device: This rank's device. Parts are made there; an engine that offloads moves them on.
        is_empty: Whether parameters are left without values, their recipes at hand for `initialize`. Those of
            ``postponed_init(is_optional=True)`` are in any case.
        known: `windows` from before parameters that had been sharded already were cast.

    Returns:
        What the engine returned.

    Raises:
        DeferredInitError: The ranks have recorded different models.
        DeferredParameterError: A parameter is on the meta device and has no recipe.
    """
    refs = prepare(module, device, known)
    sharded = engine(module)
    fill_parts(sharded, refs, device, is_empty=is_empty)
    share_buffers(sharded)
    return sharded


def prepare(module: Module, device: torch.device, known: Windows | None = None) -> Windows:
    """Get a module ready for an engine: all ranks agree on its recipes, and what is empty gets its values.

    Engines take the memory that there is for values, and parts of a canary tell nobody that they are none.

    Args:
        module: A module that is deferred, real, or both in part.
        device: This rank's device.
        known: See `distribute`.

    Returns:
        `windows` of what is deferred.

    Raises:
        DeferredInitError: The ranks have recorded different models, or some have written what others have not.
        DeferredParameterError: Nobody has written a parameter's memory, and its recipe is gone.
    """
    refs = {**(known or {}), **windows(module)}
    with torch._C.DisableTorchFunction():
        whole = {name: p for name, p in named_parameters(module) if not p.is_meta and part_of(p) is None}
    empty = [name for name in audit.uninitialized_parameters(module) if name in whole]
    audit.check_recipes(module, empty)
    recorded = {name: param for name, param in whole.items() if kept.recipe_of_empty(param) is not None}
    if other := {name for found in exchange([*recorded]) for name in recorded.keys() ^ found}:
        raise DeferredInitError(
            f"{shorten(sorted(other))}: built empty, and by now written or initialized on some ranks, not on all. Use "
            "or load a model on all ranks, or on none, before it is set up with another strategy."
        )
    agree([*refs.values(), *map(kept.window_of, recorded.values())], device)
    fill_empty([*map(whole.__getitem__, empty), *audit.empty_copies(recorded.values(), module.parameters())])
    for param in recorded.values():
        kept.forget(param)
    release(module)
    return refs


def equalize(module: Module, device: torch.device) -> None:
    """Let what is left to initialize in ``module`` get rank 0's values on every rank. All ranks come here.

    Recipes that all ranks have become rank 0's, and wait. Of anything else rank 0's memory is what counts, which the
    caller gives to the other ranks: what nobody has written in it is initialized now.

    Args:
        module: A module that each rank has the whole of; what is deferred in it gets memory before the ranks meet.
        device: This rank's device.
    """
    if is_alone():
        return
    left = _windows_left(module)
    common = set.intersection(*map(set, exchange(list(left))))
    try:
        agree([left[name] for name in sorted(common)], device)
    except DeferredInitError:  # on all of them: each rank initializes it in a way of its own
        common = set()
    if distributed.get_rank() == 0 and len(common) < len(left):
        initialize_empty(module, left.keys() - common)


def _windows_left(module: Module) -> dict[str, Ref]:
    """What the recipes that are left have for parameters, by name; whether or not somebody has written by now."""
    with parameter.undisturbed():
        named = dict(named_parameters(module))
        windows = {name: kept.window_of(p) if kept.recipe_of_empty(p) else window_of(p) for name, p in named.items()}
    return {name: window for name, window in windows.items() if window is not None}


def fill_parts(module: Module, refs: Windows, device: torch.device, *, is_empty: bool = False) -> None:
    """Give this rank's parts of deferred parameters memory and values; whole ones that are left, too.

    Args:
        module: The sharded module.
        refs: `windows` of it, from before.
        device: Where parts are made.
        is_empty: See `distribute`.
    """
    on_cpu = offloaded(module)
    wanted: list[tuple[Ref, Callable[[torch.Tensor], None]]] = []
    for param, ref in _deferred_parts(module, refs):
        target = torch.device("cpu") if id(param) in on_cpu else device
        give_local_memory(param, torch.empty_like(param._local_tensor, device=target))
        if not (_is_left(ref.recipe, is_empty=is_empty) and audit.keep(param, ref)):
            wanted.append((ref, partial(_fill, param)))
    evaluate_each(wanted, device)
    settle(module)
    _fill_whole(module, device, is_empty=is_empty)
    move_whole(module, device)


def initialize_required(module: Module) -> None:
    """Run the recipes of what nobody has written, but not of what `postponed_init` declared optional."""
    names = audit.uninitialized_parameters(module)
    params = dict(named_parameters(module))
    recipes = {name: kept.recipe_of_empty(params[name]) for name in names}
    initialize(module, [name for name, recipe in recipes.items() if recipe is not None and not recipe.is_optional])


def share_buffers(module: Module) -> None:
    """Give all ranks rank 0's buffers, which may hold random numbers.

    Raises:
        DeferredInitError: The ranks have other buffers.
    """
    if is_alone():
        return
    buffers = {n: b for n, b in module.named_buffers() if not (b.is_meta or is_dtensor(b)) and b.numel()}
    owned = {name: _without_repeats(buffer.detach()) for name, buffer in buffers.items()}
    kinds = exchange({name: (tuple(t.shape), str(t.dtype), str(t.layout)) for name, t in owned.items()})
    if other := {name for found in kinds for name, _ in found.items() ^ kinds[0].items()}:
        raise DeferredInitError(
            f"{shorten(sorted(other))}: expected buffers of one shape, dtype and layout on all ranks, found others. "
            "Build the same model on every rank."
        )
    for name, own in owned.items():
        if own.layout is not torch.strided or own.is_quantized:
            parameter.exchange(buffers[name], from_first(own.cpu()).to(own.device))
            continue
        flat = own.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
        distributed.broadcast(flat, 0)
        if flat.data_ptr() != own.data_ptr():
            own.copy_(flat.view(own.dtype).view(own.shape))


def _without_repeats(tensor: torch.Tensor) -> torch.Tensor:
    """A view that has each element of an expanded tensor once; other tensors as they are."""
    steps = tensor.stride() if tensor.layout is torch.strided else ()
    for dim in reversed([dim for dim, step in enumerate(steps) if step == 0]):
        tensor = tensor.select(dim, 0)
    return tensor


def move_whole(module: Module, device: torch.device) -> None:
    """Bring what no engine has taken apart to the device, keeping identity."""
    for param in module.parameters():
        if not is_dtensor(param) and param.device != device and not param.is_meta:
            param.data = param.data.to(device)
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.device != device and not buffer.is_meta:
                child._buffers[name] = buffer.to(device)


def fill_own(
    module: Module, device: torch.device, *, is_empty: bool = False, can_wait: bool = True
) -> Sequence[torch.Tensor]:
    """Give the deferred tensors that ``module`` itself has, not its children, memory and values.

    For engines that take one module at a time and want it whole.

    Args:
        module: Part of a deferred module.
        device: Where memory and values are made.
        is_empty: See `distribute`.
        can_wait: Whether any parameter may be left without values.

    Returns:
        The parameters that were left without values, for `keep_recipes` once they have been sharded.
    """
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and is_deferred(t)]
    params = [t for t in own if isinstance(t, torch.nn.Parameter)] if can_wait else []
    left = [param for param in params if _is_left(recipe_of(param), is_empty=is_empty)]
    give_bare_memory(left, device)
    materialize_tensors((t for t in own if t.is_meta), device)
    return left


def keep_recipes(module: Module, refs: Windows, device: torch.device, left: Iterable[torch.Tensor]) -> None:
    """Keep the recipes of parameters that have been sharded without values; run those that cannot wait.

    Args:
        module: The sharded module.
        refs: `windows` of it, from before.
        device: Where recipes run.
        left: What `fill_own` has left.
    """
    waiting = {id(param) for param in left}
    wanted: list[tuple[Ref, Callable[[torch.Tensor], None]]] = []
    for child in module.modules():
        for name, param in child._parameters.items():
            if param is None or id(param) not in waiting:
                continue
            waiting.remove(id(param))
            if not audit.keep(param, refs[child, name]):
                wanted.append((refs[child, name], partial(_fill, param)))
    evaluate_each(wanted, device)


def _is_left(recipe: Recipe | None, *, is_empty: bool) -> bool:
    """Whether memory is to be left as it is for now."""
    return recipe is not None and (is_empty or recipe.is_optional) and not recipe.is_loaded


def _deferred_parts(module: Module, refs: Windows) -> Iterator[tuple[Any, Ref]]:
    """The DTensors on the meta device, each once, with their recipes."""
    seen: set[int] = set()
    lost: list[str] = []
    for path, child in module.named_modules():
        for name, param in child._parameters.items():
            if param is None or not is_dtensor(param) or not param.is_meta or id(param) in seen:
                continue
            seen.add(id(param))
            if (child, name) in refs:
                yield param, refs[child, name]
            else:
                lost.append(f"{path}.{name}")
    if lost:
        raise DeferredParameterError(
            f"{shorten(lost)}: on the meta device without a recipe. The function that parallelizes the model may wrap "
            "modules and exchange parameters, but a new parameter needs values: make it before, inside init_module()."
        )


def _fill(param: torch.Tensor, whole: torch.Tensor) -> None:
    part = part_of(param)
    assert part is not None
    part.memory.copy_(part.take(whole))


def _fill_whole(module: Module, device: torch.device, *, is_empty: bool) -> None:
    """What no engine has taken apart, wherever it hangs."""
    left = [p for p in module.parameters() if p.is_meta and _is_left(recipe_of(p), is_empty=is_empty)]
    allocate(module, tensors=left)
    materialize_deferred(module, device)
