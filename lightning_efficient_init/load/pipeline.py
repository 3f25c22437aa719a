"""Moves bytes from files into memory: many threads, each reading and copying on its own.

How it works. The extents to load are cut into reads (``extents.py``). A handful of threads take the next read from a
common list. Each owns a file descriptor, a CUDA stream and two slots of the ring, which is one anonymous mapping
registered with CUDA once, so that the device copies from it at full speed. A thread reads into one slot while the
device still copies from its other one; an event per slot says when it is free again. The ring is all the host memory
that a load takes, whatever the checkpoint's size.

If the target is on the CPU and nothing has to be cast, there is no ring: ``preadv`` scatters straight from the page
cache into the parameters.

Decided against:

- *Mapping the file* (``mmap``): page faults cost more than ``pread`` copies, the resident memory grows to the file's
  size, and a network file system answers an error with a signal instead of an error code. Registering a file's
  mapping with CUDA reached less than half the rate of the ring (18 against 39 GB/s on an H100).
- *A central pool that fills large slots* for one copying thread: 37 GB/s at best in the same setting, and more to
  coordinate.
- *Compiled code*: the threads spend their time in ``preadv`` and in copies, both of which release the GIL.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from lightning_efficient_init.errors import CheckpointError, CheckpointReadError, CorruptCheckpointError
from lightning_efficient_init.load.extents import PAGE_BYTES, Piece, Read, plan_reads
from lightning_efficient_init.sinks import Segment

SLOT_BYTES = 8 << 20
MAX_THREADS = 16
SLOTS_PER_THREAD = 2
MIN_HOST_BUFFER_BYTES = 64 << 10
POLL_S = 0.01
_IOV_MAX = 1024
_HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """How much of the machine a load may use.

    Attributes:
        host_buffer_bytes: Upper bound of the staging memory on the host.
        num_threads: Threads that read; by default the cores this process may run on, at most 16.
    """

    host_buffer_bytes: int = 256 << 20
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.host_buffer_bytes < MIN_HOST_BUFFER_BYTES:
            raise ValueError(
                f"host_buffer_bytes must be at least {MIN_HOST_BUFFER_BYTES} (64 KiB), found {self.host_buffer_bytes}."
            )
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, found {self.num_threads}.")


def transfer(segments: Sequence[Segment], settings: Settings, on_tick: Callable[[int], None] | None = None) -> int:
    """Read every segment into its destination.

    When this returns, all values are in place and visible to the current stream of each device.

    Args:
        segments: What to read, from any files, to any devices.
        settings: Host memory and threads.
        on_tick: Called from this thread about every 10 ms with the number of bytes read so far.

    Returns:
        Bytes read, gaps between tensors included.

    Raises:
        CheckpointReadError: The operating system failed to read, several times over.
        CorruptCheckpointError: A file is shorter than its header says.
    """
    by_device: dict[torch.device, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_device[segment.dest.device].append(segment)
    done = 0
    for device, group in by_device.items():
        pipeline = _Pipeline(device, group, settings)
        pipeline.run(on_tick and partial(_tick_from, on_tick, done))
        done += pipeline.num_bytes
    return done


def _tick_from(on_tick: Callable[[int], None], done_before: int, done: int) -> None:
    on_tick(done_before + done)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Pipeline:
    """One load of segments that all go to one device."""

    def __init__(self, device: torch.device, segments: Sequence[Segment], settings: Settings) -> None:
        threads = settings.num_threads or min(MAX_THREADS, available_cores())
        slot_bytes = settings.host_buffer_bytes // (threads * SLOTS_PER_THREAD)
        while slot_bytes < MIN_HOST_BUFFER_BYTES // SLOTS_PER_THREAD and threads > 1:
            threads //= 2
            slot_bytes = settings.host_buffer_bytes // (threads * SLOTS_PER_THREAD)
        self.device = device
        self.slot_bytes = _floor_to_page(min(SLOT_BYTES, slot_bytes))
        self.reads = plan_reads(segments, self.slot_bytes - PAGE_BYTES)
        self.num_threads = max(1, min(threads, len(self.reads)))
        self.needs_ring = device.type != "cpu" or not all(segment.is_raw for segment in segments)
        self.num_bytes = sum(read.num_bytes for read in self.reads)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._num_taken = 0
        self._bytes_read = 0

    def run(self, on_tick: Callable[[int], None] | None) -> None:
        ring = _Ring(self.num_threads * SLOTS_PER_THREAD, self.slot_bytes, self.device) if self.needs_ring else None
        try:
            self._run_threads(ring, on_tick)
        finally:
            if ring is not None:
                ring.close()

    def _run_threads(self, ring: _Ring | None, on_tick: Callable[[int], None] | None) -> None:
        lanes = [_Lane(self.device, None if ring is None else ring.slots(i)) for i in range(self.num_threads)]
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="efficient-init") as pool:
            futures = [pool.submit(self._work, lane) for lane in lanes]
            try:
                pending = set(futures)
                while pending:
                    _, pending = wait(pending, timeout=POLL_S, return_when=FIRST_EXCEPTION)
                    if any(future.done() and future.exception() for future in futures):
                        self._stop.set()
                    if on_tick is not None:
                        on_tick(self._bytes_read)
            except BaseException:
                self._stop.set()
                raise
        for future in futures:
            try:
                future.result()
            except CheckpointError as error:
                error.add_written(self._names_touched())
                raise

    def _work(self, lane: _Lane) -> None:
        with lane:
            while (read := self._take()) is not None:
                lane.load(read)
                with self._lock:
                    self._bytes_read += read.num_bytes

    def _take(self) -> Read | None:
        if self._stop.is_set():
            return None
        with self._lock:
            if self._num_taken == len(self.reads):
                return None
            self._num_taken += 1
            return self.reads[self._num_taken - 1]

    def _names_touched(self) -> list[str]:
        """Names of the tensors that may have been written, wholly or in part."""
        taken = itertools.islice(self.reads, self._num_taken)
        return list(dict.fromkeys(piece.segment.name for read in taken for piece in read.pieces))


class _Ring:
    """Staging memory on the host: one anonymous mapping, registered with CUDA, and handed out as slots."""

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device) -> None:
        self.slot_bytes = slot_bytes
        num_bytes = -(-num_slots * slot_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        self._map = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.is_pinned = device.type == "cuda" and self._register(num_bytes)

    def _register(self, num_bytes: int) -> bool:
        """Pin the ring. Where the system forbids it (a small limit of locked memory), copies are slower, not wrong."""
        return int(torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), num_bytes, 0)) == 0

    def slots(self, lane: int) -> list[torch.Tensor]:
        first = lane * SLOTS_PER_THREAD
        starts = [i * self.slot_bytes for i in range(first, first + SLOTS_PER_THREAD)]
        return [self.tensor[start : start + self.slot_bytes] for start in starts]

    def close(self) -> None:
        if self.is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
        self.tensor = torch.empty(0, dtype=torch.uint8)


class _Lane:
    """What one thread owns: a file descriptor, and for a device its slots, its stream and an event per slot."""

    def __init__(self, device: torch.device, slots: list[torch.Tensor] | None) -> None:
        self.device = device
        self.slots = slots
        self._file: str | None = None
        self._fd = -1
        self._turn = 0
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            self._events = [torch.cuda.Event() for _ in range(SLOTS_PER_THREAD)]

    def __enter__(self) -> _Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._is_cuda:
            self._stream.synchronize()

    def load(self, read: Read) -> None:
        if self.slots is None and _is_disjoint(read.pieces):
            self._scatter(read)
        else:
            self._stage(read)

    def _scatter(self, read: Read) -> None:
        """Read straight into the memory of the parameters."""
        buffers, position = [], 0
        for piece in read.pieces:
            if piece.start > position:
                buffers.append(memoryview(bytearray(piece.start - position)))
            buffers.append(_memory(piece.segment.dest, piece.segment_start, piece.num_bytes))
            position = piece.start + piece.num_bytes
        self._fill(buffers, read)

    @torch.no_grad()
    def _stage(self, read: Read) -> None:
        """Read into a slot, then copy each piece, cast if need be."""
        slot = self._free_slot(read)
        self._fill([_memory(slot, 0, read.num_bytes)], read)
        if not self._is_cuda:
            for piece in read.pieces:
                _copy(slot, piece, self.device, non_blocking=False)
            return
        with torch.cuda.stream(self._stream):
            for piece in read.pieces:
                _copy(slot, piece, self.device, non_blocking=True)
            self._events[self._turn].record(self._stream)

    def _free_slot(self, read: Read) -> torch.Tensor:
        """The next slot whose copies are done, from where elements are aligned as they are in the file."""
        if self.slots is None:
            return torch.empty(read.num_bytes, dtype=torch.uint8)
        self._turn = (self._turn + 1) % SLOTS_PER_THREAD
        if self._is_cuda:
            self._events[self._turn].synchronize()
        return self.slots[self._turn][read.offset % PAGE_BYTES :]

    def _fill(self, buffers: list[memoryview], read: Read) -> None:
        """Read all of ``read`` into ``buffers``; failing and short reads (network file systems) are retried."""
        try:
            for attempt in _retrying():
                with attempt, self._reopening_on_error():
                    _read_fully(self._open(read.file), list(buffers), read.offset)
        except _ShortReadError as error:
            raise CorruptCheckpointError(
                f"{read.file}: expected {read.num_bytes} bytes at position {read.offset} (tensor "
                f"{read.pieces[0].segment.name!r}), but the file ends at {error.end}. It is truncated, or was changed "
                "while it was read: copy or download it again."
            ) from error
        except OSError as error:
            raise CheckpointReadError(
                error.errno,
                f"{read.file}: reading {read.num_bytes} bytes at position {read.offset} (tensor "
                f"{read.pieces[0].segment.name!r}) failed {_ATTEMPTS} times: {error}. Check the disk or the network "
                "file system, then load again",
            ) from error

    def _open(self, file: str) -> int:
        if self._file != file:
            self._close()
            self._fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            self._file = file
        return self._fd

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._file = -1, None

    @contextmanager
    def _reopening_on_error(self) -> Iterator[None]:
        """A stale handle of a network file system stays stale: the next attempt opens the file again."""
        try:
            yield
        except OSError:
            self._close()
            raise


_ATTEMPTS = 4


class _ShortReadError(OSError):
    """The file ends before the bytes that its header promised."""

    def __init__(self, end: int) -> None:
        super().__init__()
        self.end = end


def _retrying() -> Retrying:
    return Retrying(
        stop=stop_after_attempt(_ATTEMPTS),
        wait=wait_exponential(multiplier=0.05, max=1.0),
        retry=retry_if_exception_type(OSError),
        reraise=True,
    )


def _read_fully(fd: int, buffers: list[memoryview], offset: int) -> None:
    """``preadv`` until every buffer is full."""
    first = 0
    while first < len(buffers):
        count = os.preadv(fd, buffers[first : first + _IOV_MAX], offset)
        if count == 0:
            raise _ShortReadError(end=offset)
        offset += count
        while first < len(buffers) and count >= len(buffers[first]):
            count -= len(buffers[first])
            first += 1
        if count:
            buffers[first] = buffers[first][count:]


def _copy(slot: torch.Tensor, piece: Piece, device: torch.device, *, non_blocking: bool) -> None:
    """Copy one piece from a slot into its segment's destination."""
    segment = piece.segment
    raw = slot[piece.start : piece.start + piece.num_bytes]
    if segment.is_raw:
        dest = segment.dest.view(torch.uint8)[piece.segment_start : piece.segment_start + piece.num_bytes]
        dest.copy_(raw, non_blocking=non_blocking)
        return
    itemsize = segment.dtype.itemsize
    first = piece.segment_start // itemsize
    dest = segment.dest[first : first + piece.num_bytes // itemsize]
    dest.copy_(raw.to(device, non_blocking=non_blocking).view(segment.dtype))


def _is_disjoint(pieces: Sequence[Piece]) -> bool:
    return all(a.start + a.num_bytes <= b.start for a, b in itertools.pairwise(pieces))


def _memory(tensor: torch.Tensor, start: int, num_bytes: int) -> memoryview:
    """A writable view of a contiguous CPU tensor's bytes."""
    return memoryview((ctypes.c_char * num_bytes).from_address(tensor.data_ptr() + start)).cast("B")


def _floor_to_page(num_bytes: int) -> int:
    return num_bytes // PAGE_BYTES * PAGE_BYTES
