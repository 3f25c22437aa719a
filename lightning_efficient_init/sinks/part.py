"""Tensors of which this rank holds a part: no more than that is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.sharding import Part
from lightning_efficient_init.sinks.sink import Segment


class PartSink:
    """Fills this rank's part of one tensor.

    Where the entry is contiguous in the file exactly the part's bytes are read, and go straight to its memory if that
    is contiguous, too. Of any other entry (a transposed view) the whole extent arrives in scratch memory.

    Args:
        name: The model's name for the tensor.
        part: What this rank holds.
        entry: The whole tensor.
    """

    __slots__ = ("_scratch", "entry", "is_direct", "name", "part")

    def __init__(self, name: str, part: Part, entry: Entry) -> None:
        self.name = name
        self.part = part
        self.entry = entry
        self.is_direct = _is_direct(part.memory, entry)
        self._scratch: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of this rank's memory."""
        return self.part.memory.device

    @property
    def scratch_bytes(self) -> int:
        """What arrives, if it cannot go straight to the part's memory, else 0."""
        if self.is_direct or not self.part.memory.numel():
            return 0
        if self.entry.is_contiguous:
            return self.part.memory.numel() * self.entry.dtype.itemsize
        return self.entry.extent_bytes

    def segments(self) -> Sequence[Segment]:
        """One for each stretch of equally distant runs."""
        entry, memory = self.entry, self.part.memory
        if not memory.numel():
            return ()
        if self.is_direct:
            dest = memory.detach().view(-1)
        else:
            numel = self.scratch_bytes // entry.dtype.itemsize
            dest = self._scratch = torch.empty(numel, dtype=entry.dtype, device=memory.device)
        if not entry.is_contiguous:
            return (Segment(entry.file, entry.offset, entry.dtype, dest, self.name),)
        return self._segments_of_part(dest)

    def _segments_of_part(self, dest: torch.Tensor) -> list[Segment]:
        entry, itemsize = self.entry, self.entry.dtype.itemsize
        segments, position = [], 0
        for rows in self.part.rows():
            is_one = rows.count == 1 or rows.length == rows.pitch
            segments.append(
                Segment(
                    entry.file,
                    entry.offset + rows.start * itemsize,
                    entry.dtype,
                    dest[position : position + rows.numel],
                    self.name,
                    row_bytes=0 if is_one else rows.length * itemsize,
                    pitch_bytes=0 if is_one else rows.pitch * itemsize,
                )
            )
            position += rows.numel
        return segments

    def finish(self) -> None:
        """Copies from the scratch, if there was any, and lets it go."""
        if self._scratch is None:
            return
        memory, entry = self.part.memory, self.entry
        with torch.inference_mode():  # which may write to inference tensors as well as to others
            if entry.is_contiguous:
                memory.copy_(self._scratch.view(memory.shape))
            else:
                whole = self._scratch.as_strided(entry.shape, entry.stride).view(self.part.shape)
                memory.copy_(self.part.take(whole))
        self._scratch = None


def _is_direct(memory: torch.Tensor, entry: Entry) -> bool:
    """Whether the part's bytes in the file, cast, are its memory."""
    is_aligned = entry.dtype == memory.dtype or entry.offset % entry.dtype.itemsize == 0
    return entry.is_contiguous and is_aligned and type(memory) is torch.Tensor and memory.is_contiguous()
