"""The canary: a few values that no initializer yields and no training reaches, in memory that nobody has written.

They stand at the start, at the end and between. Copies, casts to another floating-point dtype and moves to another
device keep them, so memory tells by itself whether it is empty. Writing and looking cost one batched operation for all
tensors of a device and dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

_PROBES = 4
# Exact in bfloat16 (8 bits) and float16 (up to 65504), so a cast keeps them.
_CANARY = (-60928.0, 47360.0, -51712.0, 64256.0)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def can_hold(tensor: torch.Tensor) -> bool:
    """Whether a canary in dense ``tensor`` means something: a float of a usual kind."""
    return tensor.dtype in _FLOATS


def is_unmistakable(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has room for all of a canary, so that finding one cannot be chance."""
    return tensor.dtype in _FLOATS and tensor.numel() >= _PROBES


def write(tensors: Iterable[torch.Tensor]) -> None:
    """Put a canary into each of some dense tensors."""
    for probes, canary in _batches(_by_kind(tensors)):
        torch._foreach_copy_(probes, [canary] * len(probes))


def intact(tensors: Sequence[torch.Tensor]) -> list[float]:
    """The share of each tensor's canary that is there: 1 if nobody has written."""
    kinds = _by_kind(tensors)
    shares: dict[int, float] = {}
    for members, (probes, canary) in zip(kinds.values(), _batches(kinds), strict=True):
        found = torch.stack(probes).eq(canary).double().mean(dim=1).tolist()
        shares.update(zip(map(id, members), found, strict=True))
    return [shares[id(tensor)] for tensor in tensors]


def _probe(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a few elements in all parts of dense memory."""
    numel = tensor.numel()
    if numel < _PROBES:
        return tensor.as_strided((1,), (1,), tensor.storage_offset())
    return tensor.as_strided((_PROBES,), ((numel - 1) // (_PROBES - 1),), tensor.storage_offset())


def _by_kind(tensors: Iterable[torch.Tensor]) -> dict[Any, list[torch.Tensor]]:
    kinds: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype, tensor.numel() >= _PROBES), []).append(tensor)
    return kinds


def _batches(kinds: dict[Any, list[torch.Tensor]]) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    batches = []
    for (device, dtype, full), tensors in kinds.items():
        canary = torch.tensor(_CANARY if full else _CANARY[:1], dtype=dtype, device="cpu").to(device)
        batches.append(([_probe(tensor) for tensor in tensors], canary))
    return batches
