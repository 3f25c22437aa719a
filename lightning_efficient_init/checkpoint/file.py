"""Bytes of a checkpoint file by position: bounded by the file's size, retried, never short."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import tenacity

from lightning_efficient_init.checkpoint.entry import Entry
from lightning_efficient_init.checkpoint.wording import DOWNLOAD_AGAIN, explain
from lightning_efficient_init.errors import (
    CheckpointNotFoundError,
    CheckpointReadError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)

_ATTEMPTS: Final = 4
_MAX_BYTES_PER_CALL: Final = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call
_MAX_BUFFERS_PER_CALL: Final = 1024  # IOV_MAX
_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # never waits for a pipe or a device
_HOPELESS: Final = (FileNotFoundError, NotADirectoryError, PermissionError)


class Seal:
    """Files as they are now, for whoever reads them later: another file may be at the path by then.

    Args:
        paths: Absolute paths.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._marks = {path: _mark(path) for path in paths}

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Seal:
        """Of the files that some entries are in."""
        return cls({path for entry in entries for path in _files_of(entry)})

    def check(self, entry: Entry) -> None:
        """Raise if a file that an entry is in has been exchanged or written to.

        Raises:
            CheckpointReadError: It has, or it is gone.
        """
        for path in _files_of(entry):
            self._check_file(path)

    def check_all(self) -> None:
        """Raise as `check` does if any file has been."""
        for path in self._marks:
            self._check_file(path)

    def _check_file(self, path: str) -> None:
        if (found := _mark(path)) != self._marks.get(path, found):
            raise CheckpointReadError(
                explain(
                    path,
                    expected="the file as it was when its header was read",
                    found="another one" if found else "nothing at this path",
                    todo="Read what you need of a checkpoint before its file is replaced, or load it again.",
                )
            )


def _files_of(entry: Entry) -> Iterator[str]:
    return (part.file for part in [chunk.entry for chunk in entry.chunks] or [entry])


def _mark(path: str) -> tuple[int, ...] | None:
    """What tells a file from its successor at the same path; the number of its inode changes on some of FUSE's."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


class CheckpointFile:
    """An open checkpoint file, read by position so that threads may share it.

    Attributes:
        path: Absolute path.
        num_bytes: Size of the file when it was opened.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._descriptor = _open_regular(self.path)
        self.num_bytes = os.fstat(self._descriptor).st_size

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file descriptor back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, offset: int, num_bytes: int, what: str = "data") -> bytes:
        """Reads exactly ``num_bytes`` at ``offset``.

        Args:
            offset: Position in the file, in bytes.
            num_bytes: How much to read.
            what: Name of what is read, for the error.

        Raises:
            CorruptCheckpointError: The file ends before that.
            CheckpointReadError: The operating system failed, also when asked again.
        """
        self.check_inside(offset, num_bytes, what)
        if num_bytes <= _MAX_BYTES_PER_CALL:
            try:
                data = os.pread(self._descriptor, num_bytes, offset)
            except OSError:
                data = b""  # the slow path asks again and reports
            if len(data) == num_bytes:
                return data
        buffer = bytearray(num_bytes)
        self.read_into(memoryview(buffer), offset, what)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int, what: str = "data") -> None:
        """Fills ``buffer``, a memoryview of bytes, from ``offset`` on; raises as `read` does."""
        self.check_inside(offset, len(buffer), what)
        self.fill([buffer], offset)

    def fill(self, buffers: Sequence[Any], offset: int, *, tensor: str | None = None, pitch_bytes: int = 0) -> None:
        """Fills writable buffers of bytes, one after the other, from ``offset`` on.

        Failing and short reads are usual on network file systems: it asks again, with a fresh file descriptor.

        Args:
            buffers: What to fill; none of them empty.
            offset: Position in the file, in bytes.
            tensor: Name of the tensor that is read, for errors.
            pitch_bytes: If given, each buffer's bytes start so many after those of the buffer before.

        Raises:
            CorruptCheckpointError: The file ends before the last buffer is full.
            CheckpointReadError: The operating system failed, also when asked again.
        """
        try:
            _fill(self._descriptor, buffers, offset, pitch_bytes)
        except OSError:
            self._fill_again(buffers, offset, tensor, pitch_bytes)

    def _fill_again(self, buffers: Sequence[Any], offset: int, tensor: str | None, pitch_bytes: int) -> None:
        expected = f"{sum(map(len, buffers))} bytes at position {offset}"
        try:
            for attempt in _attempts():
                with attempt:
                    fresh = os.open(self.path, _FLAGS)
                    try:
                        _fill(fresh, buffers, offset, pitch_bytes)
                    finally:
                        os.close(fresh)
        except _EndOfFileError as error:
            found = f"that the file ends at {error.position} (it is truncated, or was changed while it was read)"
            raise CorruptCheckpointError(
                explain(self.path, tensor=tensor, expected=expected, found=found, todo=DOWNLOAD_AGAIN)
            ) from error
        except OSError as error:
            todo = "Check the disk or the network file system, then load again."
            found = f"{error} ({1 + _ATTEMPTS} attempts)"
            raise CheckpointReadError(
                explain(self.path, tensor=tensor, expected=expected, found=found, todo=todo)
            ) from error

    def check_inside(self, offset: int, num_bytes: int, what: str = "data") -> None:
        """Raises `CorruptCheckpointError` unless the file has those bytes."""
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.num_bytes:
            raise CorruptCheckpointError(
                explain(
                    self.path,
                    expected=f"{what}: {num_bytes} bytes at {offset}",
                    found=f"a file of {self.num_bytes} bytes (truncated or damaged)",
                    todo=DOWNLOAD_AGAIN,
                )
            )


class _EndOfFileError(OSError):
    """The file ends before the bytes that its header promised."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position


def _attempts(*, but: tuple[type[OSError], ...] = ()) -> tenacity.Retrying:
    """Several attempts, a little later each time, at what the system may fail to do for a moment."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, OSError) and not isinstance(error, but)),
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=0.05, max=1.0),
        reraise=True,
    )


def _fill(descriptor: int, buffers: Sequence[Any], offset: int, pitch_bytes: int) -> None:
    """Fill buffers from one run of bytes, or each from a run of its own."""
    if not pitch_bytes:
        _fill_run(descriptor, list(buffers), offset)
        return
    for number, buffer in enumerate(buffers):
        at = offset + number * pitch_bytes
        if os.preadv(descriptor, [buffer], at) != len(buffer):
            _fill_run(descriptor, [buffer], at)


def _fill_run(descriptor: int, buffers: list[Any], offset: int) -> None:
    """``preadv`` until every buffer is full."""
    first = 0
    while first < len(buffers):
        batch = buffers[first : first + _MAX_BUFFERS_PER_CALL]
        count = os.preadv(descriptor, batch, offset)
        offset += count
        if count == 0:
            raise _EndOfFileError(offset)
        if count == sum(map(len, batch)):
            first += len(batch)
            continue
        while count >= len(buffers[first]):
            count -= len(buffers[first])
            first += 1
        buffers[first] = memoryview(buffers[first]).cast("B")[count:]


def _open_regular(path: str) -> int:
    """Opens a regular file; never blocks on a pipe or a device."""
    try:
        descriptor = _attempts(but=_HOPELESS)(os.open, path, _FLAGS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(
            explain(path, expected="a checkpoint", found="nothing at this path", todo="Check the path.")
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointReadError(
            explain(
                path, expected="a file that can be opened", found=str(error), todo="Check the path and its permissions."
            )
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsupportedCheckpointError(
            explain(
                path,
                expected="a regular file",
                found="a folder, pipe, socket or device",
                todo="Copy the checkpoint to a regular file first.",
            )
        )
    return descriptor
