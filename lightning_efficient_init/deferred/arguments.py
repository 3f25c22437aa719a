"""Arguments of operations: the tensors among them, where they are, and the same arguments on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from lightning_efficient_init.deferred.operators import Traits
from lightning_efficient_init.deferred.recipe import recipe_of

CPU = torch.device("cpu")
META = torch.device("meta")
CONSTANT_BYTES = 1 << 20  # a real tensor up to this size is copied into a recipe; a larger one stays what it is


def tensors_in(args: Iterable[Any], kwargs: dict[str, Any] | None = None) -> Iterator[torch.Tensor]:
    """All tensors, in nested containers too."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())


def map_tensors(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """``value`` with every tensor in it exchanged."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return alike(value, [map_tensors(change, item) for item in value])
    if isinstance(value, dict):
        return {key: map_tensors(change, item) for key, item in value.items()}
    return value


def alike(container: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    """``items`` in a container of the same kind, which may be a named tuple."""
    return type(container)(*items) if hasattr(container, "_fields") else type(container)(items)


def to_meta(value: Any) -> Any:
    """The same arguments, for shapes only."""

    def meta(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)

    mapped = map_tensors(meta, value)
    if isinstance(mapped, dict) and mapped.get("device") is not None:
        mapped["device"] = META
    return mapped


def check_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise what eager construction would raise for shapes and dtypes that do not fit."""
    try:
        func(*to_meta(args), **without(to_meta(kwargs), "generator"))
    except NotImplementedError:
        return  # no meta kernel, or one that needs values: it is recorded as it is


def written_by(traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes."""
    found = (args[i] if i < len(args) else kwargs.get(name) for i, name in traits.writes)
    return list(tensors_in(found))


def is_deferred(value: Any) -> bool:
    """Whether this is a deferred tensor."""
    return isinstance(value, torch.Tensor) and value.is_meta and recipe_of(value) is not None


def is_strided(value: Any) -> bool:
    """Whether this is a tensor with memory of the usual kind."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def is_external(value: Any) -> bool:
    """Whether these are real values, and too many to keep a copy in a recipe."""
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return False
    recipe = recipe_of(value)
    return (recipe is None or recipe.external) and value.numel() * value.element_size() > CONSTANT_BYTES


def reads_outside(args: tuple[Any, ...]) -> bool:
    """Whether an operation takes tensors (other than single numbers) that the recording knows nothing about."""
    return any(t.dim() and not t.is_meta and recipe_of(t) is None for t in tensors_in(args))


def without(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """``kwargs`` less one."""
    return {key: value for key, value in kwargs.items() if key != name}


def asks_for_meta(kwargs: dict[str, Any]) -> bool:
    """Whether the result is to be on the meta device."""
    device = kwargs.get("device") if kwargs else None
    return device is not None and torch.device(device).type == "meta"


def indexed(device: torch.device | str) -> torch.device:
    """``cuda`` as ``cuda:0``, so that devices compare."""
    device = device if isinstance(device, torch.device) else torch.device(device)
    if device.index is not None or device.type in ("cpu", "meta"):
        return device
    return torch.device(device.type, getattr(torch, device.type).current_device())


def recorded_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where the result of an operation on deferred tensors would be."""
    if kwargs.get("device") is not None:
        return indexed(kwargs["device"])
    recipes = (recipe_of(t) for t in tensors_in(args, kwargs) if t.is_meta)
    return next((recipe.device for recipe in recipes if recipe is not None), device_of(args, {}))


def device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where an operation on real tensors runs."""
    if kwargs.get("device") is not None:
        return indexed(kwargs["device"])
    return next((t.device for t in tensors_in(args, kwargs)), CPU)
