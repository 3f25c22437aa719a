"""The canary: a few values that no initializer yields and no training reaches, in memory that nobody has written.

They stand at the start, at the end and between, in the order of the elements, whatever their strides. Copies, casts to
another floating-point dtype, moves to another device and other memory formats keep them, so memory tells by itself
whether it is empty. Writing and looking cost one batched operation for all contiguous tensors of a device and dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from lightning_efficient_init import driver

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
    for (device, dtype, is_full), members in _by_kind(tensors).items():
        canary = _canary(dtype, is_full=is_full)
        for tensor in members:
            if not tensor.is_contiguous():
                tensor[_positions(tensor)] = canary.to(device)
        members = [tensor for tensor in members if tensor.is_contiguous()]  # noqa: PLW2901
        if device.type == "cuda" and driver.scatter(canary, members, [_step(t) * t.itemsize for t in members]):
            continue
        torch._foreach_copy_([_probe(tensor) for tensor in members], [canary.to(device)] * len(members))


def intact(tensors: Sequence[torch.Tensor]) -> list[float]:
    """The share of each tensor's canary that is there: 1 if nobody has written."""
    shares: dict[int, float] = {}
    for (device, dtype, is_full), members in _by_kind(tensors).items():
        canary = _canary(dtype, is_full=is_full).to(device)
        found = torch.stack([_probe(tensor) for tensor in members]).eq(canary).double().mean(dim=1).tolist()
        shares.update(zip(map(id, members), found, strict=True))
    return [shares[id(tensor)] for tensor in tensors]


def _canary(dtype: torch.dtype, *, is_full: bool) -> torch.Tensor:
    return torch.tensor(_CANARY if is_full else _CANARY[:1], dtype=dtype, device="cpu")


def _probe(tensor: torch.Tensor) -> torch.Tensor:
    """A few elements in all parts of a tensor: a view, if it is contiguous."""
    if not tensor.is_contiguous():
        return tensor[_positions(tensor)]
    return tensor.as_strided((_length(tensor),), (_step(tensor),), tensor.storage_offset())


def _positions(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Where these elements are."""
    places = torch.arange(_length(tensor), device=tensor.device) * _step(tensor)
    return torch.unravel_index(places, tensor.shape)


def _length(tensor: torch.Tensor) -> int:
    return _PROBES if tensor.numel() >= _PROBES else 1


def _step(tensor: torch.Tensor) -> int:
    """From one of these elements to the next."""
    return max((tensor.numel() - 1) // (_PROBES - 1), 1)


def _by_kind(tensors: Iterable[torch.Tensor]) -> dict[tuple[torch.device, torch.dtype, bool], list[torch.Tensor]]:
    """Tensors by device, dtype, and whether they have room for all of a canary."""
    kinds: dict[tuple[torch.device, torch.dtype, bool], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype, tensor.numel() >= _PROBES), []).append(tensor)
    return kinds
