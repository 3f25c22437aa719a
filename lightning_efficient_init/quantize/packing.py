"""bitsandbytes' layers and parameters, quantized in place: from recipes, from streams, layer by layer.

Which values. A weight is quantized from what the same model without quantization would hold: its value in the dtype of
the layer (a checkpoint in float32 is cast to bfloat16 under ``bf16-true``). The 4-bit modes quantize that as it is.
int8 is defined on float16: what bitsandbytes does is done here, too, except for rows with values that float16 cannot
hold (beyond 65504). They are scaled by a power of two, which is exact, so that nothing becomes infinite; other rows
are bit for bit the same. All kernels are bitsandbytes' own. They work on blocks of 64 elements or on rows, so that
parts of a weight can be quantized one after the other, with the same result.

What differs from the classes of bitsandbytes. Parameters keep their identity through quantization, ``to``, loading
and deep copies; a layer holds its quantized values once; moving a model moves the statistics, casting it does not
touch them; a bias keeps its dtype in mixed precision; int8 layers take inputs of any number of dims, and quantize
trained weights in each forward, gradients accumulated or not. On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit
weights at the first forward, which loses bits of doubly quantized statistics; these layers stay as they are.
"""

from __future__ import annotations

import copy
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    get_4bit_type,
    int8_vectorwise_quant,
    quantize_blockwise,
)
from torch import Tensor, nn
from torch.nn import functional

from lightning_efficient_init.deferred.parameter import exchange, undisturbed, unguard
from lightning_efficient_init.quantize.layers import QuantizedLayer, QuantizedParameter, Writer, plain
from lightning_efficient_init.quantize.modes import is_4bit, is_nested

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
OUTLIER_THRESHOLD = 6.0  # of LLM.int8(), as in Lightning and transformers
_CPU_CHUNK = 1 << 20  # the CPU kernels take about 20 bytes of memory for each element
_FLOAT16_MAX = torch.finfo(torch.float16).max


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
        _become(
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
            code = _dynamic_code(device).clone()
            state2 = QuantState(outer, code=code, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)
            absmax = torch.empty(num_blocks, dtype=torch.uint8, device=device)
        return QuantState(
            absmax,
            shape=torch.Size(self.shape),
            code=_code(self.mode[:3], device).clone(),
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
        _become(param, Int8Params, packed, packing=self, CB=None, SCB=scale, has_fp16_weights=False)

    def marked(self, param: Tensor) -> Tensor:
        """See `Packing`."""
        found: Tensor = param.SCB  # type: ignore[attr-defined]
        return found


def _become(param: Tensor, cls: type[Tensor], data: Tensor, **attributes: Any) -> None:
    """Make ``param`` a parameter of class ``cls``. Who refers to it sees that."""
    with undisturbed():
        unguard(param)
        exchange(param, data)
    param.__class__ = cls
    param.__dict__.update(attributes)


@cache
def _code(quant_type: str, device: torch.device) -> Tensor:
    """The values that four bits stand for."""
    with _float32_by_default():
        code: Tensor = get_4bit_type(quant_type, device=device)
    return code


@cache
def _dynamic_code(device: torch.device) -> Tensor:
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


class _Copyable(QuantizedParameter):
    """Deep copies, pickles, ``to``, and ``copy_`` of values in full."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = _rebuild(type(self), plain(self).clone(), copy.deepcopy(_attributes(self), memo))
        return memo[id(self)]

    def __copy__(self) -> Any:
        return _rebuild(type(self), plain(self), copy.copy(_attributes(self)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), plain(self), _attributes(self))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A copy on another device, or the same parameter if it is there; a dtype changes nothing."""
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device == self.device:  # type: ignore[attr-defined]
            return self
        moved = copy.copy(self)
        moved.transform(lambda part: part.to(device, non_blocking=non_blocking))
        return moved

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and isinstance(args[0], QuantizedParameter):
            return _copy(args[0], args[1] if len(args) > 1 else (kwargs or {})["src"])
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[misc]


def _attributes(param: Any) -> dict[str, Any]:
    """What makes the parameter; a recipe that waits with it is not copied along."""
    return {name: value for name, value in param.__dict__.items() if not name.startswith("_")}


def _rebuild(cls: type[Any], data: Tensor, attributes: dict[str, Any]) -> Any:
    with undisturbed():
        made = torch.Tensor._make_subclass(cls, data, False)
    if isinstance(state := attributes.get("quant_state"), QuantState):
        attributes = {**attributes, "quant_state": _copy_state(state)}
    made.__dict__.update(attributes)
    return made


def _copy_state(state: QuantState) -> QuantState:
    """Another object with the same tensors, so that moving one does not move the other."""
    copied = copy.copy(state)
    if state.nested:
        copied.state2 = copy.copy(state.state2)
    return copied


def _copy(param: Any, source: Tensor) -> Any:
    """``param.copy_(source)``: packed values as they are, values in full quantized."""
    with undisturbed():
        if source.dtype == param.dtype and source.shape == param.shape:
            plain(param).copy_(source)
        elif source.is_floating_point() and tuple(source.shape) == param.packing.source_shape:
            param.packing.write(param, source)
        else:
            raise RuntimeError(
                f"A weight quantized as {param.packing.mode} takes values of shape {list(param.packing.source_shape)}, "
                f"or packed ones of shape {list(param.shape)} and {param.dtype}; found {list(source.shape)} and "
                f"{source.dtype}."
            )
    return param


class Params4bit(_Copyable, bnb.nn.Params4bit):  # type: ignore[misc]  # peft and others go by the name of the class
    """A weight quantized to four bits."""

    def parts(self) -> dict[str, Tensor]:
        """See `QuantizedParameter`."""
        state = self.quant_state
        parts = {"weight": plain(self), "weight.absmax": state.absmax, "weight.quant_map": state.code}
        if state.nested:
            parts["weight.nested_absmax"] = state.state2.absmax
            parts["weight.nested_quant_map"] = state.state2.code
            parts["offset"] = state.offset
        return parts

    def set_parts(self, parts: dict[str, Tensor]) -> None:
        """See `QuantizedParameter`."""
        state = self.quant_state
        state.absmax, state.code = parts["weight.absmax"], parts["weight.quant_map"]
        if state.nested:
            state.state2.absmax, state.state2.code = parts["weight.nested_absmax"], parts["weight.nested_quant_map"]
            state.offset = parts["offset"]

    def writer(self) -> Writer:
        """See `QuantizedParameter`."""
        return _Writer4bit(self)


class Int8Params(_Copyable, bnb.nn.Int8Params):  # type: ignore[misc]  # peft and others go by the name of the class
    """A weight quantized to int8."""

    def parts(self) -> dict[str, Tensor]:
        """See `QuantizedParameter`."""
        return {"weight": plain(self), "SCB": self.SCB}

    def set_parts(self, parts: dict[str, Tensor]) -> None:
        """See `QuantizedParameter`."""
        self.SCB = parts["SCB"]

    def writer(self) -> Writer:
        """See `QuantizedParameter`."""
        return _Writer8bit(self)


class _Writer4bit:
    """Quantizes blocks; double quantization comes when the statistics are complete."""

    def __init__(self, param: Params4bit) -> None:
        state = param.quant_state
        self._packed = plain(param).view(-1)
        self._state = state
        self._absmax = torch.empty_like(state.absmax, dtype=torch.float32) if state.nested else state.absmax
        self._state.dtype = param.packing.dtype  # it may have taken that of a checkpoint

    def write(self, values: Tensor, start: int) -> None:
        size = _CPU_CHUNK if values.device.type == "cpu" else max(1, values.numel())
        for chunk in values.split(size):
            with _on_default_stream(chunk.device):
                packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
                    chunk, BLOCK_SIZE, self._state.quant_type, torch.uint8
                )
            self._packed[start // 2 :][: packed.numel()].copy_(packed.view(-1))
            self._absmax[start // BLOCK_SIZE :][: absmax.numel()].copy_(absmax)
            start += chunk.numel()

    def finish(self) -> None:
        state = self._state
        if state.nested:  # as in bitsandbytes.functional.quantize_4bit
            offset = self._absmax.mean()
            code = _dynamic_code(self._absmax.device)
            with _on_default_stream(offset.device):
                absmax, outer = quantize_blockwise(self._absmax - offset, code=code, blocksize=NESTED_BLOCK_SIZE)
            for target, value in ((state.offset, offset), (state.absmax, absmax), (state.state2.absmax, outer.absmax)):
                target.copy_(value)
            state.state2.code.copy_(code)
        state.code.copy_(_code(state.quant_type, state.code.device))


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


class _Writer8bit:
    """Quantizes rows."""

    def __init__(self, param: Int8Params) -> None:
        self._packed = plain(param)
        self._scale = param.SCB

    def write(self, values: Tensor, start: int) -> None:
        num_columns = self._packed.shape[1]
        rows = values.view(-1, num_columns)
        first = start // num_columns
        size = max(1, _CPU_CHUNK // num_columns) if values.device.type == "cpu" else max(1, len(rows))
        for chunk in rows.split(size):
            half, rescale = _to_float16(chunk)
            packed, scale, _ = int8_vectorwise_quant(half)
            self._packed[first : first + len(chunk)].copy_(packed)
            self._scale[first : first + len(chunk)].copy_(scale if rescale is None else scale.mul_(rescale))
            first += len(chunk)

    def finish(self) -> None:
        pass


def _to_float16(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows in float16, those that do not fit scaled by a power of two; and what undoes that, a number for each row."""
    if rows.dtype == torch.float16:
        return rows, None
    largest = torch.linalg.vector_norm(rows, math.inf, dim=1).float()
    _, exponent = torch.frexp(largest)  # largest < 2 ** exponent
    is_scaled = (largest > _FLOAT16_MAX) & largest.isfinite()
    exponent = torch.where(is_scaled, exponent - 15, 0)
    half = torch.empty_like(rows, dtype=torch.float16)
    torch.mul(rows, _power_of_two(-exponent).to(rows.dtype).unsqueeze(1), out=half)
    return half, _power_of_two(exponent)


def _power_of_two(exponent: Tensor) -> Tensor:
    """``2 ** exponent`` from its bits: the functions of a device need not be exact."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


class Linear4bit(QuantizedLayer, bnb.nn.Linear4bit):  # type: ignore[misc]
    """A Linear with a weight of four bits."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the compute dtype."""
        if self.is_waiting:
            self.quantize()
        weight = self.weight
        if not isinstance(weight, bnb.nn.Params4bit):  # somebody has put another one in its place: a tie, say
            return functional.linear(x, weight, self.bias)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        rows = x.to(self.compute_dtype).reshape(-1, x.shape[-1])
        out = bnb.matmul_4bit(rows, weight, bias=bias, quant_state=weight.quant_state)
        return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])  # type: ignore[no-any-return]


class Linear8bit(QuantizedLayer, bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """A Linear with a weight in int8, quantized once; or, for training, in each forward."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply as LLM.int8() does."""
        if self.is_waiting:
            self.quantize()
        given: Any = self.weight
        weight = given
        is_quantized = isinstance(weight, bnb.nn.Int8Params)
        if not is_quantized and self.packing is not None:  # somebody has put another one in its place: a tie, say
            return functional.linear(x, weight, self.bias)
        if self.is_transposed and not is_quantized:
            weight = weight.t().contiguous()
        state = bnb.MatmulLtState()
        if not torch.is_grad_enabled():
            weight = weight.detach()  # else bitsandbytes prepares for a gradient, which it cannot in eval on a CPU
        state.threshold, state.is_training = self.state.threshold, self.training or weight.requires_grad
        state.has_fp16_weights = not is_quantized
        if is_quantized:
            state.CB, state.SCB = weight.data, given.SCB
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device_type, enabled=False):  # bitsandbytes mixes up dtypes in the backward pass
            out = bnb.matmul(x.to(dtype).reshape(-1, x.shape[-1]), weight, bias=bias, state=state)
        return out.view(*x.shape[:-1], out.shape[-1])  # type: ignore[no-any-return]


class _Once(logging.Filter):
    """Lets each message pass once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new


@cache
def _hear_once() -> None:
    """Each forward of each int8 layer would say that it computes in float16."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())


def replace(layer: nn.Module, mode: str, compute_dtype: torch.dtype, *, is_transposed: bool) -> QuantizedLayer:
    """Make ``layer`` a quantized one in place. Its weight is left as it is, for who gives it values.

    Args:
        layer: A Linear, or a module with a weight of the same meaning.
        mode: One of `MODES`.
        compute_dtype: What 4-bit layers multiply in.
        is_transposed: The weight is (input features, output features).
    """
    weight: Any = layer.weight
    rows, columns = weight.shape[::-1] if is_transposed else weight.shape
    shape = (int(rows), int(columns))
    attributes: dict[str, Any] = {"mode": mode, "packing": None, "is_waiting": False}
    attributes |= {"in_features": shape[1], "out_features": shape[0], "is_transposed": is_transposed}
    base: type[QuantizedLayer] = Linear8bit
    if is_4bit(mode):
        base = Linear4bit
        attributes |= {"packing": Packing4bit(mode, shape, weight.dtype, is_transposed)}
        attributes |= {"compute_dtype": compute_dtype, "compute_type_is_set": True, "quant_state": None}
        attributes |= {"quant_storage": torch.uint8, "support_avx512bf16_for_cpu": False}
    else:
        _hear_once()
        if mode == "int8":
            attributes |= {"packing": Packing8bit(mode, shape, weight.dtype, is_transposed)}
        attributes |= {"state": _matmul_state(mode), "index": None}
    made_of: tuple[Any, Any] = (base, type(layer))
    layer.__class__ = _layer_class(*made_of)
    layer.__dict__.update(attributes)
    assert isinstance(layer, QuantizedLayer)
    return layer


def _matmul_state(mode: str) -> Any:
    """What peft and others look at."""
    state = bnb.MatmulLtState()
    state.threshold = OUTLIER_THRESHOLD
    state.has_fp16_weights = mode == "int8-training"
    return state


@cache
def _layer_class(base: Any, replaced: Any) -> type[QuantizedLayer]:
    """``base``, or what is both ``base`` and a user's subclass of Linear."""
    made: type[QuantizedLayer] = base
    if replaced is not nn.Linear and issubclass(replaced, nn.Linear):
        name = f"{replaced.__name__}{base.__name__.removeprefix('Linear')}"
        members = {"__module__": __name__, "__reduce_ex__": _reduce_layer, "_made_of": (base, replaced)}
        made = type(name, (base, replaced), members)
    return made


def _reduce_layer(layer: QuantizedLayer, protocol: Any) -> Any:
    """Pickles find a class that was made here by what it was made of."""
    return _new_layer, layer._made_of, layer.__dict__


def _new_layer(base: Any, replaced: Any) -> QuantizedLayer:
    cls = _layer_class(base, replaced)
    return cls.__new__(cls)
