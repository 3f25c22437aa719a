"""The part of a tensor that this rank holds, whichever engine made it.

Engines cut tensors in two ways: along dims (DTensor, on meshes of any shape), or as a range of the flattened tensor
(FSDP's flat parameters, ZeRO-3's partitions). Both say the same two things here: what of a whole tensor is to be kept
(`take`), and where that is among the elements of the whole (`rows`), so that no more than that is read from a file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

Run = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rows:
    """Runs of elements at equal distances in a whole tensor, in row-major order; they follow each other in the part.

    Attributes:
        start: The first element of the first run.
        length: Elements of each run.
        count: How many runs.
        pitch: Elements from the start of one run to the start of the next.
    """

    start: int
    length: int
    count: int = 1
    pitch: int = 0

    @property
    def numel(self) -> int:
        """Elements in all runs together."""
        return self.length * self.count


class Part(Protocol):
    """What this rank holds of one tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""

    @property
    def memory(self) -> torch.Tensor:
        """What this rank has in memory: the kept elements, in the order of the whole."""

    @property
    def is_whole(self) -> bool:
        """Whether every rank keeps all elements; the same on all ranks."""

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """The kept elements of a tensor of the whole's shape, in the shape of ``memory``; a view where possible."""

    def rows(self) -> Iterator[Rows]:
        """Where the kept elements are in the whole, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What is left of a tensor after it was cut along dims.

    Attributes:
        shape: The shape of the whole.
        kept: For each dim, the runs ``(start, stop)`` of indices that are kept.
        memory: This rank's tensor.
        is_whole: See `Part`.
    """

    shape: tuple[int, ...]
    kept: tuple[tuple[Run, ...], ...]
    memory: torch.Tensor
    is_whole: bool = False

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """See `Part`."""
        for dim, runs in enumerate(self.kept):
            if len(runs) == 1:
                whole = whole.narrow(dim, runs[0][0], runs[0][1] - runs[0][0])
            else:
                pieces = [whole.narrow(dim, start, stop - start) for start, stop in runs]
                whole = torch.cat(pieces, dim) if pieces else whole.narrow(dim, 0, 0)
        return whole

    def rows(self) -> Iterator[Rows]:
        """See `Part`: one for each stretch of equally distant runs, which for one or two cut dims is a single one."""
        if not all(stop > start for runs in self.kept for start, stop in runs) or not all(self.kept):
            return
        cut = [dim for dim, size in enumerate(self.shape) if self.kept[dim] != ((0, size),)]
        if not cut:
            yield Rows(0, math.prod(self.shape))
            return
        last, before = cut[-1], cut[-2] if len(cut) > 1 else 0
        if last == before:
            yield from self._runs_of(last, 0, ((0, 1),))
            return
        outer = [[i for run in self.kept[dim] for i in range(*run)] for dim in range(before)]
        sizes = [math.prod(self.shape[dim + 1 :]) for dim in range(before)]
        between = math.prod(self.shape[before + 1 : last])
        lines = tuple((start * between, stop * between) for start, stop in self.kept[before])
        for index in itertools.product(*outer):
            base = sum(i * size for i, size in zip(index, sizes, strict=True))
            yield from self._runs_of(last, base, lines)

    def _runs_of(self, dim: int, base: int, lines: tuple[Run, ...]) -> Iterator[Rows]:
        """The runs within ``dim`` of the given lines along it."""
        inner = math.prod(self.shape[dim + 1 :])
        pitch = self.shape[dim] * inner
        spans = [(start * inner, (stop - start) * inner) for start, stop in self.kept[dim]]
        for first, end in lines:
            if len(spans) == 1:
                start, length = spans[0]
                yield Rows(base + first * pitch + start, length, end - first, pitch)
            else:
                for line in range(first, end):
                    yield from (Rows(base + line * pitch + start, length) for start, length in spans)


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """A range of a tensor that was flattened in row-major order.

    Attributes:
        shape: The shape of the whole.
        start: The first element that is kept.
        memory: This rank's tensor, of one dim: ``whole.flatten()[start : start + memory.numel()]``.
        is_whole: See `Part`.
    """

    shape: tuple[int, ...]
    start: int
    memory: torch.Tensor
    is_whole: bool = False

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """See `Part`."""
        return whole.reshape(-1).narrow(0, self.start, self.memory.numel())

    def rows(self) -> Iterator[Rows]:
        """See `Part`: one run."""
        if self.memory.numel():
            yield Rows(self.start, self.memory.numel())
