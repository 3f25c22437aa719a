"""Reads whole parts of a checkpoint, such as an optimizer's state, into new tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from copy import deepcopy
from typing import Any

import torch

from lightning_efficient_init.checkpoint import Entry, LazyTensor, Seal, as_saved, map_leaves
from lightning_efficient_init.garbage import collections_paused
from lightning_efficient_init.load.load import stream
from lightning_efficient_init.load.pipeline import Settings
from lightning_efficient_init.load.replicas import Replicas
from lightning_efficient_init.load.report import Meter
from lightning_efficient_init.sinks import sink_for


@collections_paused()
def read_tree(
    tree: Any, device: torch.device, settings: Settings | None = None, replicas: Replicas | None = None
) -> Any:
    """Replace every entry and lazy tensor in ``tree`` by a tensor with its values.

    Args:
        tree: Nested containers, as ``index_checkpoint`` gives them.
        device: Where the tensors go. Scalars (step counters, loss scales) stay on the CPU, where their users read them.
        settings: Host memory and threads.
        replicas: Other ranks that read the same, to share the reading.

    Returns:
        The tree in new containers. What was one tensor in the checkpoint is one tensor here, and what was a parameter
        is one; a parameter and its detached self share their memory.
    """
    tensors: dict[Entry, torch.Tensor] = {}
    names: dict[Entry, str] = {}
    made: dict[tuple[Entry, bool, bool], torch.Tensor] = {}

    def reserve(leaf: Entry | LazyTensor, path: tuple[object, ...]) -> torch.Tensor:
        entry = leaf if isinstance(leaf, Entry) else leaf.entry
        if entry is None:
            assert isinstance(leaf, LazyTensor)
            return as_saved(leaf.read().to(device), leaf)
        if entry not in tensors:
            names[entry] = ".".join(map(str, path))
            target = device if entry.shape else torch.device("cpu")
            tensors[entry] = torch.empty(entry.shape, dtype=entry.dtype, device=target)
        key = entry, leaf.is_parameter, leaf.requires_grad
        if key not in made:
            made[key] = as_saved(tensors[entry], leaf)
        return made[key]

    result = map_leaves(tree, (Entry, LazyTensor), reserve)
    with Meter(sum(entry.extent_bytes for entry in tensors), {device}, progress=None) as meter:
        sharing = replicas and replicas.confirm([names, device.type, settings])
        sinks = [sink_for(name, tensors[entry], entry) for entry, name in names.items()]
        stream(sinks, settings or Settings(), meter, sharing)
    return result


class ReadWhenUsed(dict[str, Any]):
    """A part of a checkpoint: what is under a key is read when somebody takes it out, as real tensors.

    Lazy tensors would not do: nobody expects to be given any, and parameters made of one, generators that take one for
    their state, and C++ that wants memory find none.

    Args:
        tree: Key to nested containers with entries.
        seal: Of the checkpoint's files.
    """

    def __init__(self, tree: Mapping[str, Any], seal: Seal) -> None:
        super().__init__(tree)
        self._seal = seal
        self._unread = set(tree)

    def __getitem__(self, key: str) -> Any:
        if key in self._unread:
            self[key] = read_tree(_sealed(super().__getitem__(key), self._seal), torch.device("cpu"))
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._unread.discard(key)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._unread.discard(key)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # one of its own: `dict(x)` and `{**x}` ask for each value then

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(dict(self).items())  # `torch.load` refuses the global `dict`

    def popitem(self) -> tuple[str, Any]:
        """The last key, as a dict's own method takes it, and its value."""
        if not self:
            raise KeyError("popitem(): dictionary is empty")
        key = next(reversed(self))
        return key, self.pop(key)

    def copy(self) -> dict[str, Any]:
        """A plain dict; reads everything."""
        return dict(self)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return deepcopy(dict(self), memo)


for _name in ("get", "pop", "setdefault", "update", "items", "values", "__eq__"):
    setattr(ReadWhenUsed, _name, getattr(MutableMapping, _name))  # in terms of `__getitem__`, as dict's are not


def _sealed(tree: Any, seal: Seal) -> Any:
    """The same tree, once it is sure that its files are still what they were."""

    def check(entry: Entry, _: object) -> Entry:
        seal.check(entry)
        return entry

    return map_leaves(tree, Entry, check)
