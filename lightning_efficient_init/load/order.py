"""Tensors of a model that share memory: who has the last word.

``load_state_dict`` copies one tensor after the other, so that of several values for the same memory the last one
counts. Here many threads copy at once, in the order of the file: what shares memory has to be told apart before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.checkpoint.entry import layout_of
from lightning_efficient_init.load.bind import Binding
from lightning_efficient_init.sharding import Part, part_of
from lightning_efficient_init.sinks import PLAIN_TYPES, Segment


@dataclass(frozen=True, slots=True, eq=False)
class Writes:
    """What is to be written, in which order: of several values for tied names only the last one.

    Attributes:
        tensors: The model's tensors by name, where they have their memory now.
        entries: Name to where its value is in a file.
        direct: What fills those of ``entries`` whose bytes go straight to the tensor's memory, as far as somebody has
            looked.
        parts: What this rank holds of tensors that have been taken apart; found out here, once.
        waves: Names: all at once, but those that overlap an earlier tensor come after it, one by one. Of each wave what
            comes from files is first.
        values: Name to the value in memory that is copied into the tensor.
    """

    tensors: Mapping[str, torch.Tensor]
    entries: Mapping[str, Entry]
    direct: Mapping[str, Segment]
    parts: Mapping[str, Part]
    waves: list[list[str]]
    values: Mapping[str, torch.Tensor]

    def names(self) -> list[str]:
        """All that comes from files."""
        return [name for wave in self.waves for name in self.read_in(wave)]

    def read_in(self, wave: Iterable[str]) -> list[str]:
        """What comes from files in one wave."""
        return [name for name in wave if name in self.entries]

    def sharded(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` of whose tensors other ranks hold parts that this one lacks."""
        return [name for name in names if (part := self.parts.get(name)) is not None and not part.is_whole]


def order_writes(tensors: Mapping[str, torch.Tensor], binding: Binding) -> Writes:
    """Put all that is bound in order.

    Args:
        tensors: The model's tensors by name, where they have their memory now.
        binding: What is to be written to which of them.
    """
    entries, values = binding.entries, binding.values
    direct = _still_there(binding.direct) if tensors is binding.tensors else {}
    names = [name for name in binding.tensors if name in entries or name in values]
    others = [name for name in names if name not in direct]
    if others and len({id(tensors[name]) for name in names}) < len(names):
        names = _last(names, lambda name: id(tensors[name]))
    parts = {name: part for name in others if (part := part_of(tensors[name])) is not None}
    late: set[str] = set()
    dropped: set[str] = set()
    for group in _overlapping(tensors, [name for name in names if name not in parts] if parts else names, direct):
        first, *later = _last(group, lambda name: _memory_key(tensors[name]))
        late.update(later)
        dropped.update({*group} - {first, *later})
    if dropped:
        names = [name for name in names if name not in dropped]
    waves = [names]
    if late:
        waves = [[name for name in names if name not in late], *([name] for name in names if name in late)]
    return Writes(tensors, entries, direct, parts, waves, values)


def _still_there(direct: Mapping[str, Segment]) -> Mapping[str, Segment]:
    """Those whose memory nobody has exchanged since, as loading code of modules may that are bound after others."""
    moved = {name for name, segment in direct.items() if not segment.is_current}
    return {name: segment for name, segment in direct.items() if name not in moved} if moved else direct


def _last(names: Sequence[str], key: Callable[[str], object]) -> list[str]:
    """Of several names of equal key only the last one."""
    last: dict[object, str] = {}
    for name in reversed(names):
        last.setdefault(key(name), name)
    return [*reversed(last.values())]


def _overlapping(
    tensors: Mapping[str, torch.Tensor], names: Sequence[str], direct: Mapping[str, Segment]
) -> list[list[str]]:
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
    tensors: Mapping[str, torch.Tensor], names: Sequence[str], direct: Mapping[str, Segment]
) -> Iterator[tuple[int, int, int]]:
    """Addresses of the first byte of each and of the end of its last one, and its number; of those with own memory."""
    for at, name in enumerate(names):
        segment = direct.get(name)
        if segment is not None:
            start, end = segment.address, segment.end_address
        elif type(tensor := tensors[name]) in PLAIN_TYPES and tensor.layout is torch.strided:
            start = tensor.data_ptr()
            end = start + layout_of(tuple(tensor.shape), tensor.stride()).extent * tensor.itemsize
        else:
            continue
        if start:  # 0 on the meta device, and where nothing is
            yield start, end, at


def _memory_key(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same elements of the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
