"""One tensor in a checkpoint: where its bytes are, and how to see a tensor in them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a checkpoint file.

    Two entries with equal fields are the same tensor (a tie in the checkpoint); entries whose extents overlap share
    a storage. Elements are little endian; every offset and size has been checked against the file.

    A tensor that is stored in several chunks has an entry that names them; its own position is that of the first one.

    Attributes:
        file: Absolute path of the file that holds the bytes.
        offset: Position of the tensor's first element in the file, in bytes.
        dtype: Element type as stored.
        shape: Sizes, in elements.
        stride: Strides, in elements; never negative.
        chunks: The blocks that it is stored in, where it is not in one piece.
    """

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    chunks: tuple[Chunk, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements, as a contiguous tensor would take them."""
        return self.numel * self.dtype.itemsize

    @property
    def extent_bytes(self) -> int:
        """Bytes in the file from the first element to the end of the last one; 0 for an empty tensor."""
        if self.numel == 0:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    @property
    def pieces(self) -> tuple[Entry, ...]:
        """The entries of its chunks; itself, if it is in one piece."""
        return tuple(chunk.entry for chunk in self.chunks) if self.chunks else (self,)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements follow each other in the file in row-major order, without gaps."""
        if self.chunks:
            return False
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor that is stored on its own.

    Attributes:
        offsets: Where in the tensor it starts, in each dim.
        entry: The block.
    """

    offsets: tuple[int, ...]
    entry: Entry
