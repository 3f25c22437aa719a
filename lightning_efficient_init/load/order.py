"""Tensors of a model that share memory: who has the last word.

``load_state_dict`` copies one tensor after the other, so that of several values for the same memory the last one
counts. Here many threads copy at once, in the order of the file: what shares memory has to be told apart before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.checkpoint.entry import layout_of
from lightning_efficient_init.load.bind import Binding
from lightning_efficient_init.sharding import Part, part_of
from lightning_efficient_init.sinks import PLAIN_TYPES


@dataclass(slots=True, eq=False)  # not frozen: one for each tensor, made five times faster
class Write:
    """One tensor of the model and what is to be written to it.

    Attributes:
        name: The model's name for the tensor.
        tensor: The tensor.
        part: What this rank holds of it, if it has been taken apart; found out here, once.
        entry: Where its value is in a file.
        is_direct: Whether the entry's bytes go straight to the tensor's memory; False if nobody has looked.
    """

    name: str
    tensor: torch.Tensor
    part: Part | None
    entry: Entry
    is_direct: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether other ranks hold parts of the tensor that this one lacks."""
        return self.part is not None and not self.part.is_whole


@dataclass(frozen=True, slots=True, eq=False)
class Writes:
    """What is to be written, in which order: of several values for tied names only the last one.

    Attributes:
        waves: What comes from files: all at once, but those that overlap an earlier tensor come after it, one by one.
        values: Tensors, and the values in memory that are copied into them afterwards.
    """

    waves: list[list[Write]]
    values: list[tuple[torch.Tensor, torch.Tensor]]


def order_writes(tensors: Mapping[str, torch.Tensor], binding: Binding) -> Writes:
    """Put all that is bound in order.

    Args:
        tensors: The model's tensors by name, where they have their memory now.
        binding: What is to be written to which of them.
    """
    entries, values = binding.entries, binding.values
    names = [name for name in binding.tensors if name in entries or name in values]
    if len({id(tensors[name]) for name in names}) < len(names):
        names = _last(names, lambda name: id(tensors[name]))
    direct = binding.direct if tensors is binding.tensors else frozenset()
    parts = {name: part for name in names if name not in direct and (part := part_of(tensors[name])) is not None}
    late: set[str] = set()
    dropped: set[str] = set()
    for group in _overlapping(tensors, [name for name in names if name not in parts] if parts else names, direct):
        first, *others = _last(group, lambda name: _memory_key(tensors[name]))
        late.update(others)
        dropped.update({*group} - {first, *others})
    if dropped:
        names = [name for name in names if name not in dropped]
    writes = [Write(n, tensors[n], parts.get(n), entries[n], n in direct) for n in names if n in entries]
    waves = [writes]
    if late:
        waves = [[write for write in writes if write.name not in late], *([w] for w in writes if w.name in late)]
    return Writes(waves, [(tensors[name], values[name]) for name in names if name in values])


def _last(names: Sequence[str], key: Callable[[str], object]) -> list[str]:
    """Of several names of equal key only the last one."""
    last: dict[object, str] = {}
    for name in reversed(names):
        last.setdefault(key(name), name)
    return [*reversed(last.values())]


def _overlapping(tensors: Mapping[str, torch.Tensor], names: Sequence[str], direct: Set[str]) -> list[list[str]]:
    """Groups of names whose memory has bytes in common, each group in the order of ``names``."""
    spans = sorted(_spans(tensors, names, direct))
    if all(before[1] <= after[0] for before, after in itertools.pairwise(spans)):
        return []  # as nearly always
    groups: list[list[int]] = []
    end = 0
    for start, stop, at in spans:
        if start < end:
            groups[-1].append(at)
        else:
            groups.append([at])
        end = max(end, stop)
    return [[names[at] for at in sorted(group)] for group in groups if len(group) > 1]


def _spans(
    tensors: Mapping[str, torch.Tensor], names: Sequence[str], direct: Set[str]
) -> Iterator[tuple[int, int, int]]:
    """Addresses of the first byte of each and of the end of its last one, and its number; of those with own memory."""
    for at, name in enumerate(names):
        tensor = tensors[name]
        if name in direct:
            num_bytes = tensor.nbytes
        elif type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided:
            num_bytes = layout_of(tuple(tensor.shape), tensor.stride()).extent * tensor.itemsize
        else:
            continue
        if start := tensor.data_ptr():  # 0 on the meta device, and where nothing is
            yield start, start + num_bytes, at


def _memory_key(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same elements of the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
