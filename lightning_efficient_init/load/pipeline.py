"""Moves bytes from files into memory: many threads, each reading and copying on its own.

How it works. The extents to load are cut into reads (``extents.py``). A handful of threads take the next read from a
common list. Each owns a file descriptor and two slots of the ring, which is one anonymous mapping, pinned so that the
device copies from it at full speed. A thread reads into one slot while the device still copies from its other one; an
event per slot says when it is free again. The ring is all the host memory that a load takes, whatever the checkpoint's
size. All copies go through one CUDA stream, which keeps the link to the device busy by itself. With a dozen threads
the GIL is what limits the rate: a lane makes as few calls per read as it can, none of which gives the GIL away for a
moment only (copies are the driver's own calls), and each thread pins its own slots when they are first needed, while
reads are still being planned and others already load.

If the target is on the CPU and nothing has to be cast, the ring is not used: ``preadv`` scatters straight from the
page cache into the parameters.

Values that need work when they arrive (quantization, say) come in batches: while the thread that submitted them works
on one, the others are being read. Threads and ring are the same from the first batch to the last.

Decided against:

- *Mapping the file* (``mmap``): page faults cost more than ``pread`` copies, the resident memory grows to the file's
  size, and a network file system answers an error with a signal instead of an error code. Registering a file's
  mapping with CUDA reached less than half the rate of the ring (18 against 39 GB/s on an H100).
- *A central pool that fills large slots* for one copying thread: 37 GB/s at best in the same setting, and more to
  coordinate.
- *Huge pages under parameters on the CPU* (``madvise`` before the reads). 1 GiB, two threads, a virtual machine: memory
  that the process had used before was filled in 0.23 s instead of 0.45 s, but a fresh process, whose huge pages come
  from the system, took 0.73 s. Populating small pages ahead of the reads made no difference.
- *Advice on reading ahead* (``POSIX_FADV_SEQUENTIAL``, ``WILLNEED`` for chunks to come), reads of 16 to 64 MiB, and
  ``O_DIRECT``, for files that are not cached. 1 GB, two threads, on a virtual machine with two cores, interleaved:
  0.74 to 0.80 GB/s as it is, 0.53 to 0.84 with advice (the device reads ahead by 8 MiB anyway), 0.80 to 0.84 in larger
  reads, 0.69 to 0.93 with ``O_DIRECT``. That saves a copy, and was faster where other jobs had the cores (1.1 against
  0.86), but wants parameters aligned as the disk is, and leaves nothing in the cache for the next process; on an H100
  machine cold reads were 1.6 to 1.8 GB/s with and without.
- *Threads near the device's memory* (NUMA): a thread that pins itself to a node's cores stays off all others, also when
  they are the only idle ones, and where the file's pages are is not known. Whoever starts one process for each device
  binds it from outside (``numactl``, ``taskset``); the threads inherit that, and their number follows the affinity.
- *Many copies in one call of the driver* (``cuMemcpyBatchAsync``, CUDA 12.8). By itself it took 0.8 us for each copy
  instead of 2.7 (an H100, driver 13.0), and was right; in loads of 20,000 and 100,000 tensors by a dozen threads the
  device stopped with "unspecified launch failure", and why was not found.
- *Compiled code*: the threads spend their time in ``preadv``, which releases the GIL; the device does the copies.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from lightning_efficient_init.checkpoint.file import CheckpointFile
from lightning_efficient_init.cores import available_cores
from lightning_efficient_init.driver import copy_stream, copy_to_device
from lightning_efficient_init.load.extents import PAGE_BYTES, Read, Reads
from lightning_efficient_init.sinks import Segment

SLOT_BYTES = 8 << 20
MAX_THREADS = 12  # an H100 machine with 16 cores: 8 threads 25 GB/s, 12 and 16 34 GB/s
SLOTS_PER_THREAD = 2
MIN_HOST_BUFFER_BYTES = 64 << 10
POLL_S = 0.02
_MANY_SEGMENTS = 8
_ALIGNMENT = 64  # no element is larger, and CUDA copies from here at full speed
_HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """How much of the machine a load may use.

    Attributes:
        host_buffer_bytes: Upper bound of the staging memory on the host.
        num_threads: Threads that read; by default the cores this process may use, at most 12.
    """

    host_buffer_bytes: int = 256 << 20
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.host_buffer_bytes, int):
            raise TypeError(f"host_buffer_bytes must be an integer, in bytes, found {self.host_buffer_bytes!r}.")
        if not isinstance(self.num_threads, int | None):
            raise TypeError(f"num_threads must be an integer or None, found {self.num_threads!r}.")
        if self.host_buffer_bytes < MIN_HOST_BUFFER_BYTES:
            raise ValueError(
                f"host_buffer_bytes must be at least {MIN_HOST_BUFFER_BYTES} (64 KiB), found {self.host_buffer_bytes}."
            )
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, found {self.num_threads}.")


class Batch:
    """Segments that are read together, and how far that has come."""

    def __init__(self, reads: Reads) -> None:
        self.done = threading.Event()
        self._lock = threading.Lock()
        self._waiting = iter(reads)
        self._taken: list[Read] = []
        self._num_left = len(reads)
        if not self._num_left:
            self.done.set()

    def take(self) -> Read | None:
        """The next read, for the thread that asks; None if all are taken."""
        with self._lock:
            read = next(self._waiting, None)
            if read is not None:
                self._taken.append(read)
            return read

    def has_read(self) -> None:
        """Note that a read is complete, or on its way to the device."""
        with self._lock:
            self._num_left -= 1
            if not self._num_left:
                self.done.set()

    def names_touched(self) -> list[str]:
        """Names of the tensors that may have been written, wholly or in part."""
        with self._lock:
            return list(dict.fromkeys(segment.name for read in self._taken for segment in read.segments))


class Transfer:
    """Reads segments, batch after batch, into the memory of one device.

    Threads and staging memory are there from the first batch to the last. While one batch is waited for, or worked on,
    those that were submitted after it are being read.

    Args:
        device: Where the segments' destinations are.
        settings: Host memory and threads.
        on_tick: Called from the thread that waits, about every 20 ms, with the number of bytes read so far.
    """

    def __init__(self, device: torch.device, settings: Settings, on_tick: Callable[[int], None] | None = None) -> None:
        self._device = device
        self._stream = copy_stream(device) if device.type == "cuda" else None
        self._num_threads, slot_bytes = divide(settings)
        self._max_read_bytes = slot_bytes - 2 * PAGE_BYTES  # room to align a read in its slot
        self._ring = _Ring(self._num_threads * SLOTS_PER_THREAD, slot_bytes)
        self._on_tick = on_tick
        self._lanes: list[_Lane] = []
        self._waiting: SimpleQueue[Batch | None] = SimpleQueue()
        self._stop = threading.Event()
        self._starting = threading.Lock()
        self._errors: list[BaseException] = []
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="efficient-init")

    @property
    def num_bytes(self) -> int:
        """Bytes read so far, gaps between tensors included."""
        return sum(lane.bytes_read for lane in self._lanes)

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the threads finish the read that they are at; after an exception whatever else waits is dropped."""
        self._stop.set()
        for _lane in self._lanes:
            self._waiting.put(None)
        self._pool.shutdown()

    def submit(self, segments: Sequence[Segment]) -> Batch:
        """Start to read. What the current stream of the device has to do by now is done before memory is written."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        reads = Reads(segments, self._max_read_bytes)
        batch, num_lanes = Batch(reads), min(self._num_threads, len(self._lanes) + len(reads))
        for _lane in range(num_lanes):
            self._waiting.put(batch)
        for number in range(len(self._lanes), num_lanes):
            lane = self._lane(number)
            self._lanes.append(lane)
            self._pool.submit(self._work, lane)
        return batch

    def wait(self, batch: Batch) -> None:
        """Return when all values of a batch are in place, as far as the current stream of the device is concerned.

        Raises:
            CheckpointReadError: The operating system failed to read, several times over.
            CorruptCheckpointError: A file is shorter than its header says.
        """
        while not batch.done.wait(POLL_S):
            if self._errors:
                raise self._errors[0]
            if self._on_tick is not None:
                self._on_tick(self.num_bytes)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _lane(self, number: int) -> _Lane:
        slots = self._ring.slots(number)
        return _StagedLane(self._device, slots) if self._stream is None else _CudaLane(self._stream, slots)

    def _work(self, lane: _Lane) -> None:
        try:
            with self._starting:
                # In a forked process torch makes its pool of threads anew when a new thread first asks for it, and
                # answers "Invalid thread pool!" to whoever asks meanwhile (caffe2/utils/threadpool, torch 2.6 to 2.13).
                torch.get_num_threads()
            with torch.inference_mode(), lane:  # which may write to inference tensors as well as to others
                while self._load_batch(lane):
                    pass
        except BaseException as error:
            self._errors.append(error)
            self._stop.set()

    def _load_batch(self, lane: _Lane) -> bool:
        """Load from the batch that comes next. While a lane waits it holds none, whose memory could not be freed."""
        batch = self._waiting.get()
        while batch is not None and not self._stop.is_set():
            read = batch.take()
            if read is None:
                return True
            lane.load(read)
            batch.has_read()
        return False


def divide(settings: Settings) -> tuple[int, int]:
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

    def slots(self, lane: int) -> list[_Slot]:
        """One lane's slots."""
        return [self._slot(lane * SLOTS_PER_THREAD + number) for number in range(SLOTS_PER_THREAD)]

    def _slot(self, number: int) -> _Slot:
        start, num_bytes = number * self._slot_bytes, self._slot_bytes
        tensor = torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes, offset=start)
        return _Slot(tensor, memoryview(self._map)[start : start + num_bytes])


class _Slot:
    """A buffer, as ``preadv`` sees it and as torch does.

    Views are kept: nearly all reads have the same length, and every call that is not made is one less wait for the GIL.
    """

    def __init__(self, tensor: torch.Tensor, memory: memoryview) -> None:
        self.address = tensor.data_ptr()
        self.num_bytes = tensor.numel()
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
        for segment in read.segments:
            start, num_bytes = segment.offset - read.offset, segment.num_bytes
            if start < position:
                return None
            if start > position:
                buffers.append(self._gap[: start - position])
            buffers.append(_memory(segment.address, num_bytes))
            position = start + num_bytes
        return buffers

    def _read_then_copy(self, read: Read) -> None:
        """Several segments want the same bytes: read them once, copy them to each."""
        buffer = torch.empty(read.num_bytes, dtype=torch.uint8)
        self._fill([_memory(buffer.data_ptr(), read.num_bytes)], read)
        for segment in read.segments:
            start = segment.offset - read.offset
            _copy(buffer[start : start + segment.num_bytes], segment, non_blocking=False)

    def _fill(self, buffers: Sequence[Any], read: Read) -> None:
        """Read all of ``read`` into ``buffers``; rows go into one."""
        if self._file is None or self._file.path != read.file:
            self._close()
            self._file = CheckpointFile(read.file)
        if read.row_bytes:
            whole, row = memoryview(buffers[0]).cast("B"), read.row_bytes
            buffers = [whole[start : start + row] for start in range(0, read.num_bytes, row)]
        self._file.fill(buffers, read.offset, tensor=read.segments[0].name, pitch_bytes=read.pitch_bytes)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()


class _StagedLane(_Lane):
    """A lane that reads into slots and copies from there, casting if need be."""

    def __init__(self, device: torch.device, slots: Sequence[_Slot]) -> None:
        super().__init__()
        self._device = device
        self._slots = slots
        self._turn = 0

    def load(self, read: Read) -> None:
        """Read into the slot whose turn it is, from where elements are as aligned as they are in the file."""
        if self._device.type == "cpu" and all(segment.is_raw for segment in read.segments):
            super().load(read)  # straight to where it belongs
            return
        self._turn = (self._turn + 1) % SLOTS_PER_THREAD
        slot, start = self._slots[self._turn], 0 if read.row_bytes else read.offset % PAGE_BYTES
        self._wait_for(slot)
        self._fill([slot.memory(start, read.num_bytes)], read)
        self._copy(slot, start, read)
        self._release(slot)
        self.bytes_read += read.num_bytes

    def _copy(self, slot: _Slot, start: int, read: Read) -> None:
        """Copy what was read, which is at ``start`` in a slot, to where it belongs."""
        if len(read.segments) < _MANY_SEGMENTS:
            for segment in read.segments:
                raw = slot.view(start + segment.offset - read.offset, segment.num_bytes)
                _copy(raw, segment, non_blocking=True)
        else:
            lead = start % _ALIGNMENT
            num_bytes = -(-(lead + read.num_bytes) // _ALIGNMENT) * _ALIGNMENT
            raw = slot.view(start - lead, num_bytes).to(self._device, non_blocking=True)
            _distribute(raw, read.offset - lead, read.segments)

    def _wait_for(self, slot: _Slot) -> None:
        """Nothing to wait for where copies are synchronous."""

    def _release(self, slot: _Slot) -> None:
        """Nothing to note where copies are synchronous."""


class _CudaLane(_StagedLane):
    """A staged lane with pinned slots, and an event per slot that says when it is free again."""

    def __init__(self, stream: torch.cuda.Stream, slots: Sequence[_Slot]) -> None:
        super().__init__(stream.device, slots)
        self._stream = stream
        self._events: dict[_Slot, torch.cuda.Event] = {}  # of slots that have been used
        self._pinned: set[_Slot] = set()

    def __enter__(self) -> _Lane:
        torch.cuda.set_stream(self._stream)  # of this thread, which ends with the load
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._stream.synchronize()
        for slot in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(slot.address)

    def _copy(self, slot: _Slot, start: int, read: Read) -> None:
        copy = copy_to_device() if slot in self._pinned and all(segment.is_raw for segment in read.segments) else None
        if copy is None:
            super()._copy(slot, start, read)
            return
        base, stream = slot.address + start - read.offset, self._stream.cuda_stream
        for segment in read.segments:
            if copy(segment.address, base + segment.offset, segment.num_bytes, stream):
                super()._copy(slot, start, read)  # torch says what is wrong
                return

    def _wait_for(self, slot: _Slot) -> None:
        if slot in self._events:
            self._events[slot].synchronize()
        else:
            self._events[slot] = torch.cuda.Event()
            self._pin(slot)

    def _pin(self, slot: _Slot) -> None:
        # to pin memory that is there takes a fraction of the time, which all threads spend one after the other
        ctypes.memset(slot.address, 0, slot.num_bytes)
        # where the system forbids it (a small limit of locked memory), copies are slower, not wrong
        if int(torch.cuda.cudart().cudaHostRegister(slot.address, slot.num_bytes, 0)) == 0:
            self._pinned.add(slot)
        else:
            _clear_error(self._device)

    def _release(self, slot: _Slot) -> None:
        self._events[slot].record(self._stream)


def _clear_error(device: torch.device) -> None:
    """Let a kernel that nobody needs take the blame for CUDA's last error in this thread, which goes with that.

    torch's binding of ``cudaHostRegister`` returns an error and leaves it there, for whatever kernel comes next.
    """
    with suppress(RuntimeError):
        torch.ones(1, device=device)


def _copy(raw: torch.Tensor, segment: Segment, *, non_blocking: bool) -> None:
    """Copy the bytes of a segment, on the host or on the device, to its destination."""
    if segment.is_raw:
        segment.dest_bytes.copy_(raw, non_blocking=non_blocking)
    else:
        segment.dest.copy_(raw.to(segment.device, non_blocking=non_blocking).view(segment.dtype))


def _distribute(raw: torch.Tensor, offset: int, segments: Sequence[Segment]) -> None:
    """Copy many segments out of bytes that are on their device already, with one operation for all of a kind.

    Args:
        raw: The bytes of a read, as aligned as they are in the file.
        offset: The position in the file at which ``raw`` would start.
        segments: What is in the read.
    """
    kinds: dict[tuple[torch.dtype, torch.dtype], list[Segment]] = defaultdict(list)
    for segment in segments:
        if segment.offset % segment.dtype.itemsize:
            start = segment.offset - offset
            _copy(raw[start : start + segment.num_bytes], segment, non_blocking=True)
        else:
            kinds[segment.dtype, segment.memory.dtype].append(segment)
    for (dtype, _), members in kinds.items():
        torch._foreach_copy_([segment.dest for segment in members], _windows(raw.view(dtype), offset, members))


def _windows(typed: torch.Tensor, offset: int, segments: Sequence[Segment]) -> list[torch.Tensor]:
    """What each segment is in ``typed``: cut in one go if they do not overlap."""
    itemsize = typed.dtype.itemsize
    spans = [((segment.offset - offset) // itemsize, segment.num_bytes // itemsize) for segment in segments]
    if not _are_disjoint(segments):
        return [typed.narrow(0, start, length) for start, length in spans]
    sizes, position = [], 0
    for start, length in spans:
        sizes += [start - position, length]
        position = start + length
    return list(typed.split([*sizes, len(typed) - position])[1::2])


def _are_disjoint(segments: Sequence[Segment]) -> bool:
    """Whether no byte belongs to two of the segments, which are in order."""
    return all(a.offset + a.num_bytes <= b.offset for a, b in itertools.pairwise(segments))


def _memory(address: int, num_bytes: int) -> ctypes.Array[ctypes.c_char]:
    """The bytes of a tensor on the CPU, for ``preadv``. The tensor must outlive it."""
    return (ctypes.c_char * num_bytes).from_address(address)
