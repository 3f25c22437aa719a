"""The seam between the read pipeline and the memory of a model.

A sink stands for one tensor of the model (or this rank's part of one) and the entry it is to be filled from. It says
which extents of the file it needs and where each one goes. The pipeline moves bytes and casts elements; whatever
else a sink has to do with them (strides, quantization, a partition's padding) it does in ``finish``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Segment:
    """A run of elements in a file, or several at equal distances, and the memory they go to. It does not change.

    It is also the simplest sink: that of a tensor whose bytes go straight to where they belong.

    A load makes one for each tensor, often many thousands: this is a plain class because it is made in a fifth of the
    time of a frozen one, and ``dest`` is a view that is made only where it is needed, since many go without.

    Args:
        file: Path of the file.
        offset: Position of the first element in the file, in bytes.
        dtype: Element type in the file.
        dest: Contiguous tensor of any shape, on any device; its dtype may differ from the file's.
        name: The model's name for the tensor, for messages.
        row_bytes: Bytes of each run, where there are several (rows of a matrix that is cut in its columns); else 0.
        pitch_bytes: From the start of one run to the start of the next.

    Attributes:
        file: Path of the file.
        offset: Position of the first element in the file, in bytes.
        dtype: Element type in the file.
        memory: The tensor as it was given, in its own shape; of a part, what it is a part of.
        device: The device of the memory.
        is_raw: Whether file and memory hold the same bytes, so that nothing has to be cast.
        address: Of the memory's first byte.
        end_address: Of the first byte after it.
        num_bytes: Bytes that the elements take in the file, without what is between runs.
        name: The model's name for the tensor.
        row_bytes: Bytes of each run, where there are several; else 0.
        pitch_bytes: From the start of one run to the start of the next.
    """

    __slots__ = (
        "_dest",
        "_dest_bytes",
        "_first",
        "address",
        "device",
        "dtype",
        "end_address",
        "file",
        "is_raw",
        "memory",
        "name",
        "num_bytes",
        "offset",
        "pitch_bytes",
        "row_bytes",
    )

    scratch_bytes = 0

    def __init__(
        self,
        file: str,
        offset: int,
        dtype: torch.dtype,
        dest: torch.Tensor,
        name: str,
        row_bytes: int = 0,
        pitch_bytes: int = 0,
    ) -> None:
        self.file = file
        self.offset = offset
        self.dtype = dtype
        self.memory = dest
        self.device = dest.device
        self.is_raw = dtype is dest.dtype
        self.address = dest.data_ptr()
        num_bytes = dest.nbytes
        self.end_address = self.address + num_bytes
        self.num_bytes = num_bytes if self.is_raw else dest.numel() * dtype.itemsize
        self.name = name
        self.row_bytes = row_bytes
        self.pitch_bytes = pitch_bytes
        self._first = 0  # element of the memory
        self._dest: torch.Tensor | None = None
        self._dest_bytes: torch.Tensor | None = None

    @property
    def dest(self) -> torch.Tensor:
        """The memory in one dimension, detached."""
        if self._dest is None:
            whole = self.memory.detach().view(-1)
            numel = self.numel
            self._dest = whole if numel == whole.numel() else whole[self._first : self._first + numel]
        return self._dest

    @property
    def dest_bytes(self) -> torch.Tensor:
        """The memory as bytes."""
        if self._dest_bytes is None:
            dest = self.dest.as_strided((len(self.dest),), (1,))  # the stride of one element may be any, but for `view`
            self._dest_bytes = dest if self.memory.dtype is torch.uint8 else dest.view(torch.uint8)
        return self._dest_bytes

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.num_bytes // self.dtype.itemsize

    @property
    def is_current(self) -> bool:
        """Whether the memory is where it was, of the same size and dtype."""
        memory, address = self.memory, self.memory.data_ptr()
        is_raw = self.dtype is memory.dtype
        return address == self.address and address + memory.nbytes == self.end_address and is_raw == self.is_raw

    def segments(self) -> Sequence[Segment]:
        """Itself."""
        return (self,)

    def finish(self) -> None:
        """Nothing is left to do."""

    def cut(self, offset: int, start: int, num_bytes: int) -> Segment:
        """A part of it; one of bytes where nothing has to be cast, so that elements may be torn apart.

        Args:
            offset: Position of the part in the file, in bytes.
            start: Where it starts in the memory, in bytes as the file has them.
            num_bytes: Its size in the file.
        """
        dtype, whole = (torch.uint8, self.dest_bytes) if self.is_raw else (self.dtype, self.dest)
        part = Segment(self.file, offset, dtype, whole, self.name)
        part.num_bytes = num_bytes
        part._first = start // dtype.itemsize
        part.address += part._first * whole.itemsize
        part.end_address = part.address + part.numel * whole.itemsize
        return part


class Sink(Protocol):
    """One tensor of a model, being filled from one entry."""

    @property
    def device(self) -> torch.device:
        """The device on which the values end up."""

    @property
    def scratch_bytes(self) -> int:
        """Memory, in bytes on the device, that is needed beside the tensor itself."""

    def segments(self) -> Sequence[Segment]:
        """What to read, and where to put it. Allocates the scratch, if there is any."""

    def finish(self) -> None:
        """Called once all segments have arrived and the device has completed the copies."""
