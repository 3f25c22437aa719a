"""From segments to reads: which runs of bytes are fetched, in which order, and which segment each part is for.

Segments are sorted by file and position and merged into runs. A gap of up to a page is read along (the kernel reads
whole pages anyway), so ten thousand small tensors become a handful of reads; bytes that several segments need are in
one run and are read once. Runs are then cut into reads that fit a buffer. Cuts fall on multiples of a page in the
file, so that no element that is aligned in the file is torn apart.

A segment of many short runs (a part of each row of a matrix) is not one of thousands of reads: a read may consist of
rows, which a lane fetches one by one into consecutive memory, and nothing of what is between them.

A read holds segments whose bytes are all its own: those that it was made for, or parts of one that it does not hold
alone. Nearly all are the former, so that many small tensors cost no more objects here than they are.

Runs are known at once, as one look at each segment is all that they take. Each read is made when its turn comes: of a
large model there are thousands, and the first one should not wait for the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeAlias

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.checkpoint.entry import layout_of
from lightning_efficient_init.sinks import Segment

PAGE_BYTES = 4096

Extent: TypeAlias = tuple[str, int, int]  # file, position of the first byte, number of bytes

_BY_POSITION = attrgetter("file", "offset")
_BY_OFFSET = attrgetter("offset")  # in half the time


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A run of bytes in a file, or rows of bytes, small enough for one buffer, and what they are for by position.

    Attributes:
        file: Path of the file.
        offset: Position of the first byte.
        num_bytes: How many bytes are read.
        segments: What its bytes are for; each is in it as a whole.
        row_bytes: Bytes of each row; 0 for one run.
        pitch_bytes: From the start of one row to the start of the next.
    """

    file: str
    offset: int
    num_bytes: int
    segments: Sequence[Segment]
    row_bytes: int = 0
    pitch_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Segments that touch, overlap, or lie less than a page apart."""

    segments: list[Segment]
    offset: int
    end: int

    def starts(self, max_read_bytes: int) -> list[int]:
        """Where its reads start."""
        base = self.offset - self.offset % PAGE_BYTES
        return [self.offset, *range(base + max_read_bytes, self.end, max_read_bytes)]


class Reads:
    """The extents of segments, cut into reads, in the order of their positions.

    Args:
        segments: What is to be read, in any order.
        max_read_bytes: The most bytes of a read, a multiple of the page size.
    """

    def __init__(self, segments: Sequence[Segment], max_read_bytes: int) -> None:
        is_one_file = len({segment.file for segment in segments}) == 1
        ordered = sorted(segments, key=_BY_OFFSET if is_one_file else _BY_POSITION)
        rows = [s for s in ordered if s.row_bytes]
        runs = list(_runs([s for s in ordered if not s.row_bytes] if rows else ordered))
        self._reads: Iterable[Read] = (read for run in runs for read in _cut(run, max_read_bytes))
        self._count = sum(len(run.starts(max_read_bytes)) for run in runs)
        if rows:
            of_rows = [read for segment in rows for read in _cut_rows(segment, max_read_bytes)]
            self._reads = sorted([*self._reads, *of_rows], key=_BY_POSITION)
            self._count += len(of_rows)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Read]:
        """Each read once: they are made on the way."""
        return iter(self._reads)


def extents_of(entries: Iterable[Entry]) -> list[Extent]:
    """Where in the files the entries are."""
    pieces: Sequence[Entry] = [piece for entry in entries for piece in (entry.pieces if entry.chunks else (entry,))]
    # as `Entry.extent_bytes`, without a call for each of what may be 100,000
    return [(e.file, e.offset, layout_of(e.shape, e.stride).extent * e.dtype.itemsize) for e in pieces]


def num_unique_bytes(extents: Iterable[Extent]) -> int:
    """Bytes of the files that the extents cover, bytes that several of them share counted once."""
    total, last_file, end = 0, "", 0
    for file, offset, num_bytes in sorted(extents):
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
    members: list[Segment] = []
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
        members.append(segment)
        end = max(end, offset + num_bytes)
    if members:
        yield _Run(members, start, end)


def _cut(run: _Run, max_read_bytes: int) -> Iterator[Read]:
    """Cut one run into reads, and what does not fit into one read with them."""
    file, starts = run.segments[0].file, run.starts(max_read_bytes)
    if len(starts) == 1:
        yield Read(file, run.offset, run.end - run.offset, run.segments)
        return
    waiting = iter(run.segments)
    following: Segment | None = next(waiting)
    begun: list[Segment] = []  # that go on in the next read
    for start, end in zip(starts, [*starts[1:], run.end], strict=True):
        held = [_between(segment, start, end) for segment in begun]
        begun = [segment for segment in begun if segment.offset + segment.num_bytes > end]
        while following is not None and following.offset < end:
            if following.offset + following.num_bytes > end:
                begun.append(following)
                following = _between(following, start, end)
            held.append(following)
            following = next(waiting, None)
        yield Read(file, start, end - start, held)


def _between(segment: Segment, start: int, end: int) -> Segment:
    """The part of a segment that is between two positions in the file."""
    first, last = max(segment.offset, start), min(segment.offset + segment.num_bytes, end)
    return segment.cut(first, first - segment.offset, last - first)


def _cut_rows(segment: Segment, max_read_bytes: int) -> Iterator[Read]:
    """Whole rows, as many to a read as fit; a row that does not fit is cut like any run."""
    row, pitch, num_rows = segment.row_bytes, segment.pitch_bytes, segment.num_bytes // segment.row_bytes
    most = max_read_bytes // row
    if most:
        for first in range(0, num_rows, most):
            offset, num_bytes = segment.offset + first * pitch, min(most, num_rows - first) * row
            yield Read(segment.file, offset, num_bytes, [segment.cut(offset, first * row, num_bytes)], row, pitch)
        return
    step = max_read_bytes // segment.dtype.itemsize * segment.dtype.itemsize
    for number in range(num_rows):
        for start in range(0, row, step):
            offset, num_bytes = segment.offset + number * pitch + start, min(step, row - start)
            yield Read(segment.file, offset, num_bytes, [segment.cut(offset, number * row + start, num_bytes)])
