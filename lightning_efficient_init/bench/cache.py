"""The page cache: bringing files into it, and out of it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable

_LOWEST_BIT = bytes(value & 1 for value in range(256))  # of what mincore says; the others are reserved
_READ_BYTES = 8 << 20


def warm(files: Iterable[str]) -> None:
    """Read the files, so that they are in the page cache as far as it holds them."""
    buffer = bytearray(_READ_BYTES)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def evict(files: Iterable[str]) -> None:
    """Have the system drop the files' pages. It needs no privilege, but some file systems keep them."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_share(files: Iterable[str]) -> float | None:
    """How much of the files is in the page cache, 0 to 1; None if the system cannot tell."""
    pages = [_pages(path) for path in files]
    if not pages or any(states is None for states in pages):
        return None
    found = b"".join(states for states in pages if states is not None)
    return sum(found) / len(found) if found else 1.0


def _pages(path: str) -> bytes | None:
    """1 for each page of a file that is cached. Unlike a read of a byte here and there, it brings in no others."""
    size = os.path.getsize(path)
    if not size:
        return b""
    states = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        start = ctypes.c_char.from_buffer(mapping)
        try:
            failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), states)
        except AttributeError:
            return None
        finally:
            del start  # or the mapping cannot be closed
    return None if failed else bytes(states).translate(_LOWEST_BIT)
