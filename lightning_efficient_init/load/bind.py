"""Which tensor of a model takes which value of a state dict.

``torch.nn.Module.load_state_dict`` decides and copies in one go, and takes time quadratic in the number of children.
Here the decision comes first and nothing is copied: the result can be checked as a whole, before any parameter
changes, and handed to the pipeline.

Most modules load in the standard way, and are matched by name. A module that brings loading code of its own (an
overridden ``_load_from_state_dict``, a load hook, a ``load_state_dict``-time rename) is asked: its own code runs on
lazy tensors with ``copy_`` intercepted, so that what it would have copied becomes part of the decision. If that code
computes (concatenates two entries, say), the lazy tensors are read at that point, and the result is copied later.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX, _IncompatibleKeys
from torch.overrides import TorchFunctionMode

from lightning_efficient_init.checkpoint import Entry, LazyTensor

Shape = tuple[int, ...]


@dataclass(slots=True)
class Binding:
    """What loading a state dict into a module comes to.

    Attributes:
        tensors: The model's name for a tensor to that tensor, for all that a state dict of the model holds.
        entries: Name to the entry that fills the tensor.
        values: Name to a tensor in memory that is copied into the model's.
        calls: What is left to do afterwards: extra states, attributes that a module's own code set, hooks.
        missing: Names that found nothing.
        unexpected: Keys that match nothing.
        mismatched: Name to (the model's shape, the found shape).
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    calls: list[Callable[[], object]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)


def bind(module: Module, state: Mapping[str, Any], metadata: Any = None) -> Binding:
    """Decide what ``module.load_state_dict(state)`` would copy where.

    Args:
        module: The model; its tensors may be on the meta device.
        state: Key to ``Entry``, ``LazyTensor``, tensor, or another object for extra states.
        metadata: The ``_metadata`` of the state dict: prefix to a dict with the module's version, among others.
    """
    binding = Binding()
    used: set[str] = set()
    for prefix, submodule, is_custom in _walk(module, ""):
        if is_custom:
            used |= _bind_custom(submodule, prefix, state, metadata, binding)
        else:
            used |= _bind_standard(submodule, prefix, state, binding)
    binding.unexpected += [key for key in state if key not in used]
    _respect_ties(binding)
    return binding


def named_state(module: Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors that a state dict of ``module`` holds, by name and in its order."""
    return {name: tensor for p, m in _submodules(module, prefix) for name, tensor in _own_tensors(m, p)}


def _walk(module: Module, prefix: str) -> Iterator[tuple[str, Module, bool]]:
    """All modules in the order of a state dict; a module with loading code of its own stands for its whole subtree."""
    is_custom = _has_loading_code(module)
    yield prefix, module, is_custom
    if not is_custom:
        for name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{prefix}{name}.")


def _has_loading_code(module: Module) -> bool:
    cls = type(module)
    return bool(
        cls._load_from_state_dict is not Module._load_from_state_dict
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
    )


def _own_tensors(module: Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer


def _bind_standard(module: Module, prefix: str, state: Mapping[str, Any], binding: Binding) -> set[str]:
    """Match the module's own tensors, not its children's, by name."""
    used = set()
    for name, tensor in _own_tensors(module, prefix):
        binding.tensors[name] = tensor
        if name not in state:
            binding.missing.append(name)
            continue
        used.add(name)
        _offer(binding, name, tensor, state[name])
    if type(module).get_extra_state is not Module.get_extra_state:
        name = prefix + _EXTRA_STATE_KEY_SUFFIX
        if name in state:
            used.add(name)
            value = state[name]
            binding.calls.append(lambda: module.set_extra_state(_in_memory(value)))
        else:
            binding.missing.append(name)
    return used


def _offer(binding: Binding, name: str, tensor: torch.Tensor, value: Any) -> None:
    """Take ``value`` for ``tensor`` if it fits."""
    source = _entry_or_value(value)
    if not isinstance(source, (Entry, torch.Tensor)):
        raise TypeError(f"{name}: expected a tensor in the state dict, found {type(source).__name__}.")
    if not _fits(tuple(tensor.shape), tuple(source.shape)):
        binding.mismatched[name] = (tuple(tensor.shape), tuple(source.shape))
    elif isinstance(source, Entry):
        binding.entries[name] = source
    else:
        binding.values[name] = source


def _entry_or_value(value: Any) -> Any:
    """The entry behind a lazy tensor, or what is there instead once somebody has written to it."""
    if isinstance(value, LazyTensor):
        return value.read() if value.entry is None else value.entry
    return value


def _fits(expected: Shape, found: Shape) -> bool:
    """Equal shapes; a scalar also takes one element, as ``load_state_dict`` allows for old checkpoints."""
    return expected == found or (expected == () and found == (1,))


def _bind_custom(module: Module, prefix: str, state: Mapping[str, Any], metadata: Any, binding: Binding) -> set[str]:
    """Run the loading code of ``module`` and of what is in it on lazy tensors, and note what it would have copied."""
    own = named_state(module, prefix)
    binding.tensors.update(own)
    used = {key for key in state if key.startswith(prefix)}
    offered = {key: state[key] for key in used}
    wrong = {
        name: (tuple(tensor.shape), tuple(offered[name].shape))
        for name, tensor in own.items()
        if name in offered and not _fits(tuple(tensor.shape), tuple(getattr(offered[name], "shape", ())))
    }
    binding.mismatched.update(wrong)
    part = {key[len(prefix) :]: _lazy(value) for key, value in offered.items() if key not in wrong}
    with _Intercept(own) as copies, _AttributesKept(module) as changes, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter", category=UserWarning)
        found = _load_state_dict(module, part, _metadata_below(metadata, prefix))
    for name, value in copies:
        _offer(binding, name, own[name], value)
    binding.calls += changes
    binding.calls += list(_post_hooks(module))
    binding.missing += [prefix + name for name in found.missing_keys if prefix + name not in wrong]
    binding.unexpected += [prefix + name for name in found.unexpected_keys]
    return used


def _post_hooks(module: Module) -> Iterator[Callable[[], object]]:
    """The load hooks of a subtree, to be called once more with the values in place; so far they saw keys alone."""
    for submodule in module.modules():
        for hook in submodule._load_state_dict_post_hooks.values():
            yield partial(hook, submodule, _IncompatibleKeys([], []))


def _load_state_dict(module: Module, state: dict[str, Any], metadata: Any) -> Any:
    """The module's own ``load_state_dict``, for what it says of missing and unexpected keys."""
    torchs_own = inspect.unwrap(Module.load_state_dict)  # below any patch of ours that would bring us here again
    if metadata is not None:
        state = _StateDict(state)
        state._metadata = metadata
    return torchs_own(module, state, strict=False)


class _StateDict(dict[str, Any]):
    """A state dict that carries its modules' versions, as ``Module.state_dict`` gives it."""

    _metadata: Any

    def copy(self) -> _StateDict:
        copied = _StateDict(self)
        copied._metadata = self._metadata
        return copied


def _metadata_below(metadata: Any, prefix: str) -> Any:
    if metadata is None or not prefix:
        return metadata
    root = prefix[:-1]
    return {
        key[len(prefix) :] if key != root else "": value
        for key, value in metadata.items()
        if key == root or key.startswith(prefix)
    }


def _submodules(module: Module, prefix: str) -> Iterator[tuple[str, Module]]:
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _submodules(child, f"{prefix}{name}.")


class _Intercept(TorchFunctionMode):
    """Notes ``copy_`` into any of the given tensors instead of running it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._copies: list[tuple[str, torch.Tensor]] = []

    def __enter__(self) -> list[tuple[str, torch.Tensor]]:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self._copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and id(args[0]) in self._names:
            self._copies.append((self._names[id(args[0])], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


class _AttributesKept:
    """Takes back attributes that become lazy tensors inside the context, and hands them out as calls for later."""

    def __init__(self, module: Module) -> None:
        self._before = [(submodule, dict(vars(submodule))) for submodule in module.modules()]
        self._calls: list[Callable[[], object]] = []

    def __enter__(self) -> list[Callable[[], object]]:
        return self._calls

    def __exit__(self, *_: object) -> None:
        for module, before in self._before:
            for name, value in list(vars(module).items()):
                if value is not before.get(name) and _holds_lazy(value):
                    self._take_back(module, name, before, value)

    def _take_back(self, module: Module, name: str, before: dict[str, Any], value: Any) -> None:
        if name in before:
            vars(module)[name] = before[name]
        else:
            del vars(module)[name]
        device = next((t.device for t in _tensors_in(before.get(name))), None)
        self._calls.append(lambda: setattr(module, name, _in_memory(value, device)))


def _tensors_in(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, torch.Tensor)]


def _holds_lazy(value: Any) -> bool:
    return any(isinstance(item, LazyTensor) for item in _tensors_in(value))


def _in_memory(value: Any, device: torch.device | None = None) -> Any:
    """The value itself, read if it is lazy."""
    if isinstance(value, list):
        return [_in_memory(item, device) for item in value]
    if isinstance(value, LazyTensor):
        return value.read().to(device or value.device)
    return value


def _lazy(value: Any) -> Any:
    return LazyTensor(value) if isinstance(value, Entry) else value


def _respect_ties(binding: Binding) -> None:
    """A tensor that has a value under one of its names is missing under none."""
    provided = {id(binding.tensors[name]) for name in (*binding.entries, *binding.values)}
    binding.missing = [
        name for name in binding.missing if name not in binding.tensors or id(binding.tensors[name]) not in provided
    ]
