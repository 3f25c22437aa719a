"""Parameters on the CPU that are the checkpoint's pages: private mappings, copied by the kernel when written to."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.errors import CheckpointError

Pairs = Sequence[tuple[str, torch.Tensor, Entry]]


def map_entries(pairs: Pairs) -> None:
    """Let each tensor's memory be its entry's bytes in the file. The tensors keep their identity.

    Args:
        pairs: Name, tensor and entry.

    Raises:
        CheckpointError: A tensor cannot be a mapping; nothing has changed.
    """
    _refuse_unmappable(pairs)
    storages: dict[str, torch.UntypedStorage] = {}
    for _, tensor, entry in pairs:
        if entry.file not in storages:
            size = os.path.getsize(entry.file)
            storages[entry.file] = torch.UntypedStorage.from_file(  # type: ignore[assignment]
                entry.file, shared=False, nbytes=size
            )
        tensor.data = _view(storages[entry.file], entry)


def _view(storage: torch.UntypedStorage, entry: Entry) -> torch.Tensor:
    empty = torch.empty(0, dtype=entry.dtype)
    return empty.set_(storage, entry.offset // entry.dtype.itemsize, entry.shape, entry.stride)


def _refuse_unmappable(pairs: Pairs) -> None:
    reasons = [f"\n  {name}: {reason}" for name, tensor, entry in pairs if (reason := _obstacle(tensor, entry))]
    if reasons:
        raise CheckpointError(
            f"mmap=True: {len(reasons)} of {len(pairs)} tensors cannot be the file's own memory."
            f"{''.join(reasons)}\nLoad with mmap=False, which copies them."
        )


def _obstacle(tensor: torch.Tensor, entry: Entry) -> str | None:
    if tensor.device.type != "cpu":
        return f"the model has it on {tensor.device}"
    if tensor.dtype != entry.dtype:
        return f"the model has {tensor.dtype}, the checkpoint {entry.dtype}"
    if entry.offset % entry.dtype.itemsize:
        return f"its bytes start at {entry.offset} in the file, not at a multiple of {entry.dtype.itemsize}"
    return None
