"""Bytes of a checkpoint file by position: bounded by the file's size, retried, never short."""

from __future__ import annotations

import os
import stat
from typing import Final

import tenacity

from lightning_efficient_init.checkpoint.wording import DOWNLOAD_AGAIN, explain
from lightning_efficient_init.errors import (
    CheckpointNotFoundError,
    CheckpointReadError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)

_ATTEMPTS: Final = 4
_MAX_BYTES_PER_CALL: Final = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call


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
        done = 0
        while done < len(buffer):
            moved = self._read_some(buffer[done : done + _MAX_BYTES_PER_CALL], offset + done)
            if moved == 0:
                raise CorruptCheckpointError(
                    explain(
                        self.path,
                        expected=f"{what}: {len(buffer)} bytes at {offset}",
                        found=f"the end of the file after {done} of them (it shrank while it was read)",
                        todo=DOWNLOAD_AGAIN,
                    )
                )
            done += moved

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

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        """Reads once, again after a failure: network file systems fail for a moment and then go on."""
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(OSError),
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=tenacity.wait_exponential(multiplier=0.05, max=1.0),
            reraise=True,
        )
        try:
            return attempts(os.preadv, self._descriptor, [buffer], offset)
        except OSError as error:
            raise CheckpointReadError(
                explain(
                    self.path,
                    expected=f"{len(buffer)} bytes at {offset}",
                    found=f"{error} ({_ATTEMPTS} attempts)",
                    todo="Check the disk or the network file system, then try again.",
                )
            ) from error


def _open_regular(path: str) -> int:
    """Opens a regular file; never blocks on a pipe or a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
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
