"""DTensors: what of the whole this rank holds, and how one on the meta device gets memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from lightning_efficient_init.sharding.part import Block, Run

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


ORDINARY = (torch.Tensor, torch.nn.Parameter)


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor, without importing them for nothing."""
    if type(tensor) in ORDINARY:  # to find that an attribute is missing takes longer
        return False
    return hasattr(tensor, "_local_tensor") and hasattr(tensor, "_spec")


def block_of(tensor: DTensor) -> Block:
    """What this rank holds of ``tensor``.

    Raises:
        NotImplementedError: It is waiting for a reduction, or cut in a way that has no order.
    """
    shape = tuple(tensor.shape)
    mesh, placements = tensor.device_mesh, tensor.placements
    place = mesh.get_coordinate()
    kept: list[tuple[Run, ...]] = [((0, size),) for size in shape]
    if place is None:  # this rank is not in the mesh
        return Block(shape, ((),) * len(shape), tensor._local_tensor)
    cuts = _cutting_order(placements, [mesh.size(axis) for axis in range(mesh.ndim)])
    for axis in cuts:
        dim: int = placements[axis].dim  # type: ignore[attr-defined]
        kept[dim] = _chunk(kept[dim], mesh.size(axis), place[axis])
    _check(tensor, kept)
    return Block(shape, tuple(kept), tensor._local_tensor, is_whole=all(mesh.size(axis) == 1 for axis in cuts))


def repeated_over(tensor: DTensor) -> torch.distributed.ProcessGroup | None:
    """The ranks with the same part, where exactly one axis of the mesh repeats what others cut."""
    mesh = tensor.device_mesh
    axes = [
        axis for axis, placement in enumerate(tensor.placements) if placement.is_replicate() and mesh.size(axis) > 1
    ]
    return mesh.get_group(axes[0]) if len(axes) == 1 and mesh.get_coordinate() is not None else None


def give_local_memory(tensor: DTensor, local: torch.Tensor) -> None:
    """Let the object ``tensor`` hold ``local``; whoever refers to it sees that, and nothing is copied."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 (imported already, or there were no DTensors)

    fresh = torch.nn.Parameter(DTensor(local, tensor._spec, requires_grad=tensor.requires_grad), tensor.requires_grad)
    torch._C._swap_tensor_impl(tensor, fresh)
    tensor._local_tensor = local


def like_dtensor(tensor: DTensor, local: torch.Tensor) -> DTensor:
    """A DTensor that is cut as ``tensor`` is, and holds ``local``."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 (imported already, or there were no DTensors)
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta  # noqa: PLC0415

    meta = TensorMeta(tensor.shape, tensor.stride(), local.dtype)
    return DTensor(local, DTensorSpec(tensor.device_mesh, tensor.placements, tensor_meta=meta), requires_grad=False)


def _cutting_order(placements: Sequence[Any], sizes: Sequence[int]) -> list[int]:
    """The axes of the mesh in the order in which they cut: from left to right, but strided ones after those they name.

    ``fully_shard`` of a tensor that tensor parallelism has cut in the same dim leaves ``_StridedShard``: its axis comes
    first in the mesh, and it was cut last. Its ``split_factor`` is the number of pieces there were before.
    """
    order: list[int] = []
    late: list[int] = []
    for axis, placement in enumerate(placements):
        if placement.is_partial():
            raise NotImplementedError(f"a DTensor with the placement {placement} has no values of its own to load")
        if (dim := getattr(placement, "dim", None)) is None:
            continue
        pieces = int(getattr(placement, "split_factor", 1))
        if pieces == 1:
            order.append(axis)
            continue
        later = [i for i in range(axis + 1, len(placements)) if getattr(placements[i], "dim", None) == dim]
        if math.prod(sizes[i] for i in later) != pieces:
            raise NotImplementedError(f"placements {tuple(placements)}: {placement} does not say what was cut before")
        late.append(axis)
    return order + late[::-1]


def _chunk(runs: tuple[Run, ...], count: int, index: int) -> tuple[Run, ...]:
    """The part of the indices in ``runs`` that ``torch.chunk`` into ``count`` gives to ``index``."""
    size = sum(stop - start for start, stop in runs)
    each = -(-size // count)
    first, end = min(index * each, size), min((index + 1) * each, size)
    kept, position = [], 0
    for start, stop in runs:
        a, b = max(first - position, 0), min(end - position, stop - start)
        if a < b:
            kept.append((start + a, start + b))
        position += stop - start
    return tuple(kept)


def _check(tensor: DTensor, kept: Sequence[Sequence[Run]]) -> None:
    sizes = [sum(stop - start for start, stop in runs) for runs in kept]
    local = tuple(tensor._local_tensor.shape)
    if math.prod(sizes) != math.prod(local):
        raise NotImplementedError(
            f"a DTensor of shape {list(tensor.shape)} with placements {tuple(tensor.placements)}: expected "
            f"{sizes} of it on this rank, found {list(local)}"
        )
