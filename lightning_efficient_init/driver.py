"""CUDA's own copies: a few microseconds each, without a kernel that has to be loaded first, and with the GIL kept.

A copy by torch gives the GIL away, and gets it back when a dozen threads have had their turn. That is a tenth of the
time of a load that quantizes, and more where tensors are small. And one that skips bytes on its way takes a kernel,
which a process loads in 12 ms (an H100) at its first use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

_HOST, _DEVICE = 1, 2
_NON_BLOCKING = 1
_MOST_BYTES_APART = (1 << 31) - 1  # the largest pitch of any device


class _Copy2D(ctypes.Structure):
    """``CUDA_MEMCPY2D`` of ``cuda.h``."""

    _fields_ = (
        *((f"src_{name}", ctypes.c_size_t) for name in ("x", "y")),
        ("src_kind", ctypes.c_int),
        *((f"src_{name}", ctypes.c_void_p) for name in ("host", "device", "array")),
        ("src_pitch", ctypes.c_size_t),
        *((f"dst_{name}", ctypes.c_size_t) for name in ("x", "y")),
        ("dst_kind", ctypes.c_int),
        *((f"dst_{name}", ctypes.c_void_p) for name in ("host", "device", "array")),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for copies to a device, one for all of them. With its first own stream torch makes 127 more: 4 ms."""
    create = _function("cuStreamCreate", (ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint))
    stream = ctypes.c_void_p()
    with torch.cuda.device(device):
        if create is None or create(ctypes.byref(stream), _NON_BLOCKING):
            return torch.cuda.Stream(device)
    return torch.cuda.ExternalStream(stream.value, device)


@cache
def copy_to_device() -> Callable[[int, int, int, int], int] | None:
    """The copy from pinned memory: destination, source, bytes, stream; gives 0. None where there is none (ROCm)."""
    arguments = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    return _function("cuMemcpyHtoDAsync_v2", arguments)


def scatter(values: torch.Tensor, tensors: Sequence[torch.Tensor], num_bytes_apart: Sequence[int]) -> bool:
    """Write ``values`` (on the CPU) into each of ``tensors``, from its first byte on with gaps between the elements.

    Args:
        values: One-dimensional and contiguous.
        tensors: Dense, on one CUDA device.
        num_bytes_apart: From one element to the next, for each tensor.

    Returns:
        Whether that has been done, or begun: what comes later on the current stream sees it. Else do it by torch.
    """
    copy = _function("cuMemcpy2DAsync_v2", (ctypes.POINTER(_Copy2D), ctypes.c_void_p))
    if copy is None or max(num_bytes_apart, default=0) > _MOST_BYTES_APART:
        return False
    size = values.itemsize
    call = _Copy2D(src_kind=_HOST, src_host=values.data_ptr(), src_pitch=size, dst_kind=_DEVICE, width=size)
    call.height = len(values)
    with torch.cuda.device(tensors[0].device):
        stream = torch.cuda.current_stream().cuda_stream
        for tensor, apart in zip(tensors, num_bytes_apart, strict=True):
            call.dst_device, call.dst_pitch = tensor.data_ptr(), max(apart, size)
            if copy(ctypes.byref(call), stream):
                return False
    return True


@cache
def _function(name: str, arguments: tuple[Any, ...]) -> Callable[..., int] | None:
    try:
        found: Any = getattr(ctypes.PyDLL("libcuda.so.1"), name)
    except (OSError, AttributeError):
        return None
    found.argtypes = arguments
    return found  # type: ignore[no-any-return]
