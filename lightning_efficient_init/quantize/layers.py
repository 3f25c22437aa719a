"""What quantized parameters and layers have in common, without bitsandbytes.

A quantized weight is one parameter object from its construction to its use: plain and deferred while the model is
built, then of bitsandbytes' own parameter class, with memory for the quantized values. It has parts (the packed values
and their statistics), each an ordinary tensor: that is how checkpoints of quantized models are read and moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_efficient_init.deferred.parameter import exchange, undisturbed

if TYPE_CHECKING:
    from lightning_efficient_init.quantize.packing import Packing


class Writer(Protocol):
    """Quantizes one weight, part by part."""

    def write(self, values: Tensor, start: int, *, is_scratch: bool = False, is_scaled: bool = True) -> None:
        """Quantize a run of elements.

        Args:
            values: One-dimensional, contiguous, in the packing's dtype, on the parameter's device.
            start: Its first element's place in the weight, in row-major order; a multiple of the packing's unit.
            is_scratch: Whether ``values`` may be overwritten.
            is_scaled: Whether values that do not fit the dtype that bitsandbytes quantizes from are scaled. It takes
                time, and hardly any weight has some; if not, the packing's ``has_overflowed`` tells.
        """

    def finish(self) -> None:
        """Called once, after all elements have been written."""


class QuantizedParameter:
    """Mixed into bitsandbytes' parameter classes.

    Attributes:
        packing: How the weight is quantized, from which shape and dtype.
    """

    packing: Packing

    def parts(self) -> dict[str, Tensor]:
        """Name in the layer's state dict, such as ``weight.absmax``, to the part's memory. ``weight`` is first."""
        raise NotImplementedError

    def set_parts(self, parts: dict[str, Tensor]) -> None:
        """Take other tensors as parts, except ``weight``, which is this parameter's own memory."""
        raise NotImplementedError

    def writer(self) -> Writer:
        """Quantizes into this parameter's memory."""
        raise NotImplementedError

    def transform(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move the parameter to where ``function`` (as for ``Module._apply``) moves its packed values.

        Raises:
            TypeError: The function casts. A quantized weight cannot be cast.
        """
        packed = plain(self)
        moved = function(packed)
        if moved is packed:
            return
        if moved.dtype != packed.dtype or moved.shape != packed.shape:
            raise TypeError(
                f"A weight quantized as {self.packing.mode} cannot become {moved.dtype} of shape {tuple(moved.shape)}: "
                "its values are packed. Cast the model before it is quantized, by the precision of EfficientInit."
            )
        others = {name: part.to(moved.device) for name, part in self.parts().items() if name != "weight"}
        with undisturbed():
            exchange(self, moved)  # type: ignore[arg-type]
            self.set_parts(others)


def plain(tensor: Any) -> Tensor:
    """The memory of a parameter as an ordinary tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        detached: Tensor = tensor.detach()
        return detached


class QuantizedLayer(Module):
    """Mixed into bitsandbytes' layers: a Linear whose weight is, or is going to be, quantized.

    Attributes:
        mode: One of `MODES`.
        packing: How its weight is quantized; None where it is kept in full, as for ``int8-training``.
        is_waiting: Its weight has values in full, to be quantized where the layer is moved to, or at first use.
        is_transposed: A weight in full is (input features, output features).
    """

    mode: str
    packing: Packing | None
    is_waiting: bool
    is_transposed: bool
    weight: Parameter
    bias: Parameter | None
    state: Any
    compute_dtype: torch.dtype

    def quantize(self) -> None:
        """Quantize the weight now, on the device where it is, if that is still to be done."""
        if self.is_waiting and not self.weight.is_meta:
            self.is_waiting = False
            assert self.packing is not None
            with undisturbed():
                self.packing.write(self.weight, self.weight.detach())

    def reset_parameters(self) -> None:
        """As the layer would without quantization; the new weight is quantized."""
        weight = self.weight
        if not isinstance(weight, QuantizedParameter):
            super().reset_parameters()  # type: ignore[misc]
            return
        packing = weight.packing
        shape, device = packing.shape, weight.device
        self._parameters["weight"] = full = Parameter(torch.empty(shape, dtype=packing.dtype, device=device))
        try:
            super().reset_parameters()  # type: ignore[misc]
        finally:
            self._parameters["weight"] = weight
        with undisturbed():
            packing.write_oriented(weight, full.detach())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """Move, cast and the like: quantized weights move as a whole, and keep their identity."""
        weight = self._parameters["weight"]
        if not isinstance(weight, QuantizedParameter):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.quantize()
            return self
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight
        weight.transform(fn)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """What ``load_state_dict`` calls: a weight in full is quantized, a quantized one is copied as it is."""
        from lightning_efficient_init.quantize.state import find, load  # noqa: PLC0415 (it stands on this module)

        found = find(self, state_dict, prefix)
        rest = {key: value for key, value in state_dict.items() if key not in found.used}
        weight, self._parameters["weight"] = self._parameters["weight"], None
        try:
            Module._load_from_state_dict(
                self, rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._parameters["weight"] = weight
        error_msgs += found.errors
        if strict:
            missing_keys += found.missing
        load(self, found, prefix, error_msgs)

    def extra_repr(self) -> str:
        """Sizes, and how the weight is quantized."""
        return f"{super().extra_repr()}, quantize={self.mode}"
