"""bitsandbytes' kernels, part of a weight by part: blocks of 64 elements to four bits, or rows to int8.

Which values. A weight is quantized from what the same model without quantization would hold: its value in the dtype of
the layer (a checkpoint in float32 is cast to bfloat16 under ``bf16-true``). The 4-bit modes quantize that as it is.
int8 is defined on float16: what bitsandbytes does is done here, too, except for rows with values that float16 cannot
hold (beyond 65504). They are scaled by a power of two, which is exact, so that nothing becomes infinite; other rows
are bit for bit the same. To look for such rows takes about as long as to quantize them, so a weight that streams in is
quantized without, and streams in once more if its statistics turn out infinite. All kernels are bitsandbytes' own. They
work on blocks of 64 elements or on rows, so that parts of a weight can be quantized one after the other, with the same
result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type, int8_vectorwise_quant, quantize_blockwise
from torch import Tensor

from lightning_efficient_init.quantize.layers import plain

if TYPE_CHECKING:
    from lightning_efficient_init.quantize.parameters import Int8Params, Params4bit

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
_CPU_CHUNK = 1 << 20  # the CPU kernels take about 20 bytes of memory for each element
_FLOAT16_EXPONENT = 127 + 15  # of float16's largest value, as float32 has it


class Writer4bit:
    """Quantizes blocks; double quantization comes when the statistics are complete."""

    def __init__(self, param: Params4bit) -> None:
        state = param.quant_state
        self._packed = plain(param).view(-1)
        self._state = state
        self._absmax = torch.empty_like(state.absmax, dtype=torch.float32) if state.nested else state.absmax
        self._state.dtype = param.packing.dtype  # it may have taken that of a checkpoint

    def write(self, values: Tensor, start: int, *, is_scratch: bool = False, is_scaled: bool = True) -> None:
        """See `Writer`."""
        for chunk in _chunks(values, _CPU_CHUNK):
            with _on_default_stream(chunk.device):
                packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
                    chunk, BLOCK_SIZE, self._state.quant_type, torch.uint8
                )
            self._packed[start // 2 : start // 2 + packed.numel()].copy_(packed.view(-1))
            self._absmax[start // BLOCK_SIZE : start // BLOCK_SIZE + absmax.numel()].copy_(absmax)
            start += chunk.numel()

    def finish(self) -> None:
        """See `Writer`."""
        state = self._state
        if state.nested:  # as in bitsandbytes.functional.quantize_4bit
            offset = self._absmax.mean()
            code = dynamic_code(self._absmax.device)
            with _on_default_stream(offset.device):
                absmax, outer = quantize_blockwise(self._absmax - offset, code=code, blocksize=NESTED_BLOCK_SIZE)
            for target, value in ((state.offset, offset), (state.absmax, absmax), (state.state2.absmax, outer.absmax)):
                target.copy_(value)
            state.state2.code.copy_(code)
        state.code.copy_(four_bit_code(state.quant_type, state.code.device))


@contextmanager
def _on_default_stream(device: torch.device) -> Iterator[None]:
    """The kernels that quantize blocks run on CUDA's default stream, whichever is current (bitsandbytes 0.50)."""
    if device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)
    torch.cuda.current_stream(device).synchronize()  # what was allocated there may be freed here


class Writer8bit:
    """Quantizes rows."""

    def __init__(self, param: Int8Params) -> None:
        self._packed = plain(param)
        self._scale = param.SCB

    def write(self, values: Tensor, start: int, *, is_scratch: bool = False, is_scaled: bool = True) -> None:
        """See `Writer`."""
        num_columns = self._packed.shape[1]
        rows = values.view(-1, num_columns)
        first = start // num_columns
        for chunk in _chunks(rows, max(1, _CPU_CHUNK // num_columns)):
            half, rescale = _to_float16(chunk, is_scratch=is_scratch, is_scaled=is_scaled)
            packed, scale, _ = int8_vectorwise_quant(half)
            self._packed[first : first + len(chunk)].copy_(packed)
            self._scale[first : first + len(chunk)].copy_(scale if rescale is None else scale.mul_(rescale))
            first += len(chunk)

    def finish(self) -> None:
        """See `Writer`."""


def _chunks(values: Tensor, size: int) -> Sequence[Tensor]:
    """What is given to a kernel at a time."""
    return values.split(size) if values.device.type == "cpu" else (values,)


def _to_float16(rows: Tensor, *, is_scratch: bool, is_scaled: bool) -> tuple[Tensor, Tensor | None]:
    """Rows in float16, and what undoes their scaling by powers of two, a number for each row, where they are scaled.

    They may take the memory of ``rows`` if that is scratch.
    """
    if rows.dtype == torch.float16:
        return rows, None
    is_reused = is_scratch and rows.dtype.itemsize == torch.float16.itemsize
    half = rows.view(torch.float16) if is_reused else torch.empty_like(rows, dtype=torch.float16)
    if not is_scaled:
        return half.copy_(rows), None
    largest = torch.linalg.vector_norm(rows, math.inf, dim=1).float()
    exponents = (largest.view(torch.int32) >> 12) + 1 >> 11  # of what it is rounded to: float16 drops 13 bits
    down, up = _scales(rows.device, rows.dtype)
    torch.mul(rows, down.index_select(0, exponents).unsqueeze(1), out=half)
    return half, up.index_select(0, exponents)


@cache
def _scales(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By the exponent of a row's largest value, as float32 has it: what brings the row below 65520, and its inverse."""
    finite = [max(0, exponent - _FLOAT16_EXPONENT) for exponent in range(255)]
    powers = torch.tensor([*finite, 0, 0], dtype=torch.float64, device="cpu")  # infinite rows, and such of NaN, stay
    return torch.exp2(-powers).to(device, dtype), torch.exp2(powers).to(device, torch.float32)


@cache
def four_bit_code(quant_type: str, device: torch.device) -> Tensor:
    """The values that four bits stand for. Asked for before anything is quantized, or computed with."""
    with _float32_by_default():
        code: Tensor = get_4bit_type(quant_type, device=device)
        if device.type == "cpu":  # there bitsandbytes' kernels keep tables as well, from their first call on
            torch.ops.bitsandbytes.quantize_4bit.default(torch.zeros(2, device=device), 64, quant_type, torch.uint8)
    return code


@cache
def dynamic_code(device: torch.device) -> Tensor:
    """The values that eight bits of a quantized statistic stand for."""
    with _float32_by_default():
        code: Tensor = create_dynamic_map().to(device)
    return code


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Bitsandbytes makes its tables in the default dtype, which is another one while models are built."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
