"""Tensors that a checkpoint has in several chunks, and the model whole or in parts that are cut otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lightning_efficient_init.checkpoint import Chunk, Entry
from lightning_efficient_init.sharding import Block, Part, Rows, Stretch
from lightning_efficient_init.sinks.sink import Segment


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """What a chunk has for the part.

    Attributes:
        entry: The chunk.
        rows: Where in the chunk it is.
        dest: Where in memory it goes, in the chunk's shape for it; not necessarily contiguous.
    """

    entry: Entry
    rows: tuple[Rows, ...]
    dest: torch.Tensor

    @property
    def is_direct(self) -> bool:
        """Whether the bytes in the file, cast, are the memory."""
        is_aligned = self.entry.dtype == self.dest.dtype or self.entry.offset % self.entry.dtype.itemsize == 0
        return is_aligned and self.dest.is_contiguous() and not (self.dest.is_conj() or self.dest.is_neg())


class ChunkSink:
    """Fills a tensor, or this rank's part of one, from the chunks that have something of it.

    What a chunk has for the part is read and nothing else, straight to its place where that is contiguous. If the part
    is a stretch of the flattened tensor and the chunks are not cut in their first dim, whole chunks are read.

    Args:
        name: The model's name for the tensor.
        part: What this rank holds.
        entry: The whole tensor, in chunks.
    """

    __slots__ = ("_finish", "_pieces", "_whole_bytes", "entry", "name", "part")

    def __init__(self, name: str, part: Part, entry: Entry) -> None:
        self.name = name
        self.part = part
        self.entry = entry
        self._finish: list[Callable[[], object]] = []
        found = _pieces(part, entry)
        self._pieces = found or []
        self._whole_bytes = 0 if found is not None else entry.num_bytes

    @property
    def device(self) -> torch.device:
        """The device of this rank's memory."""
        return self.part.memory.device

    @property
    def scratch_bytes(self) -> int:
        """What arrives in scratch memory before it is put in its place."""
        scattered = sum(p.dest.numel() * p.entry.dtype.itemsize for p in self._pieces if not p.is_direct)
        return self._whole_bytes or scattered

    def segments(self) -> Sequence[Segment]:
        """One for each stretch of equally distant runs in each chunk."""
        pieces = self._pieces
        if self._whole_bytes:
            whole = torch.empty(self.entry.shape, dtype=self.entry.dtype, device=self.device)
            pieces = list(_pieces(_all_of(whole), self.entry) or ())
            self._finish.append(partial(self._take, whole))
        return [segment for piece in pieces for segment in self._segments_of(piece)]

    def _segments_of(self, piece: _Piece) -> Iterator[Segment]:
        entry, itemsize = piece.entry, piece.entry.dtype.itemsize
        if piece.is_direct:
            dest = piece.dest.detach().view(-1)
        else:
            scratch = torch.empty(piece.dest.shape, dtype=entry.dtype, device=self.device)
            dest = scratch.view(-1)
            self._finish.append(partial(_copy, piece.dest, scratch))
        position = 0
        for rows in piece.rows:
            is_one = rows.count == 1 or rows.length == rows.pitch
            row, pitch = (0, 0) if is_one else (rows.length * itemsize, rows.pitch * itemsize)
            target = dest[position : position + rows.numel]
            yield Segment(entry.file, entry.offset + rows.start * itemsize, entry.dtype, target, self.name, row, pitch)
            position += rows.numel

    def _take(self, whole: torch.Tensor) -> None:
        _copy(self.part.memory, self.part.take(whole))

    def finish(self) -> None:
        """Copies from the scratch, if there was any, and lets it go."""
        for copy in reversed(self._finish):
            copy()
        self._finish.clear()


def _copy(dest: torch.Tensor, source: torch.Tensor) -> None:
    with torch.inference_mode():  # which may write to inference tensors as well as to others
        dest.copy_(source)


def _pieces(part: Part, entry: Entry) -> list[_Piece] | None:
    """What each chunk has for ``part``; None where that has no simple shape."""
    if not all(chunk.entry.is_contiguous for chunk in entry.chunks):
        return None
    if isinstance(part, Block) and all(len(runs) <= 1 for runs in part.kept):
        return [piece for chunk in entry.chunks if (piece := _block_of(chunk, part)) is not None]
    inner = entry.shape[1:]
    if isinstance(part, Stretch) and all(chunk.entry.shape[1:] == inner for chunk in entry.chunks):
        return [piece for chunk in entry.chunks if (piece := _stretch_of(chunk, part)) is not None]
    return None


def _block_of(chunk: Chunk, part: Block) -> _Piece | None:
    dest, kept = part.memory, []
    for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.entry.shape, strict=True)):
        start, stop = part.kept[dim][0] if part.kept[dim] else (0, 0)
        first, end = max(start, offset), min(stop, offset + size)
        if first >= end:
            return None
        kept.append(((first - offset, end - offset),))
        dest = dest.narrow(dim, first - start, end - first)
    return _Piece(chunk.entry, tuple(Block(chunk.entry.shape, tuple(kept), dest).rows()), dest)


def _stretch_of(chunk: Chunk, part: Stretch) -> _Piece | None:
    offset = chunk.offsets[0] * math.prod(part.shape[1:])
    first = max(part.start, offset)
    end = min(part.start + part.memory.numel(), offset + chunk.entry.numel)
    if first >= end:
        return None
    dest = part.memory[first - part.start : end - part.start]
    return _Piece(chunk.entry, (Rows(first - offset, end - first),), dest)


def _all_of(whole: torch.Tensor) -> Block:
    return Block(tuple(whole.shape), tuple(((0, size),) for size in whole.shape), whole)
