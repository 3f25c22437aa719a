"""What belongs to a model: what its modules have registered, and what they keep beside that.

A teacher in a tuple, scales in a list, a module put into ``__dict__`` or held by a pipeline that is no module: this is
how code keeps parameters out of state dicts and optimizers. They compute all the same, and nothing of them may stay
without values.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from operator import itemgetter
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch.nn import Module, Parameter

from lightning_efficient_init.deferred.recipe import recipe_of
from lightning_efficient_init.sharding import is_flat

_CONTAINERS = frozenset({list, tuple, dict, OrderedDict, set, frozenset})
_PLAIN = frozenset({int, float, bool, str, bytes, type(None)})
_OPAQUE = (type, FunctionType, MethodType, ModuleType)  # what these have as attributes is not a model's
_OF_ALL = frozenset(vars(Module()))  # attributes that every module has


def named_tensors(model: Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes, by name; then `hidden_parameters`."""
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers, module.__dict__):
            yield from ((_join(path, name), t) for name, t in tensors.items() if isinstance(t, torch.Tensor))
    yield from hidden_parameters(model)


def named_parameters(model: Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """``model.named_parameters()``, then `hidden_parameters`."""
    yield from model.named_parameters(remove_duplicate=remove_duplicate)
    yield from hidden_parameters(model)


def hidden_parameters(model: Module) -> Iterator[tuple[str, Parameter]]:
    """Parameters that belong to a model unregistered: in containers and plain objects, and in modules there; each once.

    They are called by their path. Of plain objects those are looked into that modules have as attributes.

    One that waits for a strategy to shard the model is none of these: that takes care of what is registered alone, and
    an error tells of others when they are used.
    """
    known: set[int] = set()
    seen: set[int] = set()
    waiting = [(path, module, held) for path, module in _modules("", model, known) if (held := [*_held(module, seen)])]
    if not waiting:
        return  # as nearly always, also where there are very many modules
    hidden: dict[int, tuple[str, Parameter]] = {}
    for path, module, held in waiting:
        for name, found in _found_in(path, module, held, seen):
            if isinstance(found, Parameter):
                hidden.setdefault(id(found), (name, found))
            elif isinstance(found, Module) and id(found) not in known and module not in found.modules():
                fresh = list(_modules(name, found, known))
                waiting += [(below, child, [*_held(child, seen)]) for below, child in fresh]
                params = [(_join(below, n), p) for below, child in fresh for n, p in child._parameters.items()]
                hidden = {id(p): (name, p) for name, p in params if p is not None} | hidden
    registered = {id(param) for param in model.parameters()} if hidden else set()
    yield from (item for key, item in hidden.items() if key not in registered and not _is_strategys(item[1]))


def _is_strategys(param: Parameter) -> bool:
    """Whether a strategy has made it, or is going to."""
    recipe = recipe_of(param) if param.is_meta else None
    return is_flat(param) or (recipe is not None and recipe.is_postponed)


def _modules(path: str, module: Module, known: set[int]) -> Iterator[tuple[str, Module]]:
    """What ``module.named_modules(prefix=path)`` gives, whatever the depth, less those that are ``known``."""
    waiting: list[tuple[str, Module | None]] = [(path, module)]
    while waiting:
        path, child = waiting.pop()
        if child is not None and id(child) not in known:
            known.add(id(child))
            yield path, child
            if children := child._modules:
                waiting += [(f"{path}.{name}" if path else name, below) for name, below in reversed(children.items())]


def _held(module: Module, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Attributes that are modules, tensors or containers, beside those that every module has.

    Those of an attribute that is a plain object count as the module's own, if it has not been ``seen``.
    """
    attributes = vars(module)
    for name in attributes.keys() - _OF_ALL:
        value = attributes[name]
        if type(value) in _PLAIN:
            continue
        if _may_hold(value):
            yield name, value
        elif id(value) not in seen and not isinstance(value, _OPAQUE):
            seen.add(id(value))
            inner = getattr(value, "__dict__", None)
            if type(inner) is dict:
                yield from ((f"{name}.{key}", item) for key, item in inner.items() if _may_hold(item))


def _may_hold(value: Any) -> bool:
    return isinstance(value, (Module, torch.Tensor)) or (type(value) in _CONTAINERS and bool(value))


def _found_in(
    path: str, module: Module, held: list[tuple[str, Any]], seen: set[int]
) -> Iterator[tuple[str, Module | torch.Tensor]]:
    """Modules and tensors that a module has as plain attributes, or in containers that are; but for those ``seen``."""
    for name, value in sorted(held, key=itemgetter(0)):
        is_taken = name in module._modules or name in module._parameters
        place = _join(path, f"__dict__[{name!r}]" if is_taken else name)
        if isinstance(value, (Module, torch.Tensor)):
            yield place, value
        else:
            yield from _contained(place, value, seen)


def _contained(path: str, container: Any, seen: set[int]) -> Iterator[tuple[str, Module | torch.Tensor]]:
    """Modules and tensors in a container, and in containers in it that have not been ``seen``."""
    waiting = [(path, container)]
    while waiting:
        path, container = waiting.pop()
        values = container.values() if isinstance(container, dict) else container
        if id(container) in seen or _PLAIN.issuperset(map(type, values)):
            continue
        seen.add(id(container))
        for key, value in zip(container if isinstance(container, dict) else itertools.count(), values, strict=False):
            if isinstance(value, (Module, torch.Tensor)):
                yield f"{path}[{key!r}]", value
            elif type(value) in _CONTAINERS and value:
                waiting.append((f"{path}[{key!r}]", value))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
