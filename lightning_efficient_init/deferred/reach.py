"""What belongs to a model: what its modules have registered, and what they keep beside that.

A teacher in a tuple, scales in a list, a module put into ``__dict__``: this is how code keeps parameters out of state
dicts and optimizers. They compute all the same, and nothing of them may stay without values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module, Parameter

_CONTAINERS = frozenset({list, tuple, dict, set, frozenset})
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})


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
    """Parameters that belong to a model unregistered: in containers, and in modules there; each once, by its path."""
    waiting = list(model.named_modules())
    known = {id(module) for _, module in waiting}
    hidden: dict[int, tuple[str, Parameter]] = {}
    while waiting:
        path, module = waiting.pop()
        for name, found in _held(path, module):
            if isinstance(found, Parameter):
                hidden.setdefault(id(found), (name, found))
            elif isinstance(found, Module):
                fresh = [(below, child) for below, child in found.named_modules(prefix=name) if id(child) not in known]
                known.update(id(child) for _, child in fresh)
                waiting += fresh
                params = [(_join(below, n), p) for below, child in fresh for n, p in child._parameters.items()]
                hidden = {id(p): (name, p) for name, p in params if p is not None} | hidden
    if hidden:
        registered = set(map(id, model.parameters()))
        yield from (item for key, item in hidden.items() if key not in registered)


def _held(path: str, module: Module) -> Iterator[tuple[str, Module | torch.Tensor]]:
    """Modules and tensors that a module has as plain attributes, or in containers that are."""
    for name, value in module.__dict__.items():
        if isinstance(value, (Module, torch.Tensor)):
            yield _join(path, name), value
        elif type(value) in _CONTAINERS and value and name not in _REGISTERED:
            yield from _contained(_join(path, name), value, frozenset())


def _contained(path: str, container: Any, around: frozenset[int]) -> Iterator[tuple[str, Module | torch.Tensor]]:
    """Modules and tensors in a container, which is inside of those ``around``."""
    around |= {id(container)}
    for key, value in container.items() if type(container) is dict else enumerate(container):
        if isinstance(value, (Module, torch.Tensor)):
            yield f"{path}[{key!r}]", value
        elif type(value) in _CONTAINERS and value and id(value) not in around:
            yield from _contained(f"{path}[{key!r}]", value, around)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
