"""One tensor in a checkpoint: where its bytes are, and how to see a tensor in them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch


@dataclass(
    slots=True, unsafe_hash=True
)  # not frozen: a checkpoint may have 100,000, and this is made five times faster
class Entry:
    """One tensor in a checkpoint file; a value, which nobody changes.

    Two equal entries are the same tensor (a tie in the checkpoint), be one a parameter and the other its values;
    entries whose extents overlap share a storage. Elements are little endian; every offset and size has been checked
    against the file.

    A tensor that is stored in several chunks has an entry that names them; its own position is that of the first one.

    Attributes:
        file: Absolute path of the file that holds the bytes.
        offset: Position of the tensor's first element in the file, in bytes.
        dtype: Element type as stored.
        shape: Sizes, in elements.
        stride: Strides, in elements; never negative.
        chunks: The blocks that it is stored in, where it is not in one piece.
        requires_grad: Whether it required gradients when it was saved; tensors of state dicts do not.
        is_parameter: Whether it was saved as a `torch.nn.Parameter`.
    """

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    chunks: tuple[Chunk, ...] = ()
    requires_grad: bool = field(default=False, compare=False)
    is_parameter: bool = field(default=False, compare=False)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return layout_of(self.shape, self.stride).numel

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements, as a contiguous tensor would take them."""
        return layout_of(self.shape, self.stride).numel * self.dtype.itemsize

    @property
    def extent_bytes(self) -> int:
        """Bytes in the file from the first element to the end of the last one; 0 for an empty tensor."""
        return layout_of(self.shape, self.stride).extent * self.dtype.itemsize

    @property
    def pieces(self) -> tuple[Entry, ...]:
        """The entries of its chunks; itself, if it is in one piece."""
        return tuple(chunk.entry for chunk in self.chunks) if self.chunks else (self,)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements follow each other in the file in row-major order, without gaps."""
        return not self.chunks and layout_of(self.shape, self.stride).is_contiguous


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor that is stored on its own.

    Attributes:
        offsets: Where in the tensor it starts, in each dim.
        entry: The block.
    """

    offsets: tuple[int, ...]
    entry: Entry


class Layout(NamedTuple):
    """What follows from sizes and strides: number of elements, elements from the first to the last, and their order."""

    numel: int
    extent: int
    is_contiguous: bool


@lru_cache(maxsize=4096)  # of many tensors, most have the shape of another one
def layout_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> Layout:
    """The layout of a tensor of ``shape`` and ``stride``, as many of both; both are not negative."""
    numel = math.prod(shape)
    if numel == 0:
        return Layout(0, 0, True)
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    in_order = zip(shape, stride, row_major(shape), strict=True)
    return Layout(numel, last + 1, all(size == 1 or step == expected for size, step, expected in in_order))


@lru_cache(maxsize=4096)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides that torch gives a contiguous tensor."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
