"""Weights that are quantized as they arrive.

Each sink takes a part of a weight: a few million elements, so that scratch memory stays small however large the weight
is, and one part is quantized while the next ones are read. The last part to arrive completes the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.quantize.layers import Writer
from lightning_efficient_init.sinks.sink import Segment

PART_BYTES = 48 << 20


class QuantizingSink:
    """Quantizes a run of elements of one weight.

    Args:
        name: The model's name for the weight.
        shared: What the parts of the weight have in common.
        start: First element.
        numel: Number of elements.
    """

    __slots__ = ("_numel", "_scratch", "_shared", "_start", "name")

    def __init__(self, name: str, shared: _Weight, start: int, numel: int) -> None:
        self.name = name
        self._shared = shared
        self._start = start
        self._numel = numel
        self._scratch: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The parameter's device."""
        return self._shared.device

    @property
    def scratch_bytes(self) -> int:
        """The elements in the dtype that they are quantized from."""
        return self._numel * self._shared.dtype.itemsize

    def segments(self) -> Sequence[Segment]:
        """The run of elements, cast on arrival; nothing is there if they are not."""
        entry, shared = self._shared.entry, self._shared
        self._scratch = torch.empty(self._numel, dtype=shared.dtype, device=self.device)
        offset = entry.offset + self._start * entry.dtype.itemsize
        return (Segment(entry.file, offset, entry.dtype, self._scratch, self.name),)

    def finish(self) -> None:
        """Quantizes, and lets the scratch go."""
        assert self._scratch is not None
        self._shared.write(self._scratch, self._start)
        self._scratch = None


class _Weight:
    """One weight on its way.

    Args:
        param: The quantized parameter.
        entry: What to fill it from.
        dtype: Of scratch memory.
        num_parts: How many writes make up the weight.
        is_scaled: See `Writer.write`.
    """

    def __init__(self, param: Any, entry: Entry, dtype: torch.dtype, num_parts: int, *, is_scaled: bool = True) -> None:
        self.entry = entry
        self.device: torch.device = param.device
        self.dtype = dtype
        self._param = param
        self._is_scaled = is_scaled
        self._num_waiting = num_parts
        self._writer: Writer | None = None

    def write(self, values: torch.Tensor, start: int) -> None:
        """Quantize one part."""
        if self._writer is None:
            self._writer = self._param.writer()
        self._writer.write(values, start, is_scratch=True, is_scaled=self._is_scaled)
        self._num_waiting -= 1
        if not self._num_waiting:
            self._writer.finish()


class _WholeSink(QuantizingSink):
    """Quantizes a weight whose elements are not in its order in the file: all of it at once."""

    __slots__ = ()

    def finish(self) -> None:
        """Puts the elements in order, and quantizes."""
        assert self._scratch is not None
        entry, param = self._shared.entry, self._shared._param
        param.packing.write(param, self._scratch.as_strided(entry.shape, entry.stride))
        self._scratch = None


def quantizing_sinks(name: str, param: Any, entry: Entry, *, is_scaled: bool) -> Sequence[QuantizingSink]:
    """The sinks that together fill the quantized parameter ``param``, called ``name``, from ``entry``.

    Args:
        name: The model's name for the weight.
        param: The quantized parameter.
        entry: What to fill it from.
        is_scaled: See `Writer.write`.
    """
    packing = param.packing
    is_aligned = entry.offset % entry.dtype.itemsize == 0
    if packing.is_transposed or not entry.is_contiguous or not is_aligned:
        numel = entry.extent_bytes // entry.dtype.itemsize
        return (_WholeSink(name, _Weight(param, entry, entry.dtype, 1), 0, numel),)
    step = max(1, PART_BYTES // packing.dtype.itemsize // packing.unit) * packing.unit
    starts = range(0, packing.numel, step)
    shared = _Weight(param, entry, packing.dtype, len(starts), is_scaled=is_scaled)
    return [QuantizingSink(name, shared, start, min(step, packing.numel - start)) for start in starts]
