"""Moves bytes from files into memory: many threads, each reading and copying on its own.

How it works. The extents to load are cut into reads (``extents.py``). A handful of threads take the next read from a
common list. Each owns a file descriptor, a CUDA stream and two slots of the ring, which is one anonymous mapping
registered with CUDA once, so that the device copies from it at full speed. A thread reads into one slot while the
device still copies from its other one; an event per slot says when it is free again. The ring is all the host memory
that a load takes, whatever the checkpoint's size. With a dozen threads the GIL is what limits the rate: a lane makes
as few calls per read as it can, and each thread pins its own slots, while the others already load.

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
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import torch

from lightning_efficient_init.checkpoint.file import CheckpointFile
from lightning_efficient_init.errors import CheckpointError
from lightning_efficient_init.load.extents import PAGE_BYTES, Piece, Read, plan_reads
from lightning_efficient_init.sinks import Segment

SLOT_BYTES = 8 << 20
MAX_THREADS = 12  # an H100 machine with 16 cores: 8 threads 25 GB/s, 12 and 16 34 GB/s
SLOTS_PER_THREAD = 2
MIN_HOST_BUFFER_BYTES = 64 << 10
POLL_S = 0.02
_MANY_PIECES = 8
_ALIGNMENT = 64  # no element is larger, and CUDA copies from here at full speed
_HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """How much of the machine a load may use.

    Attributes:
        host_buffer_bytes: Upper bound of the staging memory on the host.
        num_threads: Threads that read; by default the cores this process may run on, at most 12.
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
        on_tick: Called from this thread about every 20 ms with the number of bytes read so far.

    Returns:
        Bytes read, gaps between tensors included.

    Raises:
        CheckpointReadError: The operating system failed to read, several times over.
        CorruptCheckpointError: A file is shorter than its header says.
    """
    by_device: dict[torch.device, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_device[segment.memory.device].append(segment)
    done = 0
    written: list[str] = []
    for device, group in by_device.items():
        pipeline = _Pipeline(device, group, settings)
        try:
            pipeline.run(on_tick and partial(_tick_from, on_tick, done))
        except CheckpointError as error:
            error.add_written([*written, *error.written])
            raise
        done += pipeline.num_bytes
        written += dict.fromkeys(segment.name for segment in group)
    return done


def _tick_from(on_tick: Callable[[int], None], done_before: int, done: int) -> None:
    on_tick(done_before + done)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Pipeline:
    """One load of segments that all go to one device."""

    def __init__(self, device: torch.device, segments: Sequence[Segment], settings: Settings) -> None:
        threads, slot_bytes = _divide(settings)
        self.device = device
        self.reads = plan_reads(segments, slot_bytes - 2 * PAGE_BYTES)  # room to align a read in its slot
        self.num_bytes = sum(read.num_bytes for read in self.reads)
        needs_ring = device.type != "cpu" or not all(segment.is_raw for segment in segments)
        num_lanes = max(1, min(threads, len(self.reads)))
        ring = _Ring(num_lanes * SLOTS_PER_THREAD, slot_bytes) if needs_ring else None
        self._lanes = [_lane(device, ring, i) for i in range(num_lanes)]
        self._waiting: SimpleQueue[Read] = SimpleQueue()
        for read in self.reads:
            self._waiting.put(read)
        self._stop = threading.Event()
        self._starting = threading.Lock()

    def run(self, on_tick: Callable[[int], None] | None) -> None:
        with ThreadPoolExecutor(len(self._lanes), thread_name_prefix="efficient-init") as pool:
            futures = [pool.submit(self._work, lane) for lane in self._lanes]
            try:
                pending = set(futures)
                while pending:
                    _, pending = wait(pending, timeout=POLL_S, return_when=FIRST_EXCEPTION)
                    if any(future.done() and future.exception() for future in futures):
                        self._stop.set()
                    if on_tick is not None:
                        on_tick(sum(lane.bytes_read for lane in self._lanes))
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
        with self._starting:
            # In a forked process torch makes its pool of threads anew when a new thread first asks for it, and
            # answers "Invalid thread pool!" to whoever asks meanwhile (caffe2/utils/threadpool, torch 2.6 to 2.13).
            torch.get_num_threads()
        with torch.inference_mode(), lane:  # which may write to inference tensors as well as to others
            while not self._stop.is_set():
                try:
                    read = self._waiting.get_nowait()
                except Empty:
                    return
                lane.load(read)

    def _names_touched(self) -> list[str]:
        """Names of the tensors that may have been written, wholly or in part."""
        taken = self.reads[: len(self.reads) - self._waiting.qsize()]
        return list(dict.fromkeys(piece.segment.name for read in taken for piece in read.pieces))


def _divide(settings: Settings) -> tuple[int, int]:
    """How many threads, and the bytes of each of their slots, so that all slots fit the host buffer."""
    threads = settings.num_threads or min(MAX_THREADS, available_cores())
    while threads > 1 and settings.host_buffer_bytes < threads * MIN_HOST_BUFFER_BYTES:
        threads //= 2
    slot_bytes = min(SLOT_BYTES, settings.host_buffer_bytes // (threads * SLOTS_PER_THREAD))
    return threads, slot_bytes // PAGE_BYTES * PAGE_BYTES


class _Ring:
    """Staging memory on the host: one anonymous mapping, handed out as slots."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._map = mmap.mmap(-1, num_slots * slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # huge pages take half the time to pin: 0.05 s instead of 0.10 s for 256 MiB on an H100 machine
        if hasattr(mmap, "MADV_HUGEPAGE") and slot_bytes >= _HUGE_PAGE_BYTES:
            self._map.madvise(mmap.MADV_HUGEPAGE)

    def part(self, lane: int) -> tuple[torch.Tensor, list[_Slot]]:
        """One lane's part of the ring, and its slots."""
        num_bytes = SLOTS_PER_THREAD * self._slot_bytes
        start = lane * num_bytes
        whole = torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes, offset=start)
        view = memoryview(self._map)[start : start + num_bytes]
        slots = [slice(i * self._slot_bytes, (i + 1) * self._slot_bytes) for i in range(SLOTS_PER_THREAD)]
        return whole, [_Slot(whole[slot], view[slot]) for slot in slots]


class _Slot:
    """A buffer, as ``preadv`` sees it and as torch does.

    Views are kept: nearly all reads have the same length, and every call that is not made is one less wait for the GIL.
    """

    def __init__(self, tensor: torch.Tensor, memory: memoryview) -> None:
        self._tensor = tensor
        self._memory = memory
        self._views: dict[tuple[int, int], torch.Tensor] = {}

    def memory(self, start: int, num_bytes: int) -> memoryview:
        return self._memory[start : start + num_bytes]

    def view(self, start: int, num_bytes: int) -> torch.Tensor:
        key = start, num_bytes
        if key not in self._views:
            self._views[key] = self._tensor[start : start + num_bytes]
        return self._views[key]


class _Lane:
    """What one thread owns, from its file descriptor on. A lane reads straight into the memory of the parameters."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._file: CheckpointFile | None = None
        self._gap = memoryview(bytearray(PAGE_BYTES))  # where what nobody asked for goes

    def __enter__(self) -> _Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def load(self, read: Read) -> None:
        """Bring one read to where it belongs."""
        buffers = self._buffers(read)
        if buffers is None:
            self._read_then_copy(read)
        else:
            self._fill(buffers, read)
        self.bytes_read += read.num_bytes

    def _buffers(self, read: Read) -> list[Any] | None:
        """The memory of the parameters that ``read`` scatters into; None if several want the same bytes."""
        buffers: list[Any] = []
        position = 0
        for piece in read.pieces:
            if piece.start < position:
                return None
            if piece.start > position:
                buffers.append(self._gap[: piece.start - position])
            buffers.append(_memory(piece.segment.memory, piece.segment_start, piece.num_bytes))
            position = piece.start + piece.num_bytes
        return buffers

    def _read_then_copy(self, read: Read) -> None:
        """Several segments want the same bytes: read them once, copy them to each."""
        buffer = torch.empty(read.num_bytes, dtype=torch.uint8)
        self._fill([_memory(buffer, 0, read.num_bytes)], read)
        for piece in read.pieces:
            _copy(buffer[piece.start : piece.start + piece.num_bytes], piece, non_blocking=False)

    def _fill(self, buffers: Sequence[Any], read: Read) -> None:
        """Read all of ``read`` into ``buffers``."""
        if self._file is None or self._file.path != read.file:
            self._close()
            self._file = CheckpointFile(read.file)
        self._file.fill(buffers, read.offset, read.pieces[0].segment.name)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()


class _StagedLane(_Lane):
    """A lane that reads into slots and copies from there, casting if need be."""

    def __init__(self, device: torch.device, whole: torch.Tensor, slots: list[_Slot]) -> None:
        super().__init__()
        self._device = device
        self._whole = whole
        self._slots = slots
        self._turn = 0

    def load(self, read: Read) -> None:
        """Read into the slot whose turn it is, from where elements are as aligned as they are in the file."""
        self._turn = (self._turn + 1) % SLOTS_PER_THREAD
        slot, start = self._slots[self._turn], read.offset % PAGE_BYTES
        self._wait_for_slot()
        self._fill([slot.memory(start, read.num_bytes)], read)
        if len(read.pieces) < _MANY_PIECES:
            for piece in read.pieces:
                _copy(slot.view(start + piece.start, piece.num_bytes), piece, non_blocking=True)
        else:
            lead = start % _ALIGNMENT
            num_bytes = -(-(lead + read.num_bytes) // _ALIGNMENT) * _ALIGNMENT
            raw = slot.view(start - lead, num_bytes).to(self._device, non_blocking=True)
            _distribute(raw, lead, read.pieces)
        self._release_slot()
        self.bytes_read += read.num_bytes

    def _wait_for_slot(self) -> None:
        """Nothing to wait for where copies are synchronous."""

    def _release_slot(self) -> None:
        """Nothing to note where copies are synchronous."""


class _CudaLane(_StagedLane):
    """A staged lane with pinned slots, a stream of its own, and an event per slot that says when it is free again."""

    def __init__(self, device: torch.device, whole: torch.Tensor, slots: list[_Slot]) -> None:
        super().__init__(device, whole, slots)
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._events = [torch.cuda.Event() for _ in slots]
        self._is_pinned = False

    def __enter__(self) -> _Lane:
        torch.cuda.set_stream(self._stream)  # of this thread, which ends with the load
        # where the system forbids it (a small limit of locked memory), copies are slower, not wrong
        result = torch.cuda.cudart().cudaHostRegister(self._whole.data_ptr(), self._whole.numel(), 0)
        self._is_pinned = int(result) == 0
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._stream.synchronize()
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._whole.data_ptr())

    def _wait_for_slot(self) -> None:
        self._events[self._turn].synchronize()

    def _release_slot(self) -> None:
        self._events[self._turn].record(self._stream)


def _lane(device: torch.device, ring: _Ring | None, number: int) -> _Lane:
    if ring is None:
        return _Lane()
    if device.type == "cuda":
        return _CudaLane(device, *ring.part(number))
    return _StagedLane(device, *ring.part(number))


def _copy(raw: torch.Tensor, piece: Piece, *, non_blocking: bool) -> None:
    """Copy one piece, bytes on the host or on the device, to its segment's destination."""
    segment = piece.segment
    if segment.is_raw:
        dest = segment.dest.view(torch.uint8)[piece.segment_start : piece.segment_start + piece.num_bytes]
        dest.copy_(raw, non_blocking=non_blocking)
    else:
        dest = _destination(piece)
        dest.copy_(raw.to(dest.device, non_blocking=non_blocking).view(segment.dtype))


def _distribute(raw: torch.Tensor, lead: int, pieces: Sequence[Piece]) -> None:
    """Copy many pieces out of bytes that are on their device already, with one operation for all of a kind.

    Args:
        raw: The bytes of a read, as aligned as they are in the file.
        lead: Where in ``raw`` the read starts.
        pieces: The parts of the read.
    """
    kinds: dict[tuple[torch.dtype, torch.dtype], list[Piece]] = defaultdict(list)
    for piece in pieces:
        segment = piece.segment
        if segment.offset % segment.dtype.itemsize:
            _copy(raw[lead + piece.start : lead + piece.start + piece.num_bytes], piece, non_blocking=True)
        else:
            kinds[segment.dtype, segment.memory.dtype].append(piece)
    for (dtype, _), members in kinds.items():
        sources = _windows(raw.view(dtype), lead, members)
        torch._foreach_copy_([_destination(piece) for piece in members], sources)


def _windows(typed: torch.Tensor, lead: int, pieces: Sequence[Piece]) -> list[torch.Tensor]:
    """What each piece is in ``typed``: cut in one go if they do not overlap."""
    itemsize = typed.dtype.itemsize
    spans = [((lead + piece.start) // itemsize, piece.num_bytes // itemsize) for piece in pieces]
    if not _is_disjoint(pieces):
        return [typed.narrow(0, start, length) for start, length in spans]
    sizes, position = [], 0
    for start, length in spans:
        sizes += [start - position, length]
        position = start + length
    return list(typed.split([*sizes, len(typed) - position])[1::2])


def _destination(piece: Piece) -> torch.Tensor:
    """The elements that a piece is for."""
    dest, itemsize = piece.segment.dest, piece.segment.dtype.itemsize
    if piece.num_bytes == piece.segment.num_bytes:
        return dest
    return dest.narrow(0, piece.segment_start // itemsize, piece.num_bytes // itemsize)


def _is_disjoint(pieces: Sequence[Piece]) -> bool:
    """Whether no byte belongs to two of the pieces, which are in the order of their segments."""
    return all(a.start + a.num_bytes <= b.start for a, b in itertools.pairwise(pieces))


def _memory(tensor: torch.Tensor, start: int, num_bytes: int) -> ctypes.Array[ctypes.c_char]:
    """A contiguous CPU tensor's bytes, for ``preadv``. The tensor must outlive it."""
    return (ctypes.c_char * num_bytes).from_address(tensor.data_ptr() + start)
