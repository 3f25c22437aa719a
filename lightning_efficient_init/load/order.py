"""Tensors of a model that share memory: who has the last word.

``load_state_dict`` copies one tensor after the other, so that of several values for the same memory the last one
counts. Here many threads copy at once, in the order of the file: what shares memory has to be told apart before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.checkpoint.entry import layout_of
from lightning_efficient_init.load.bind import Binding
from lightning_efficient_init.sharding import part_of
from lightning_efficient_init.sinks import PLAIN_TYPES

Pair: TypeAlias = tuple[str, torch.Tensor, Entry]


@dataclass(frozen=True, slots=True, eq=False)
class Writes:
    """What is to be written, in which order: of several values for tied names only the last one.

    Attributes:
        waves: Name, tensor and entry of what comes from files: all at once, but those that overlap an earlier tensor
            come after it, one by one.
        values: Tensors, and the values in memory that are copied into them afterwards.
    """

    waves: list[list[Pair]]
    values: list[tuple[torch.Tensor, torch.Tensor]]


def order_writes(tensors: Mapping[str, torch.Tensor], binding: Binding) -> Writes:
    """Put all that is bound in order.

    Args:
        tensors: The model's tensors by name, where they have their memory now.
        binding: What is to be written to which of them.
    """
    sources: dict[str, Entry | torch.Tensor] = {**binding.entries, **binding.values}
    names = [name for name in binding.tensors if name in sources]
    if len({id(tensors[name]) for name in names}) < len(names):
        names = _last(names, lambda name: id(tensors[name]))
    late: set[str] = set()
    dropped: set[str] = set()
    for group in _overlapping(tensors, names):
        first, *others = _last(group, lambda name: _memory_key(tensors[name]))
        late.update(others)
        dropped.update({*group} - {first, *others})
    pairs: list[Pair] = []
    values = []
    for name in names:
        if name in dropped:
            continue
        if isinstance(source := sources[name], Entry):
            pairs.append((name, tensors[name], source))
        else:
            values.append((tensors[name], source))
    return Writes([[pair for pair in pairs if pair[0] not in late], *([p] for p in pairs if p[0] in late)], values)


def _last(names: Sequence[str], key: Callable[[str], object]) -> list[str]:
    """Of several names of equal key only the last one."""
    last: dict[object, str] = {}
    for name in reversed(names):
        last.setdefault(key(name), name)
    return [*reversed(last.values())]


def _overlapping(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> list[list[str]]:
    """Groups of names whose memory has bytes in common, each group in the order of ``names``."""
    spans = sorted([span for at, name in enumerate(names) if (span := _span(tensors[name], at))])
    groups: list[list[int]] = []
    end = 0
    for start, stop, at in spans:
        if start < end:
            groups[-1].append(at)
        else:
            groups.append([at])
        end = max(end, stop)
    return [[names[at] for at in sorted(group)] for group in groups if len(group) > 1]


def _span(tensor: torch.Tensor, at: int) -> tuple[int, int, int] | None:
    """Addresses of its first byte and of the end of its last one, and ``at``; None if it has no memory of its own."""
    if type(tensor) not in PLAIN_TYPES or tensor.layout is not torch.strided or tensor.is_meta:
        return None
    if part_of(tensor) is not None:
        return None
    start, num_bytes = tensor.data_ptr(), tensor.nbytes
    if num_bytes and not tensor.is_contiguous():
        num_bytes = layout_of(tuple(tensor.shape), tensor.stride()).extent * tensor.itemsize
    return (start, start + num_bytes, at) if num_bytes else None


def _memory_key(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same elements of the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
