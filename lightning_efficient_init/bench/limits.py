"""What the machine can do at best, measured beside the rows: no load can be faster than these.

They are written without the package's own pipeline, so that they can judge it.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue

import torch

from lightning_efficient_init.bench.task import Task
from lightning_efficient_init.cores import available_cores

_CHUNK_BYTES = 8 << 20
_MAX_THREADS = 16
_COPIES = 16
_Chunk = tuple[str, int, int, int]  # file, offset, bytes, and where they go among all bytes
_Worker = Callable[[Iterator[_Chunk]], None]


def read_rate(files: Sequence[str]) -> float:
    """Bytes per second from the files into buffers that are used again; threads as there are cores."""
    return _rate(files, lambda: _into(_memory(_CHUNK_BYTES), is_reused=True))


def fill_rate(files: Sequence[str]) -> float:
    """Bytes per second from the files into new memory of their size, which a load to the CPU cannot avoid."""
    memory = _memory(max(1, sum(map(os.path.getsize, files))))
    return _rate(files, lambda: _into(memory, is_reused=False))


def ring_rate(files: Sequence[str], task: Task) -> float:
    """Bytes per second from the files through pinned memory to the device."""
    dest = torch.empty(max(1, sum(map(os.path.getsize, files))), dtype=torch.uint8, device=task.device)
    warm_up = [_pinned() for _ in range(2 * _num_threads())]  # the ring is pinned before the clock starts
    return _rate(files, lambda: _to_device(dest, [warm_up.pop(), warm_up.pop()]))


def device_rate(task: Task) -> float:
    """Bytes per second from pinned memory to the device."""
    source = torch.empty(64 << 20, dtype=torch.uint8).pin_memory()
    dest = torch.empty_like(source, device=task.device)
    dest.copy_(source)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(_COPIES):
        dest.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return _COPIES * source.numel() / (time.perf_counter() - started)


def _rate(files: Sequence[str], make_worker: Callable[[], _Worker]) -> float:
    """Let every thread take chunk after chunk."""
    chunks: SimpleQueue[_Chunk] = SimpleQueue()
    for chunk in _chunks(files):
        chunks.put(chunk)
    workers = [make_worker() for _ in range(_num_threads())]
    threads = [threading.Thread(target=worker, args=(_taken_from(chunks),)) for worker in workers]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(map(os.path.getsize, files)) / (time.perf_counter() - started)


def _chunks(files: Iterable[str]) -> Iterator[_Chunk]:
    position = 0
    for file in files:
        size = os.path.getsize(file)
        for offset in range(0, size, _CHUNK_BYTES):
            num_bytes = min(_CHUNK_BYTES, size - offset)
            yield file, offset, num_bytes, position
            position += num_bytes


def _taken_from(chunks: SimpleQueue[_Chunk]) -> Iterator[_Chunk]:
    while True:
        try:
            yield chunks.get_nowait()
        except Empty:
            return


def _num_threads() -> int:
    return min(_MAX_THREADS, available_cores())


def _memory(num_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _into(memory: memoryview, *, is_reused: bool) -> _Worker:
    def work(chunks: Iterator[_Chunk]) -> None:
        with _Files() as files:
            for file, offset, num_bytes, position in chunks:
                start = 0 if is_reused else position
                files.read(file, memory[start : start + num_bytes], offset)

    return work


def _to_device(dest: torch.Tensor, slots: list[torch.Tensor]) -> _Worker:
    def work(chunks: Iterator[_Chunk]) -> None:
        stream = torch.cuda.Stream(dest.device)
        events = [torch.cuda.Event() for _ in slots]
        buffers = [memoryview(slot.numpy().data) for slot in slots]
        with torch.cuda.stream(stream), _Files() as files:
            for turn, (file, offset, num_bytes, position) in enumerate(chunks):
                number = turn % len(slots)
                events[number].synchronize()
                files.read(file, buffers[number][:num_bytes], offset)
                dest[position : position + num_bytes].copy_(slots[number][:num_bytes], non_blocking=True)
                events[number].record(stream)
        stream.synchronize()

    return work


def _pinned() -> torch.Tensor:
    return torch.empty(_CHUNK_BYTES, dtype=torch.uint8).pin_memory()


class _Files:
    """One thread's descriptors."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, file: str, memory: memoryview, offset: int) -> None:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        while memory:
            count = os.preadv(self._descriptors[file], [memory], offset)
            assert count, "the file is shorter than it was"
            memory, offset = memory[count:], offset + count
