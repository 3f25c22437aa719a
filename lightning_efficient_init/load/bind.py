"""Which tensor of a model takes which value of a state dict.

``torch.nn.Module.load_state_dict`` decides and copies in one go, and takes time quadratic in the number of children.
Here the decision comes first and nothing is copied: the result can be checked as a whole, before any parameter
changes, and handed to the pipeline.

Most modules load in the standard way, and are matched by name. A module that brings loading code of its own (an
overridden ``_load_from_state_dict``, a load hook, a rename in a pre-hook) is asked: see ``own_code.py``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX, _IncompatibleKeys

from lightning_efficient_init.checkpoint import Entry, LazyTensor, as_saved, map_leaves, read_entry
from lightning_efficient_init.deferred import settle
from lightning_efficient_init.load import own_code
from lightning_efficient_init.load.keys import strip_wrappers
from lightning_efficient_init.quantize import QuantizedLayer, QuantizedParameter
from lightning_efficient_init.quantize.state import adopt, find, full_shape, weight_of
from lightning_efficient_init.sharding import (
    FLAT_NAME,
    is_dtensor,
    is_fsdp2_hook,
    part_of,
    reshard,
    shown_whole,
    stand_ins,
)
from lightning_efficient_init.sinks import Segment, is_direct, obstacle, shape_of

Shape = tuple[int, ...]

_WRAPPED_AS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(slots=True)
class Binding:
    """What loading a state dict into a module comes to.

    Attributes:
        module: The module.
        tensors: The model's name for a tensor to that tensor, for all that a state dict of the model holds.
        entries: Name to the entry that fills the tensor.
        direct: What fills those of ``entries`` whose bytes go straight to the tensor's memory (`is_direct`), which is
            where it was when they were bound.
        values: Name to a tensor in memory that is copied into the model's.
        calls: What is left to do afterwards: extra states, hooks, modules that load by code of their own.
        loaded_by_calls: Names of tensors that the calls are to write.
        read_by_calls: Entries that the calls read.
        missing: Names that found nothing.
        unexpected: Keys that match nothing.
        mismatched: Name to (the model's shape, the found shape).
        errors: What else stands in the way, as sentences.
    """

    module: Module
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    direct: dict[str, Segment] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    calls: list[Callable[[], object]] = field(default_factory=list)
    loaded_by_calls: list[str] = field(default_factory=list)
    read_by_calls: list[Entry] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StateTree:
    """What a state dict of a model is made of, in its order; found in one walk.

    Attributes:
        modules: For each module the prefix of its names, which is empty or ends with a dot, and the module.
        tensors: Name to tensor.
    """

    modules: list[tuple[str, Module]]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, module: Module, *, settled: bool = False) -> StateTree:
        """Walk through ``module``; if ``settled``, as it is to be loaded.

        What waits for the end of a recording has been done to it then, and what an evaluation left whole is in parts.
        """
        if settled:
            settle(module)
        modules = list(walk(module))
        if settled:
            reshard([submodule for _, submodule in modules])
        return cls(modules, _tensors_of(modules))


def bind(module: Module, state: Mapping[str, Any], metadata: Any = None, tree: StateTree | None = None) -> Binding:
    """Decide what ``module.load_state_dict(state)`` would copy where.

    Args:
        module: The model; its tensors may be on the meta device.
        state: Key to ``Entry``, ``LazyTensor``, tensor, or another object for extra states.
        metadata: The ``_metadata`` of the state dict: prefix to a dict with the module's version, among others.
        tree: What the model's state dict is made of, if that is known already.
    """
    tree = StateTree.of(module, settled=True) if tree is None else tree
    binding = Binding(module, tree.tensors)
    standard, special = _split(tree.modules)
    by_name = tree.tensors if len(standard) == len(tree.modules) else _tensors_of(standard)
    quantized = [prefix for prefix, submodule in standard if isinstance(submodule, QuantizedLayer)]
    if quantized:
        weights = {f"{prefix}weight" for prefix in quantized}
        by_name = {name: tensor for name, tensor in by_name.items() if name not in weights}
    with torch._C.DisableTorchFunction():  # while construction is recorded, every look at a tensor costs
        _bind_by_name(by_name, state, binding)
    binding.calls += _fsdp2_calls(standard)
    used = _bind_special(special, state, metadata if isinstance(metadata, Mapping) else {}, binding)
    if special:
        _put_in_order(binding)
    binding.unexpected += [key for key in state if key not in by_name and key not in used]
    _refuse_packed(binding)
    _respect_ties(binding)
    return binding


def named_state(module: Module) -> dict[str, torch.Tensor]:
    """The tensors that a state dict of ``module`` holds, by name and in its order."""
    return StateTree.of(module).tensors


class _Sorted:
    """Names in order, so that those below a prefix are found without looking at all of them."""

    def __init__(self, names: Iterable[Any]) -> None:
        self._names = sorted(name for name in names if isinstance(name, str))

    def below(self, prefix: str) -> list[str]:
        """Names that start with ``prefix``, which is empty or ends with a dot."""
        if not prefix:
            return self._names
        after = prefix[:-1] + chr(ord(".") + 1)
        return self._names[bisect_left(self._names, prefix) : bisect_left(self._names, after)]


def walk(module: Module) -> Iterator[tuple[str, Module]]:
    """All modules, each with the prefix of its names, in the order of a state dict."""
    waiting = [("", module)]  # no recursion: a walk by generators takes time quadratic in the depth
    while waiting:
        prefix, module = waiting.pop()
        yield prefix, module
        if children := module._modules:
            waiting += [(_below(prefix, n), child) for n, child in reversed(children.items()) if child is not None]


def _below(prefix: str, name: str) -> str:
    """The prefix of a child's names; wrappers that shard or recompute modules do not count."""
    return prefix if name in _WRAPPED_AS else f"{prefix}{name}."


def _tensors_of(modules: Iterable[tuple[str, Module]]) -> dict[str, torch.Tensor]:
    """The modules' own tensors, not their children's, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for prefix, module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and name != FLAT_NAME:
                tensors[prefix + name] = parameter
        for name, tensor in stand_ins(module).items():
            tensors.setdefault(prefix + name, tensor)
        if buffers := module._buffers:
            transient = module._non_persistent_buffers_set
            tensors |= {prefix + name: b for name, b in buffers.items() if b is not None and name not in transient}
    return tensors


def _split(modules: Iterable[tuple[str, Module]]) -> tuple[list[tuple[str, Module]], list[tuple[str, Module]]]:
    """Modules that load by name, and modules that have code to run; one that loads by code stands for its subtree."""
    standard: list[tuple[str, Module]] = []
    special: list[tuple[str, Module]] = []
    custom = None
    for prefix, module in modules:
        if custom is not None and prefix.startswith(custom):
            continue
        if _has_loading_code(module):
            custom = prefix
            special.append((prefix, module))
            continue
        standard.append((prefix, module))
        if isinstance(module, QuantizedLayer) or type(module).set_extra_state is not Module.set_extra_state:
            special.append((prefix, module))
    return standard, special


def _has_loading_code(module: Module) -> bool:
    cls = type(module)
    if "_fsdp_wrapped_module" in module._modules:
        return False  # FSDP's hooks gather parameters for code that does not know their parts
    is_standard = cls._load_from_state_dict is Module._load_from_state_dict or isinstance(module, QuantizedLayer)
    before, after = module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks
    has_hooks = (before or after) and not all(map(is_fsdp2_hook, (*before.values(), *after.values())))
    return bool(not is_standard or has_hooks)


def _fsdp2_calls(modules: Iterable[tuple[str, Module]]) -> Iterator[Callable[[], object]]:
    """What FSDP2 does after modules have loaded that have no code of their own: it looks for parameters' memory anew.

    What it does before, `reshard` has done.
    """
    for _, module in modules:
        for hook in filter(is_fsdp2_hook, module._load_state_dict_post_hooks.values()):
            yield partial(hook, module, _IncompatibleKeys([], []))


def _bind_by_name(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], binding: Binding) -> None:
    """Match tensors with the values of their names."""
    entries, direct = binding.entries, binding.direct
    for name, tensor in tensors.items():
        value = state.get(name, binding)
        if value is binding:  # which is no value
            binding.missing.append(name)
        elif type(value) is Entry and value.shape == tensor.shape and is_direct(tensor, value):
            entries[name] = value  # as nearly always, often very many: all that there is to ask the tensor is asked now
            direct[name] = Segment(value.file, value.offset, value.dtype, tensor, name)
        else:
            _offer(binding, name, tensor, value)


def _bind_special(
    modules: Sequence[tuple[str, Module]], state: Mapping[str, Any], metadata: Mapping[str, Any], binding: Binding
) -> set[str]:
    """Find out what modules with code of their own would do; gives the keys that are theirs."""
    if not modules:
        return set()
    used: set[str] = set()
    keys, names = _Sorted(state), _Sorted(metadata)
    for prefix, module in modules:
        if _has_loading_code(module):
            found = keys.below(prefix)
            below = {name[len(prefix) :]: metadata[name] for name in names.below(prefix)}
            own = {"": metadata[prefix[:-1]]} if prefix[:-1] in metadata else {}
            _bind_custom(module, prefix, {key: state[key] for key in found}, {**below, **own}, binding)
            used.update(found)
            continue
        if isinstance(module, QuantizedLayer):
            with torch._C.DisableTorchFunction():
                used |= _bind_quantized(module, prefix, state, binding)
        if type(module).set_extra_state is not Module.set_extra_state:
            used.add(_bind_extra_state(module, prefix + _EXTRA_STATE_KEY_SUFFIX, state, binding))
    return used


def _refuse_packed(binding: Binding) -> None:
    """Refuse numbers that mean nothing without the statistics beside them, which a weight in full has no use for."""
    for weight in dict.fromkeys(map(weight_of, binding.unexpected)):
        if weight is not None and (weight in binding.entries or weight in binding.mismatched):
            binding.mismatched.pop(weight, None)
            binding.errors.append(
                f"{weight}: quantized in the checkpoint, in full in the model: build the model inside init_module() "
                "with EfficientInit(quantize=...)"
            )


def _put_in_order(binding: Binding) -> None:
    """Let names come as they do in the model, whoever has bound them."""
    position = {name: number for number, name in enumerate(binding.tensors)}
    binding.entries = {name: binding.entries[name] for name in position if name in binding.entries}
    binding.values = {name: binding.values[name] for name in position if name in binding.values}
    binding.missing.sort(key=lambda name: position.get(name, len(position)))


def _bind_extra_state(module: Module, name: str, state: Mapping[str, Any], binding: Binding) -> str:
    """Hand over an extra state, which may be anything, in the end."""
    if name in state:
        binding.calls.append(partial(_set_extra_state, module, state[name]))
    else:
        binding.missing.append(name)
    return name


def _bind_quantized(layer: QuantizedLayer, prefix: str, state: Mapping[str, Any], binding: Binding) -> set[str]:
    """Match the weight of a quantized layer: in full, or the parts of one that was quantized before."""
    weight = layer.weight
    found = find(layer, state, prefix)
    binding.tensors[f"{prefix}weight"] = weight
    binding.missing += found.missing
    binding.errors += found.errors
    if found.errors or found.missing:
        return found.used
    if not found.is_packed:
        _offer(binding, f"{prefix}weight", weight, found.sources["weight"], full_shape(layer))
        return found.used
    parts = weight.parts() if isinstance(weight, QuantizedParameter) else {}
    for part, source in found.sources.items():
        # a deferred weight has no parts yet: they get memory together with it
        tensor = weight if part == "weight" else parts.get(part, weight)
        binding.tensors[prefix + part] = tensor
        kind = binding.entries if isinstance(source, Entry) else binding.values
        kind[prefix + part] = source
    binding.calls.append(partial(adopt, layer, found.notes))
    return found.used


def _offer(binding: Binding, name: str, tensor: torch.Tensor, value: Any, shape: Shape | None = None) -> None:
    """Take ``value`` for ``tensor``, which the checkpoint has in ``shape``, if it fits."""
    source = _entry_or_value(value)
    if not isinstance(source, (Entry, torch.Tensor)):
        binding.errors.append(f"{name}: expected a tensor, found {type(source).__name__}")
        return
    expected, found = shape or shape_of(tensor), tuple(source.shape)
    if not _fits(expected, found):
        binding.mismatched[name] = (expected, found)
    elif _is_expanded(tensor):
        binding.errors.append(
            f"{name}: expected memory for each of its elements, found a tensor of shape {list(expected)} that was "
            "expanded, in which several elements are one: call .contiguous() on it when the model is built"
        )
    elif isinstance(source, Entry) and (reason := obstacle(tensor, source)) is not None:
        binding.errors.append(f"{name}: {reason}")
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


def _is_expanded(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _set_extra_state(module: Module, state: Any) -> None:
    """Hand over an extra state, which may be anything, with its tensors read."""
    module.set_extra_state(map_leaves(state, (Entry, LazyTensor), _read))


def _read(leaf: Entry | LazyTensor, _: object) -> torch.Tensor:
    return as_saved(leaf.read() if isinstance(leaf, LazyTensor) else read_entry(leaf), leaf)


def _bind_custom(module: Module, prefix: str, state: dict[str, Any], metadata: Any, binding: Binding) -> None:
    """Ask the loading code of ``module``, and of what is in it, what it would copy."""
    own = named_state(module)
    with shown_whole(own.values()):
        answer = own_code.ask(module, own, {key[len(prefix) :]: value for key, value in state.items()}, metadata)
    if not answer.is_plain and any(is_dtensor(t) or ((p := part_of(t)) and not p.is_whole) for t in own.values()):
        answer.errors.append(
            "has loading code of its own that computes what it writes to parameters, of which each rank keeps a part"
        )
    if answer.is_plain:
        for name, value in answer.copies.items():
            _offer(binding, prefix + name, own[name], value)
    else:
        provided = own.keys() - answer.missing - answer.mismatched.keys()
        binding.loaded_by_calls += [prefix + name for name in own if name in provided]
        binding.read_by_calls += [
            entry for value in state.values() if isinstance(entry := _entry_or_value(value), Entry)
        ]
    binding.calls += answer.calls
    binding.missing += [prefix + strip_wrappers(name) for name in answer.missing if name not in answer.mismatched]
    binding.unexpected += [prefix + name for name in answer.unexpected]
    binding.mismatched.update({prefix + name: shapes for name, shapes in answer.mismatched.items()})
    binding.errors += [f"{prefix[:-1] or type(module).__name__}: {error}" for error in answer.errors]


def _respect_ties(binding: Binding) -> None:
    """A tensor that has a value under one of its names is missing under none."""
    if not binding.missing:
        return
    names = (*binding.entries, *binding.values, *binding.loaded_by_calls)
    provided = {id(binding.tensors[name]) for name in names if name in binding.tensors}
    binding.missing = [
        name for name in binding.missing if name not in binding.tensors or id(binding.tensors[name]) not in provided
    ]
