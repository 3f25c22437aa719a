"""From what a pickle says about a tensor to an entry: every number checked before it is believed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from lightning_efficient_init.checkpoint.entry import Entry
from lightning_efficient_init.checkpoint.tree import Path, map_leaves
from lightning_efficient_init.checkpoint.wording import SAVE_AGAIN, explain, name_of, shorten, show
from lightning_efficient_init.errors import CorruptCheckpointError, UnsupportedCheckpointError

_MAX_SIZE: Final = (1 << 63) - 1
_MAX_DIMS: Final = 64


@dataclass(slots=True)
class StoredStorage:
    """A storage as the pickle names it.

    Attributes:
        key: Its name in the file.
        dtype: Element type of the storage.
        num_bytes: Its size as the pickle states it.
        view_offset: Where it starts within the storage of that key, in bytes (views in legacy files).
    """

    key: Any
    dtype: torch.dtype
    num_bytes: int
    view_offset: int = 0


@dataclass(slots=True)
class StoredLayout:
    """Which elements of its storage a tensor is made of, as the pickle describes it.

    Of many tensors most have the layout of another one: those may share it, and then its numbers are looked at once.

    Attributes:
        offset: Storage offset, in elements.
        shape: Sizes, in elements.
        stride: Strides, in elements.
        dtype: Element type; the storage's where None.
        numel: Number of elements.
        reach: Elements from the start of the storage to the end of the last one. None if the numbers are no sizes, in
            which case they are as they were found.
    """

    offset: Any
    shape: Any
    stride: Any
    dtype: Any = None
    numel: int = field(init=False, default=0)
    reach: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.reach = _reach(self.shape, self.stride, self.offset)
        if self.reach is not None:  # from here on nobody can change what has been looked at
            self.shape, self.stride = tuple(self.shape), tuple(self.stride)
            self.numel = math.prod(self.shape)


@dataclass(slots=True)
class StoredTensor:
    """A tensor as the pickle describes it; whether its storage has its elements has not been checked yet.

    Attributes:
        storage: Where its elements are.
        layout: Which of them.
        refusal: Why it cannot be an entry ("a sparse tensor"), or None.
        requires_grad: Whether it requires gradients.
        is_parameter: Whether it is a `torch.nn.Parameter`.
    """

    storage: Any = None
    layout: StoredLayout | None = None
    refusal: str | None = None
    requires_grad: bool = False
    is_parameter: bool = False


def resolve_tensors(tree: Any, file: str, locate: Callable[[StoredStorage], int]) -> Any:
    """Replaces every `StoredTensor` of a tree by its `Entry`; those that are entries already stay.

    Args:
        tree: The unpickled object.
        file: Absolute path of the file.
        locate: Gives the position in the file of a storage's first byte, after checking that the file has all of it.

    Raises:
        CorruptCheckpointError: A tensor reaches outside its storage, or a storage outside the file.
        UnsupportedCheckpointError: A tensor is sparse, quantized, or otherwise not plain numbers in memory.
    """

    def resolve(leaf: StoredTensor | StoredStorage, path: Path) -> Entry:
        if isinstance(leaf, StoredStorage):
            leaf = StoredTensor(refusal="a bare storage")
        return _entry(leaf, path, file, locate)

    return map_leaves(tree, (StoredTensor, StoredStorage), resolve)


def _entry(tensor: StoredTensor, path: Path, file: str, locate: Callable[[StoredStorage], int]) -> Entry:
    if tensor.refusal is not None:
        raise UnsupportedCheckpointError(
            explain(
                file,
                tensor=name_of(path),
                expected="a plain tensor of numbers",
                found=tensor.refusal,
                todo="Save it as plain tensors, or take it out of the checkpoint.",
            )
        )
    storage, layout = tensor.storage, tensor.layout
    if type(storage) is not StoredStorage or layout is None:
        raise _corrupt(file, path, "a tensor with a storage", shorten(type(storage).__name__))
    dtype = storage.dtype if layout.dtype is None else layout.dtype
    if not isinstance(dtype, torch.dtype):
        raise _corrupt(file, path, "an element type", show(dtype))
    if layout.reach is None:
        raise _corrupt(file, path, "sizes, strides and an offset that are not negative", _numbers(layout))
    if not is_inside(layout, dtype, storage.num_bytes):
        inside = f"elements inside the storage {show(storage.key)} of {storage.num_bytes} bytes"
        raise _corrupt(file, path, inside, f"{_numbers(layout)} of {dtype}")
    try:
        start = locate(storage)
    except StorageError as error:
        raise _corrupt(file, path, error.expected, error.found) from None
    entry = Entry(file, start + layout.offset * dtype.itemsize, dtype, layout.shape, layout.stride)
    entry.requires_grad, entry.is_parameter = tensor.requires_grad, tensor.is_parameter
    return entry


def is_inside(layout: StoredLayout, dtype: torch.dtype, num_bytes: int) -> bool:
    """Whether the elements are sizes at all, and all of them in a storage of ``num_bytes``."""
    reach, itemsize = layout.reach, dtype.itemsize
    return reach is not None and reach * itemsize <= num_bytes and layout.numel * itemsize <= _MAX_SIZE


def _numbers(layout: StoredLayout) -> str:
    return f"shape {show(layout.shape)}, stride {show(layout.stride)}, offset {show(layout.offset)}"


class StorageError(Exception):
    """A storage is not in the file as the pickle says; the tensor's name is added on the way up."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found


def _reach(shape: Any, stride: Any, offset: Any) -> int | None:
    """Elements from the start of the storage to the end of a tensor's last element; None if these are no sizes."""
    sizes_or_steps = (tuple, list, torch.Size)
    if type(shape) not in sizes_or_steps or type(stride) not in sizes_or_steps or len(shape) > _MAX_DIMS:
        return None
    if len(shape) != len(stride) or type(offset) is not int or not 0 <= offset <= _MAX_SIZE:
        return None
    reach = offset + 1
    for size, step in zip(shape, stride, strict=True):
        if type(size) is not int or type(step) is not int or not (0 <= size <= _MAX_SIZE and 0 <= step <= _MAX_SIZE):
            return None
        reach += (size - 1) * step
    return offset if 0 in shape else reach


def _corrupt(file: str, path: Path, expected: str, found: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(explain(file, tensor=name_of(path), expected=expected, found=found, todo=SAVE_AGAIN))
