"""Modules that load by code of their own: what will that code copy where?

The code is run twice at most. First it is asked: it gets lazy tensors, whatever it writes into the module's tensors is
noted instead of done, and what it changes in attributes, and in lists, sets and dicts that they are (hooks are in such
dicts), is put back. If all it did was to copy values of the state dict into tensors (most renames, prefixes and
forgiving hooks come to that), what it noted is streamed together with the rest of the model. If it did anything else
(concatenated, wrote a part, set an attribute, removed its hook, looked at a tensor after it had loaded it), it runs
once more, for real, when all other values are in place: slower, and right whatever it does.

Decided against: keeping what the first run computed, for a checkpoint in an old layout would then be in memory whole.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_efficient_init.checkpoint import LazyTensor, as_saved, lazy_tree, map_leaves
from lightning_efficient_init.errors import CheckpointError, StateDictMismatchError, shorten
from lightning_efficient_init.patching import ScopedPatch
from lightning_efficient_init.sinks import shape_of

Shape = tuple[int, ...]

_SIZE_MISMATCH = re.compile(
    r"size mismatch for (.*): copying a param with shape (.*) from checkpoint, the shape in current model is (.*)\.$",
    re.DOTALL,
)
_META_WARNING = ".*copying from a non-meta parameter"


@dataclass(slots=True)
class Answer:
    """What a module's own code does with a state dict; names are the module's.

    Attributes:
        copies: Name to the value that it copies into that tensor.
        is_plain: Whether that is all it does.
        calls: What is to be called when all values are in place.
        missing: Names it found nothing for.
        unexpected: Keys it has no use for.
        mismatched: Name to (the module's shape, the found shape).
        errors: Its other complaints.
    """

    copies: dict[str, Any]
    is_plain: bool
    calls: list[Callable[[], object]]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[Shape, Shape]]
    errors: list[str]


def ask(module: Module, own: dict[str, torch.Tensor], state: dict[str, Any], metadata: Any) -> Answer:
    """Run the loading code of ``module``, and of all that is in it, without letting it change anything.

    Args:
        module: The module; its tensors may be on the meta device.
        own: Its tensors, by name.
        state: Its part of the state dict.
        metadata: Name of a submodule to what the state dict says of its version.
    """
    part = {key: lazy_tree(value) if not isinstance(value, LazyTensor) else value for key, value in state.items()}
    notes = _Notes(module, own, part)
    found = _Found()
    kept = _Kept(module)
    is_complete = False
    with kept, notes, _materialize_noted(), _WithoutWarnings():
        try:
            _run(module, part, metadata, found, is_asked=True)
            is_complete = True
        except CheckpointError:
            raise
        except Exception:
            if notes.is_plain:  # else its values are not what it expects, and the run for real will tell
                raise
    is_plain = notes.is_plain and not notes.is_materialized and not kept.has_changed
    mismatched, errors = _sort_errors(found.errors)
    if is_plain:
        calls: list[Callable[[], object]] = [
            partial(hook, submodule, _IncompatibleKeys(list(found.missing), list(found.unexpected)))
            for submodule in module.modules()
            for hook in submodule._load_state_dict_post_hooks.values()
        ]
    else:
        calls = [partial(_run_for_real, module, part, metadata, found, is_complete=is_complete)]
    return Answer(notes.copies, is_plain, calls, found.missing, found.unexpected, mismatched, errors)


@dataclass(slots=True)
class _Found:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def _run(module: Module, state: dict[str, Any], metadata: Any, found: _Found, *, is_asked: bool) -> None:
    """What ``module.load_state_dict(state)`` does, errors collected (torch 2.6 to 2.13).

    While a module is only asked, a hook that follows loading is called if there are names for it to forgive, and not
    otherwise: it would see values that are not there yet.
    """

    def load(module: Module, part: dict[str, Any], prefix: str) -> None:
        versions = metadata.get(prefix[:-1])
        versions = dict(versions) if isinstance(versions, Mapping) else {}
        module._load_from_state_dict(part, prefix, versions, True, found.missing, found.unexpected, found.errors)
        for name, child in module._modules.items():
            if child is not None:
                below = f"{prefix}{name}."
                load(child, {key: value for key, value in part.items() if key.startswith(below)}, below)
        if is_asked and not (found.missing or found.unexpected):
            return
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, _IncompatibleKeys(found.missing, found.unexpected))

    copied: OrderedDict[str, Any] = OrderedDict(state)
    copied._metadata = metadata  # type: ignore[attr-defined]
    load(module, copied, "")


def _run_for_real(module: Module, state: dict[str, Any], metadata: Any, known: _Found, *, is_complete: bool) -> None:
    """Run it once more; what is ``known``, up to its end or not, somebody has agreed to already."""
    found = _Found()
    devices = {submodule: _device_of(submodule) for submodule in module.modules()}
    with _WithoutWarnings():
        _run(module, state, metadata, found, is_asked=False)
    _read_attributes(devices)
    errors = [error for error in found.errors if error not in known.errors]
    if is_complete and (missing := [name for name in found.missing if name not in known.missing]):
        errors.append(f"{shorten(missing)}: not missing when its loading code was first run, to see what it does.")
    if errors:
        raise StateDictMismatchError(f"{type(module).__name__} could not load its part: " + "\n  ".join(errors))


def _sort_errors(errors: list[str]) -> tuple[dict[str, tuple[Shape, Shape]], list[str]]:
    """Take the shapes out of ``load_state_dict``'s messages."""
    mismatched, rest = {}, []
    for error in errors:
        if match := _SIZE_MISMATCH.match(error):
            mismatched[match[1]] = (_shape(match[3]), _shape(match[2]))
        else:
            rest.append(error)
    return mismatched, rest


def _shape(text: str) -> Shape:
    return tuple(map(int, re.findall(r"\d+", text)))


class _Notes(TorchFunctionMode):
    """Notes what is written into a module's tensors instead of doing it.

    Args:
        module: The module.
        own: Its tensors that a state dict holds, by name.
        offered: The state dict.

    Attributes:
        copies: Name to the value that is copied there.
        is_plain: Whether so far nothing happened but copies of whole offered tensors.
        is_materialized: Whether a parameter without a shape was given one.
    """

    def __init__(self, module: Module, own: dict[str, torch.Tensor], offered: dict[str, Any]) -> None:
        super().__init__()
        self.copies: dict[str, Any] = {}
        self.is_plain = True
        self.is_materialized = False
        self._names = {_place(tensor): name for name, tensor in own.items()}
        self._storages = {_storage(tensor) for tensor in own.values()}
        self._storages |= {_storage(tensor) for submodule in module.modules() for tensor in _tensors(submodule)}
        self._written: set[int] = set()
        self._keys = set(offered)
        self._offered = {id(value) for value in offered.values() if isinstance(value, torch.Tensor)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _writes(func, kwargs):
            target = _target(args, kwargs)
            if written := [tensor for tensor in _tensors_in(target) if _storage(tensor) in self._storages]:
                self._note(func, written, args, kwargs)
                return target
        if self._written and not _is_about(func):
            self.is_plain &= not any(_storage(tensor) in self._written for tensor in _tensors_in((args, kwargs)))
        return func(*args, **kwargs)

    def _note(self, func: Any, written: list[torch.Tensor], args: Any, kwargs: Any) -> None:
        target, name = written[0], self._names.get(_place(written[0]))
        self._written.update(map(_storage, written))
        if func is not torch.Tensor.copy_ or name is None:
            self.is_plain = False
            return
        value = self.copies[name] = args[1] if len(args) > 1 else kwargs["other"]
        self.is_plain &= self._is_offered(value, target) or self._is_number(name, value, target)

    def _is_offered(self, value: Any, target: torch.Tensor) -> bool:
        """Whether it is a whole tensor of the state dict."""
        if torch.nn.parameter.is_lazy(target):
            return False
        is_whole = id(value) in self._offered or (isinstance(value, LazyTensor) and value.entry is not None)
        return is_whole and tuple(value.shape) == shape_of(target)

    def _is_number(self, name: str, value: Any, target: torch.Tensor) -> bool:
        """Whether it is a number of the code's own, for which the state dict has nothing (BatchNorm's first step)."""
        is_scalar = type(value) is torch.Tensor and value.dim() == 0 and not value.is_meta
        is_fit = not torch.nn.parameter.is_lazy(target) and shape_of(target) == ()
        return is_scalar and is_fit and name not in self._keys


def _tensors_in(arguments: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation that writes would write to, a tensor or several."""
    out = kwargs.get("out")
    return next(iter((*args, *kwargs.values())), None) if out is None else out


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return func == torch.Tensor.data.__set__ or name in _DUNDER_WRITES  # type: ignore[attr-defined]
    return (name.endswith("_") and name != "requires_grad_") or kwargs.get("out") is not None


_DUNDER_WRITES = frozenset(
    f"__{name}__"
    for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
)
_ABOUT = frozenset({"size", "dim", "numel", "stride", "is_floating_point", "is_complex", "requires_grad_", "__len__"})
_ABOUT_PROPERTIES = tuple(
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "is_meta", "requires_grad", "grad", "is_leaf")
)


def _is_about(func: Any) -> bool:
    """Whether it needs no values."""
    return getattr(func, "__name__", "") in _ABOUT or func in _ABOUT_PROPERTIES


def _storage(tensor: torch.Tensor) -> int:
    """A number for the memory of a tensor."""
    if isinstance(tensor, LazyTensor) or torch.nn.parameter.is_lazy(tensor):
        return id(tensor)
    try:
        return int(tensor.untyped_storage()._cdata)
    except RuntimeError:  # a subclass that has none
        return id(tensor)


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    if torch.nn.parameter.is_lazy(tensor) or tensor.layout is not torch.strided:
        return (id(tensor),)
    return (_storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


#: Parameters of lazy modules keep waiting for a shape while their module is only asked.
_materialize_noted = ScopedPatch(UninitializedTensorMixin, "materialize", lambda original, *args, **kwargs: None)


class _Kept:
    """Puts back what code changes in the attributes of a module and of all in it, and in containers that they are.

    Attributes:
        has_changed: Whether anything had to be put back.
    """

    def __init__(self, module: Module) -> None:
        self.has_changed = False
        self._before = [(found, _plain(found)) for m in module.modules() for found in _containers(m)]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for container, before in self._before:
            if not _are_same(container, before):
                self.has_changed = True
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(before)


def _containers(module: Module) -> Iterator[Any]:
    """The module's attributes, and those of them that hold others: hooks, parameters, lists of the user's own."""
    yield vars(module)
    yield from (value for value in vars(module).values() if isinstance(value, dict | list | set))


def _plain(container: Any) -> Any:
    """What a container holds, in one of Python's own: others (DeepSpeed's) may not know how to copy themselves."""
    return next(kind(container) for kind in (dict, list, set) if isinstance(container, kind))


def _are_same(container: Any, other: Any) -> bool:
    """Whether both hold the same objects."""
    if isinstance(container, dict) and not _are_same([*container.values()], [*other.values()]):
        return False
    return len(container) == len(other) and all(a is b for a, b in zip(container, other, strict=True))


def _attributes(module: Module) -> Iterator[dict[str, Any]]:
    yield from (vars(module), module._parameters, module._buffers, module._modules)


def _device_of(module: Module) -> torch.device | None:
    """Where the module's own tensors are, if it has any."""
    return next((tensor.device for tensor in _tensors(module)), None)


def read_attributes(module: Module) -> None:
    """Replace lazy tensors that code of the user has put into ``module``, as parameters or otherwise, by real ones."""
    _read_attributes({submodule: _device_of(submodule) for submodule in module.modules()})


def _read_attributes(devices: Mapping[Module, torch.device | None]) -> None:
    """Replace lazy tensors that modules' code has put into attributes, on the device where each module was."""
    made: dict[LazyTensor, torch.Tensor] = {}
    for submodule, device in devices.items():
        for attributes in _attributes(submodule):
            for name, value in attributes.items():
                if name not in _OWN_DICTS and _holds_lazy(value):
                    attributes[name] = map_leaves(value, LazyTensor, partial(_real, made, device))


_OWN_DICTS = ("_parameters", "_buffers", "_modules")  # which are looked through by themselves


def _holds_lazy(value: Any) -> bool:
    """Whether an attribute is a lazy tensor, or a container of some: a list, a state dict, an optimizer's state."""
    if isinstance(value, list | tuple | dict):
        return len(value) > 0 and any(isinstance(item, LazyTensor) for item in tree_leaves(value))
    return isinstance(value, LazyTensor)


def _tensors(module: Module) -> Iterator[torch.Tensor]:
    for attributes in _attributes(module):
        for value in attributes.values():
            yield from (
                item for item in (value if isinstance(value, list) else [value]) if isinstance(item, torch.Tensor)
            )


def _real(
    made: dict[LazyTensor, torch.Tensor], device: torch.device | None, lazy: LazyTensor, _: object
) -> torch.Tensor:
    if lazy not in made:  # a tie stays one
        made[lazy] = as_saved(lazy.read().to(device or lazy.device), lazy)
    return made[lazy]


class _WithoutWarnings(warnings.catch_warnings):
    """Keeps torch from saying that copying to the meta device does nothing: here it is noted."""

    def __enter__(self) -> Any:
        log = super().__enter__()
        warnings.filterwarnings("ignore", message=_META_WARNING, category=UserWarning)
        return log
