"""bitsandbytes' parameters, with one identity for life: through quantization, ``to``, loading and deep copies."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from lightning_efficient_init.deferred.parameter import exchange, undisturbed, unguard
from lightning_efficient_init.quantize.layers import QuantizedParameter, Writer, plain
from lightning_efficient_init.quantize.writers import Writer4bit, Writer8bit


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
            return _copy(args[0], args[1] if len(args) > 1 else (kwargs or {})["other"])
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
        return Writer4bit(self)


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
        return Writer8bit(self)


def become(param: Tensor, cls: type[Tensor], data: Tensor, **attributes: Any) -> None:
    """Make ``param`` a parameter of class ``cls``. Who refers to it sees that."""
    with undisturbed():
        unguard(param)
        exchange(param, data)
    param.__class__ = cls
    param.__dict__.update(attributes)
