"""From segments to reads: which runs of bytes are fetched, in which order, and which segment each part is for.

Segments are sorted by file and position and merged into runs. A gap of up to a page is read along (the kernel reads
whole pages anyway), so ten thousand small tensors become a handful of reads; bytes that several segments need are in
one run and are read once. Runs are then cut into reads that fit a buffer. Cuts fall on multiples of a page in the
file, so that no element that is aligned in the file is torn apart.

A segment of many short runs (a part of each row of a matrix) is not one of thousands of reads: a read may consist of
rows, which a lane fetches one by one into consecutive memory, and nothing of what is between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.sinks import Segment

PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one read that belongs to one segment; all numbers are bytes."""

    segment: Segment
    start: int
    segment_start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Read:
    """A run of bytes in a file, or rows of bytes, small enough for one buffer, and the pieces in it by position.

    Attributes:
        file: Path of the file.
        offset: Position of the first byte.
        num_bytes: How many bytes are read.
        pieces: What belongs to which segment.
        row_bytes: Bytes of each row; 0 for one run.
        pitch_bytes: From the start of one row to the start of the next.
    """

    file: str
    offset: int
    num_bytes: int
    pieces: list[Piece] = field(default_factory=list)
    row_bytes: int = 0
    pitch_bytes: int = 0


def plan_reads(segments: Sequence[Segment], max_read_bytes: int) -> list[Read]:
    """Cut the extents of ``segments`` into reads of at most ``max_read_bytes`` (a multiple of the page size)."""
    ordered = sorted((s for s in segments if s.num_bytes), key=lambda s: (s.file, s.offset))
    reads = [read for run in _runs([s for s in ordered if not s.row_bytes]) for read in _cut(run, max_read_bytes)]
    rows = [read for segment in ordered if segment.row_bytes for read in _cut_rows(segment, max_read_bytes)]
    return sorted([*reads, *rows], key=lambda read: (read.file, read.offset)) if rows else reads


def num_unique_bytes(entries: Iterable[Entry]) -> int:
    """Bytes of the files that the entries cover, bytes that several of them share counted once."""
    total, file, end = 0, "", 0
    pieces = (piece for entry in entries for piece in entry.pieces)
    for entry in sorted(pieces, key=lambda e: (e.file, e.offset)):
        if entry.file != file:
            file, end = entry.file, 0
        stop = entry.offset + entry.extent_bytes
        total += max(0, stop - max(end, entry.offset))
        end = max(end, stop)
    return total


def _runs(ordered: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Group segments that touch, overlap, or lie less than a page apart."""
    run: list[Segment] = []
    end = 0
    for segment in ordered:
        if run and (segment.file != run[0].file or segment.offset > end + PAGE_BYTES):
            yield run
            run = []
        end = max(end, segment.offset + segment.num_bytes) if run else segment.offset + segment.num_bytes
        run.append(segment)
    if run:
        yield run


def _cut(run: Sequence[Segment], max_read_bytes: int) -> list[Read]:
    """Cut one run into reads and give each segment its pieces."""
    offset = run[0].offset
    end = max(segment.offset + segment.num_bytes for segment in run)
    base = offset - offset % PAGE_BYTES
    starts = [offset, *range(base + max_read_bytes, end, max_read_bytes)]
    reads = [Read(run[0].file, a, b - a) for a, b in zip(starts, [*starts[1:], end], strict=True)]
    for segment in run:
        stop = segment.offset + segment.num_bytes
        for read in reads[(segment.offset - base) // max_read_bytes : (stop - 1 - base) // max_read_bytes + 1]:
            first, last = max(segment.offset, read.offset), min(stop, read.offset + read.num_bytes)
            read.pieces.append(Piece(segment, first - read.offset, first - segment.offset, last - first))
    return reads


def _cut_rows(segment: Segment, max_read_bytes: int) -> Iterator[Read]:
    """Whole rows, as many to a read as fit; a row that does not fit is cut like any run."""
    row, pitch, num_rows = segment.row_bytes, segment.pitch_bytes, segment.num_bytes // segment.row_bytes
    most = max_read_bytes // row
    if most:
        for first in range(0, num_rows, most):
            num_bytes = min(most, num_rows - first) * row
            piece = Piece(segment, 0, first * row, num_bytes)
            yield Read(segment.file, segment.offset + first * pitch, num_bytes, [piece], row, pitch)
        return
    step = max_read_bytes // segment.dtype.itemsize * segment.dtype.itemsize
    for number in range(num_rows):
        for start in range(0, row, step):
            num_bytes = min(step, row - start)
            piece = Piece(segment, 0, number * row + start, num_bytes)
            yield Read(segment.file, segment.offset + number * pitch + start, num_bytes, [piece])
