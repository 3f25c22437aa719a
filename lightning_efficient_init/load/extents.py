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
from operator import attrgetter

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.sinks import Segment

PAGE_BYTES = 4096

_BY_POSITION = attrgetter("file", "offset")


@dataclass(slots=True, eq=False)  # not frozen, like `Segment`: one for each tensor
class Piece:
    """The part of one read that belongs to one segment; all numbers are bytes."""

    segment: Segment
    start: int
    segment_start: int
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
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


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Segments that touch, overlap, or lie less than a page apart, with the bytes of each."""

    members: list[tuple[Segment, int]]
    offset: int
    end: int


def plan_reads(segments: Sequence[Segment], max_read_bytes: int) -> list[Read]:
    """Cut the extents of ``segments`` into reads of at most ``max_read_bytes`` (a multiple of the page size)."""
    ordered = sorted(segments, key=_BY_POSITION)
    rows = [s for s in ordered if s.row_bytes]
    runs = [s for s in ordered if not s.row_bytes] if rows else ordered
    reads = [read for run in _runs(runs) for read in _cut(run, max_read_bytes)]
    reads += [read for segment in rows for read in _cut_rows(segment, max_read_bytes)]
    return sorted(reads, key=_BY_POSITION) if rows else reads


def num_unique_bytes(entries: Iterable[Entry]) -> int:
    """Bytes of the files that the entries cover, bytes that several of them share counted once."""
    total, last_file, end = 0, "", 0
    pieces = [piece for entry in entries for piece in (entry.pieces if entry.chunks else (entry,))]
    for file, offset, num_bytes in sorted([(piece.file, piece.offset, piece.extent_bytes) for piece in pieces]):
        if file != last_file:
            last_file, end = file, 0
        stop = offset + num_bytes
        if offset >= end:
            total += num_bytes
            end = stop
        elif stop > end:
            total += stop - end
            end = stop
    return total


def _runs(ordered: Iterable[Segment]) -> Iterator[_Run]:
    """Group segments, which are in the order of their positions, and leave out empty ones."""
    members: list[tuple[Segment, int]] = []
    file, start, end = "", 0, 0
    for segment in ordered:
        num_bytes, offset = segment.num_bytes, segment.offset
        if not num_bytes:
            continue
        if members and (offset > end + PAGE_BYTES or segment.file != file):
            yield _Run(members, start, end)
            members = []
        if not members:
            file, start, end = segment.file, offset, offset
        members.append((segment, num_bytes))
        end = max(end, offset + num_bytes)
    if members:
        yield _Run(members, start, end)


def _cut(run: _Run, max_read_bytes: int) -> list[Read]:
    """Cut one run into reads and give each segment its pieces."""
    file, base = run.members[0][0].file, run.offset - run.offset % PAGE_BYTES
    starts = [run.offset, *range(base + max_read_bytes, run.end, max_read_bytes)]
    reads = [Read(file, a, b - a) for a, b in zip(starts, [*starts[1:], run.end], strict=True)]
    for segment, num_bytes in run.members:
        start = segment.offset - base
        first, last = start // max_read_bytes, (start + num_bytes - 1) // max_read_bytes
        if first == last:
            read = reads[first]
            read.pieces.append(Piece(segment, segment.offset - read.offset, 0, num_bytes))
        else:
            _split(segment, num_bytes, reads[first : last + 1])
    return reads


def _split(segment: Segment, num_bytes: int, reads: Sequence[Read]) -> None:
    """Give a segment that does not fit into one read its piece of each."""
    for read in reads:
        first = max(segment.offset, read.offset)
        last = min(segment.offset + num_bytes, read.offset + read.num_bytes)
        read.pieces.append(Piece(segment, first - read.offset, first - segment.offset, last - first))


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
