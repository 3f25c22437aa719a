"""Tensors of which each rank holds a part: which part, in whose memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightning_efficient_init.sharding.dtensor import (
    ORDINARY,
    block_of,
    give_local_memory,
    is_dtensor,
    like_dtensor,
    repeated_over,
)
from lightning_efficient_init.sharding.fsdp import (
    FLAT_NAME,
    MARK,
    is_flat,
    is_flattened,
    mark_parts,
    repeated_flat,
    reshard_flat,
    stand_ins,
    stretch_of,
)
from lightning_efficient_init.sharding.fully_shard import is_fsdp2_hook, offloaded, reshard_managed, settle
from lightning_efficient_init.sharding.part import Block, Part, Rows, Stretch
from lightning_efficient_init.sharding.zero3 import (
    PARTITION,
    is_engine,
    is_partitioned,
    partition,
    partition_of,
    partition_real,
    refresh,
    refresh_engine,
)

__all__ = [
    "FLAT_NAME",
    "Block",
    "Part",
    "Rows",
    "Stretch",
    "copies_of",
    "give_local_memory",
    "has_parts",
    "is_dtensor",
    "is_engine",
    "is_flat",
    "is_flattened",
    "is_fsdp2_hook",
    "is_partitioned",
    "is_unmarked",
    "like_part",
    "mark_parts",
    "offloaded",
    "part_of",
    "partition",
    "partition_real",
    "refresh",
    "refresh_engine",
    "reshard",
    "settle",
    "shape_of",
    "shown_whole",
    "stand_ins",
    "whole_part",
]


_MARKS = frozenset({MARK, PARTITION})


def is_unmarked(tensor: Any) -> bool:
    """Whether ``tensor`` is an ordinary one that no engine has put a mark on: as nearly all are, often very many."""
    return type(tensor) in ORDINARY and (not (marks := tensor.__dict__) or _MARKS.isdisjoint(marks))


def part_of(tensor: Any) -> Part | None:
    """The part of a tensor that this rank holds, None for one that is whole: a line for each engine."""
    if is_unmarked(tensor):
        return None
    if is_dtensor(tensor):
        return block_of(tensor)
    if is_partitioned(tensor):
        return partition_of(tensor)
    if is_flattened(tensor):
        return stretch_of(tensor)
    return None


@contextmanager
def shown_whole(params: Iterable[Any]) -> Iterator[None]:
    """Let parts of parameters have the shape of the whole, for code that compares shapes and writes nothing."""
    parts = [(param, part.shape) for param in params if not is_dtensor(param) and (part := part_of(param)) is not None]
    hidden = [(param, param.data, shape) for param, shape in parts if tuple(param.shape) != shape]
    for param, data, shape in hidden:
        param.data = data.new_empty(()).expand(shape)
    try:
        yield
    finally:
        for param, data, _ in hidden:
            param.data = data


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of the whole tensor of which ``tensor`` is this rank's part."""
    part = None if is_dtensor(tensor) else part_of(tensor)
    return tuple(tensor.shape) if part is None else part.shape


def copies_of(tensor: Any) -> torch.distributed.ProcessGroup | None:
    """The ranks that hold the same part of ``tensor``, if they are one axis of a mesh that is cut along another."""
    if is_dtensor(tensor):
        return repeated_over(tensor)
    return repeated_flat(tensor) if is_flattened(tensor) else None


def like_part(param: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor that is cut as ``param`` is, such as a moment of an optimizer, and this rank's memory of it."""
    part = part_of(param)
    assert part is not None
    memory = torch.empty_like(part.memory, dtype=dtype)
    if is_partitioned(param):
        return memory, memory
    return (like_dtensor(param, memory) if is_dtensor(param) else memory.view(param.shape)), memory


def whole_part(tensor: torch.Tensor) -> Part:
    """All of a tensor that is whole, as a part."""
    shape = tuple(tensor.shape)
    return Block(shape, tuple(((0, size),) for size in shape), tensor, is_whole=True)


def has_parts(module: torch.nn.Module) -> bool:
    """Whether an engine has taken any parameter below ``module`` apart."""
    return any(part_of(param) is not None for param in module.parameters()) or any(map(_had_parts, module.modules()))


def reshard(modules: Sequence[torch.nn.Module]) -> None:
    """Take apart again what engines keep whole after a forward without a backward, as an evaluation is.

    Until then there are no parts to load into, or what is loaded into them is not what the next forward uses.
    """
    if torch.distributed.is_initialized():  # without processes nothing is in parts
        reshard_managed(modules)
        reshard_flat(modules)


def _had_parts(module: torch.nn.Module) -> bool:
    """Whether an engine has taken the module's own parameters apart, though they may not look like that now."""
    return bool(stand_ins(module)) or any(map(is_fsdp2_hook, module._load_state_dict_pre_hooks.values()))
