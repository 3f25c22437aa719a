"""Tensors of a model that share memory: who has the last word.

``load_state_dict`` copies one tensor after the other, so that of several values for the same memory the last one
counts. Here many threads copy at once, in the order of the file: what shares memory has to be told apart before.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.load.bind import Binding
from lightning_efficient_init.sharding import part_of
from lightning_efficient_init.sinks import PLAIN_TYPES

Pair: TypeAlias = tuple[str, torch.Tensor, Entry]


def last_per_memory(tensors: Mapping[str, torch.Tensor], binding: Binding) -> dict[str, Entry | torch.Tensor]:
    """One source, an entry or a value, for each tensor: of several for tied names the last one."""
    sources: dict[str, Entry | torch.Tensor] = {**binding.entries, **binding.values}
    last = {_memory_key(tensors[name]): name for name in binding.tensors if name in sources}
    return {name: sources[name] for name in last.values()}


def waves(pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """All tensors at once; but those that overlap an earlier one come after it, one by one."""
    by_storage: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if _is_plain(pair[1]):
            by_storage[pair[1].untyped_storage()._cdata].append(pair)
    late = [pair for group in by_storage.values() if _overlap([tensor for _, tensor, _ in group]) for pair in group[1:]]
    late_names = {name for name, _, _ in late}
    yield [pair for pair in pairs if pair[0] not in late_names]
    for pair in late:
        yield [pair]


def _memory_key(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same elements of the same memory."""
    if not _is_plain(tensor):
        return id(tensor)
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _is_plain(tensor: torch.Tensor) -> bool:
    is_tensor = type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided and not tensor.is_meta
    return is_tensor and part_of(tensor) is None


def _overlap(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether any two tensors on one storage, taken from their first to their last element, have bytes in common."""
    if len(tensors) < 2:
        return False
    spans = sorted(_span(tensor) for tensor in tensors if tensor.numel())
    return any(end > start for (_, end), (start, _) in itertools.pairwise(spans))


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Where its bytes start in the storage, and where they end."""
    last = sum((int(size) - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.itemsize, (start + last + 1) * tensor.itemsize
