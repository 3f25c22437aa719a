"""The page cache: bringing files into it, and out of it."""

from __future__ import annotations

import os
from collections.abc import Iterable

_PROBES = 256
_PAGE_BYTES = 4096
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
    """How much of the files is in the page cache, 0 to 1, by looking here and there; None if the system cannot tell."""
    found = [is_in for path in files for is_in in _probe(path)]
    return None if None in found or not found else sum(map(bool, found)) / len(found)


def _probe(path: str) -> list[bool | None]:
    size = os.path.getsize(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [_is_cached(descriptor, size * i // _PROBES // _PAGE_BYTES * _PAGE_BYTES) for i in range(_PROBES)]
    finally:
        os.close(descriptor)


def _is_cached(descriptor: int, offset: int) -> bool | None:
    """Whether one byte can be read without waiting for a disk."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return None
