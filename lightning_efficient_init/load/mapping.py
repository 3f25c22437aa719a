"""Parameters on the CPU that are the checkpoint's pages: private mappings, copied by the kernel when written to."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch.nn import Module

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.deferred import named_tensors
from lightning_efficient_init.errors import CheckpointError, CheckpointReadError, CorruptCheckpointError
from lightning_efficient_init.sharding import part_of
from lightning_efficient_init.sinks import PLAIN_TYPES

_Writes: TypeAlias = Mapping[str, tuple[torch.Tensor, Entry]]


def map_entries(model: Module, writes: _Writes) -> None:
    """Let each tensor's memory be its entry's bytes in the file. The tensors keep their identity.

    Args:
        model: Whose tensors they are.
        writes: Name to the tensor, and the entry for it.

    Raises:
        CheckpointError: A tensor cannot be a mapping; nothing has changed.
    """
    _refuse_unmappable(model, writes)
    mappings = _Mappings()
    views = [_view(mappings.storage(name, entry), tensor, entry) for name, (tensor, entry) in writes.items()]
    for (tensor, _), view in zip(writes.values(), views, strict=True):
        tensor.data = view


class _Mappings:
    """The files' mappings: one for each file, and another one where tensors that are not tied share bytes in it."""

    def __init__(self) -> None:
        self._by_file: dict[str, list[tuple[torch.UntypedStorage, _Extents]]] = {}

    def storage(self, name: str, entry: Entry) -> torch.UntypedStorage:
        """A mapping of the entry's file in which no other tensor has its bytes."""
        mappings = self._by_file.setdefault(entry.file, [])
        chosen = next((storage for storage, extents in mappings if extents.add(entry)), None)
        if chosen is None:
            chosen, extents = _map_file(name, entry), _Extents()
            extents.add(entry)
            mappings.append((chosen, extents))
        _check_inside(name, entry, chosen.nbytes())
        return chosen


class _Extents:
    """Runs of bytes that do not overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, entry: Entry) -> bool:
        """Take in the entry's bytes, unless some of them are here already."""
        if not entry.numel:
            return True
        start, end = entry.offset, entry.offset + entry.extent_bytes
        at = bisect_left(self._ends, start + 1)
        if at < len(self._starts) and self._starts[at] < end:
            return False
        self._starts.insert(at, start)
        self._ends.insert(at, end)
        return True


def _map_file(name: str, entry: Entry) -> torch.UntypedStorage:
    try:
        num_bytes = os.path.getsize(entry.file)
    except OSError as error:
        raise CheckpointReadError(
            f"{entry.file}: {error} (tensor {name!r}). Check the path, then load again."
        ) from error
    return torch.UntypedStorage.from_file(entry.file, shared=False, nbytes=num_bytes)  # type: ignore[return-value]


def _check_inside(name: str, entry: Entry, num_bytes: int) -> None:
    end = entry.offset + entry.extent_bytes
    if num_bytes < end:
        raise CorruptCheckpointError(
            f"{entry.file}: expected bytes up to {end} (tensor {name!r}), but the file ends at {num_bytes}. It was "
            "changed after its header was read: copy or download it again."
        )


def _view(storage: torch.UntypedStorage, tensor: torch.Tensor, entry: Entry) -> torch.Tensor:
    first = entry.offset // entry.dtype.itemsize
    return torch.empty(0, dtype=entry.dtype, device="cpu").set_(storage, first, tensor.shape, tensor.stride())


def _refuse_unmappable(model: Module, writes: _Writes) -> None:
    reasons = [f"\n  {name}: {reason}" for name, both in writes.items() if (reason := _obstacle(*both))]
    reasons = reasons or [f"\n  {name}: {other} shows its memory" for name, other in _shown_by_others(model, writes)]
    if reasons:
        raise CheckpointError(
            f"mmap=True: {len(reasons)} of {len(writes)} tensors cannot be the file's own memory."
            f"{''.join(reasons)}\nLoad with mmap=False, which copies them."
        )


def _shown_by_others(model: Module, writes: _Writes) -> Iterator[tuple[str, str]]:
    """Names of tensors whose memory another tensor of the model shows, which would be left behind; and its name."""
    names = {tensor.untyped_storage()._cdata: name for name, (tensor, _) in writes.items()}
    written = {id(tensor) for tensor, _ in writes.values()}
    for name, tensor in named_tensors(model):
        if type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided and id(tensor) not in written:
            owner = names.get(tensor.untyped_storage()._cdata)
            if owner is not None:
                yield owner, name


def _obstacle(tensor: torch.Tensor, entry: Entry) -> str | None:
    if tensor.device.type != "cpu":
        return f"the model has it on {tensor.device}"
    if part_of(tensor) is not None:
        return "it is sharded, and this rank has its part in memory that the strategy has laid out"
    if entry.chunks:
        return f"the checkpoint has it in {len(entry.chunks)} pieces"
    if type(tensor) not in PLAIN_TYPES:
        return f"the model has a {type(tensor).__name__}"
    if tensor.dtype != entry.dtype:
        return f"the model has {tensor.dtype}, the checkpoint {entry.dtype}"
    if not (entry.is_contiguous and tensor.is_contiguous()):
        return "its elements do not follow each other in the checkpoint, or in the model"
    if entry.offset % entry.dtype.itemsize:
        return f"its bytes start at {entry.offset} in the file, not at a multiple of {entry.dtype.itemsize}"
    return None
