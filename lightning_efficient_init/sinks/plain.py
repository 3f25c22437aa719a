"""Parameters and buffers that are ordinary tensors, on any one device.

Bytes go straight to a tensor's memory where the entry and the tensor are both contiguous (they are cast chunk by chunk
if the dtypes differ): a `Segment` is all that this takes. Anything else (a transposed view in the checkpoint, an
expanded or subclassed tensor in the model) arrives in scratch memory on the device and is copied from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import Buffer, Parameter

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.sharding import is_unmarked
from lightning_efficient_init.sinks.sink import Segment, Sink

PLAIN_TYPES = (torch.Tensor, Parameter, Buffer)
_COMPLEX = frozenset({torch.complex32, torch.complex64, torch.complex128})


def plain_sink(name: str, tensor: torch.Tensor, entry: Entry) -> Sink:
    """The sink that fills one tensor in place, as ``tensor.copy_(value)`` would.

    Args:
        name: The model's name for the tensor.
        tensor: The tensor to fill; on the meta device only to be asked what it needs.
        entry: What to fill it from; of the tensor's shape, or of one element for a scalar.
    """
    if type(tensor) in PLAIN_TYPES and _is_filled_by(tensor, entry):
        return Segment(entry.file, entry.offset, entry.dtype, tensor, name)
    return ScratchSink(name, tensor, entry)


class ScratchSink:
    """Fills one tensor from scratch memory, in which the entry's whole extent arrives.

    Args:
        name: The model's name for the tensor.
        tensor: The tensor to fill; it may be on the meta device until ``segments`` is called.
        entry: What to fill it from; of the tensor's shape, or of one element for a scalar.
    """

    __slots__ = ("_scratch", "entry", "name", "tensor")

    def __init__(self, name: str, tensor: torch.Tensor, entry: Entry) -> None:
        self.name = name
        self.tensor = tensor
        self.entry = entry
        self._scratch: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The tensor's device."""
        return self.tensor.device

    @property
    def scratch_bytes(self) -> int:
        """The entry's extent."""
        return self.entry.extent_bytes

    def segments(self) -> Sequence[Segment]:
        """One segment: the entry's whole extent."""
        entry = self.entry
        if entry.numel == 0:
            return ()
        self._scratch = torch.empty(entry.extent_bytes // entry.dtype.itemsize, dtype=entry.dtype, device=self.device)
        return (Segment(entry.file, entry.offset, entry.dtype, self._scratch, self.name),)

    def finish(self) -> None:
        """Copies from the scratch, and lets it go."""
        if self._scratch is not None:
            with torch.inference_mode():  # which may write to inference tensors as well as to others
                value = self._scratch.as_strided(self.entry.shape, self.entry.stride)
                self.tensor.copy_(value.view_as(self.tensor))
            self._scratch = None


def is_direct(tensor: torch.Tensor, entry: Entry) -> bool:
    """Whether both are what nearly all are, so that a `Segment` fills the tensor: it is whole, and each in one piece.

    Of equal shapes; asked for each of what may be 100,000.
    """
    return is_unmarked(tensor) and _is_filled_by(tensor, entry)


def _is_filled_by(tensor: torch.Tensor, entry: Entry) -> bool:
    """Whether the memory of ``tensor`` holds its elements as they are, in row-major order, and so does the file."""
    dtype = tensor.dtype
    return (
        tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not (dtype in _COMPLEX and tensor.is_conj())
        and entry.is_contiguous
        and (entry.dtype is dtype or entry.offset % entry.dtype.itemsize == 0)
    )
