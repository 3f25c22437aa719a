"""How a weight is quantized, and a plain parameter made a quantized one, before its values are there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from lightning_efficient_init.quantize.layers import QuantizedParameter, plain
from lightning_efficient_init.quantize.modes import is_nested
from lightning_efficient_init.quantize.parameters import Int8Params, Params4bit, become
from lightning_efficient_init.quantize.writers import BLOCK_SIZE, NESTED_BLOCK_SIZE, dynamic_code, four_bit_code


@dataclass(frozen=True, slots=True)
class Packing(ABC):
    """How a weight is quantized: the form of the parameter (see `deferred.form.Form`).

    Attributes:
        mode: One of `MODES`.
        shape: Of the weight as the layer multiplies by it: (output features, input features).
        dtype: What it is quantized from.
        is_transposed: The module that was replaced kept it as (input features, output features).
    """

    mode: str
    shape: tuple[int, int]
    dtype: torch.dtype
    is_transposed: bool = False

    @property
    def source_shape(self) -> tuple[int, int]:
        """The shape that the weight has in a checkpoint in full."""
        return self.shape[::-1] if self.is_transposed else self.shape

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    @abstractmethod
    def unit(self) -> int:
        """Elements that are quantized together."""

    @abstractmethod
    def allocate(self, param: Tensor, device: torch.device) -> None:
        """Make a plain, perhaps deferred parameter a quantized one whose memory nobody has written."""

    @abstractmethod
    def marked(self, param: Tensor) -> Tensor:
        """The outermost statistics, which are never negative in a weight that was quantized."""

    def has_overflowed(self, param: Tensor) -> bool:
        """Whether values did not fit what bitsandbytes quantizes from, so that statistics are infinite."""
        return False

    def write(self, param: Tensor, values: Tensor) -> None:
        """Quantize ``values``, of the source's shape and any dtype, into ``param``."""
        self.write_oriented(param, values.t() if self.is_transposed else values)

    def write_oriented(self, param: Tensor, values: Tensor) -> None:
        """The same for values of shape ``shape``."""
        if not isinstance(param, QuantizedParameter):
            self.allocate(param, values.device)
        assert isinstance(param, QuantizedParameter)
        writer = param.writer()
        writer.write(plain(values).to(device=param.device, dtype=self.dtype).contiguous().view(-1), 0)
        writer.finish()


class Packing4bit(Packing):
    """nf4 and fp4: two elements to a byte, one scale for each block of 64, in row-major order."""

    __slots__ = ()

    @property
    def unit(self) -> int:
        """A block; an even number of elements, so that no byte is shared."""
        return BLOCK_SIZE

    def allocate(self, param: Tensor, device: torch.device) -> None:
        """See `Packing`."""
        packed = torch.empty((-(-self.numel // 2), 1), dtype=torch.uint8, device=device)
        state = self._empty_state(device)
        become(
            param,
            Params4bit,
            packed,
            packing=self,
            blocksize=BLOCK_SIZE,
            compress_statistics=is_nested(self.mode),
            quant_type=self.mode[:3],
            quant_state=state,
            quant_storage=torch.uint8,
            bnb_quantized=True,
            module=None,
        )

    def _empty_state(self, device: torch.device) -> QuantState:
        num_blocks = -(-self.numel // BLOCK_SIZE)
        absmax = torch.empty(num_blocks, dtype=torch.float32, device=device)
        offset = state2 = None
        if is_nested(self.mode):
            offset = torch.empty((), dtype=torch.float32, device=device)
            outer = torch.empty(-(-num_blocks // NESTED_BLOCK_SIZE), dtype=torch.float32, device=device)
            code = dynamic_code(device).clone()
            state2 = QuantState(outer, code=code, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)
            absmax = torch.empty(num_blocks, dtype=torch.uint8, device=device)
        return QuantState(
            absmax,
            shape=torch.Size(self.shape),
            code=four_bit_code(self.mode[:3], device).clone(),
            blocksize=BLOCK_SIZE,
            quant_type=self.mode[:3],
            dtype=self.dtype,
            offset=offset,
            state2=state2,
        )

    def marked(self, param: Tensor) -> Tensor:
        """See `Packing`."""
        state = param.quant_state  # type: ignore[attr-defined]
        found: Tensor = state.state2.absmax if state.nested else state.absmax
        return found


class Packing8bit(Packing):
    """int8: one scale for each row."""

    __slots__ = ()

    @property
    def unit(self) -> int:
        """A row."""
        return self.shape[1]

    def allocate(self, param: Tensor, device: torch.device) -> None:
        """See `Packing`."""
        packed = torch.empty(self.shape, dtype=torch.int8, device=device)
        scale = torch.empty(self.shape[0], dtype=torch.float32, device=device)
        become(param, Int8Params, packed, packing=self, CB=None, SCB=scale, has_fp16_weights=False)

    def marked(self, param: Tensor) -> Tensor:
        """See `Packing`."""
        found: Tensor = param.SCB  # type: ignore[attr-defined]
        return found

    def has_overflowed(self, param: Tensor) -> bool:
        """See `Packing`. On the CPU: there are few statistics, and a device would load kernels to look at them."""
        return not bool(self.marked(param).cpu().isfinite().all())
