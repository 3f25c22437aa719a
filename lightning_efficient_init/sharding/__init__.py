"""Tensors of which each rank holds a part: which part, in whose memory."""

from __future__ import annotations

from typing import Any

from lightning_efficient_init.sharding.dtensor import block_of, give_local_memory, is_dtensor
from lightning_efficient_init.sharding.fully_shard import offloaded, settle
from lightning_efficient_init.sharding.part import Block, Part, Rows, Stretch

__all__ = ["Block", "Part", "Rows", "Stretch", "give_local_memory", "is_dtensor", "offloaded", "part_of", "settle", "shape_of"]


def part_of(tensor: Any) -> Part | None:
    """The part of a tensor that this rank holds, None for one that is whole: a line for each engine."""
    if is_dtensor(tensor):
        return block_of(tensor)
    return None


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of the whole tensor of which ``tensor`` is this rank's part."""
    part = None if is_dtensor(tensor) else part_of(tensor)
    return tuple(tensor.shape) if part is None else part.shape
