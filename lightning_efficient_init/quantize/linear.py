"""bitsandbytes' layers, put in the place of a Linear without a new object.

What differs from the classes of bitsandbytes. Parameters keep their identity through quantization, ``to``, loading
and deep copies; a layer holds its quantized values once; moving a model moves the statistics, casting it does not
touch them; a bias keeps its dtype in mixed precision; int8 layers take inputs of any number of dims, and quantize
trained weights in each forward, gradients accumulated or not. On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit
weights at the first forward, which loses bits of doubly quantized statistics; these layers stay as they are.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt
from torch import Tensor, nn
from torch.nn import functional

from lightning_efficient_init.quantize.layers import QuantizedLayer
from lightning_efficient_init.quantize.modes import is_4bit
from lightning_efficient_init.quantize.packing import Packing4bit, Packing8bit

OUTLIER_THRESHOLD = 6.0  # of LLM.int8(), as in Lightning and transformers


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


class _TrainedMatMul8bit(MatMul8bitLt):  # type: ignore[misc]
    """LLM.int8() with a weight that is trained.

    On CUDA devices bitsandbytes 0.50 computes that weight's gradient in int8, from output gradients that it quantizes
    by rows, with the scales of their columns: each row counts as much as any other, however small. Here it is the
    product of what came in and what comes back, as on other devices.
    """

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows, weight and bias."""
        if ctx.is_empty:
            return MatMul8bitLt.backward(ctx, grad_output)  # type: ignore[no-any-return]
        needs_rows, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
        grad_rows = grad_weight = grad_bias = None
        if needs_bias:
            grad_bias = grad_output.sum(0, dtype=ctx.dtype_bias)
        grad_output = grad_output.to(ctx.dtype_A)
        if needs_rows:
            scale = ctx.state.SCB.unsqueeze(1).mul(1.0 / 127.0)
            grad_rows = grad_output @ ctx.state.CB.to(ctx.dtype_A, copy=True).mul_(scale)
        if needs_weight:
            grad_weight = grad_output.t() @ ctx.tensors[2]
        return grad_rows, grad_weight, None, grad_bias, None


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
            rows = x.to(dtype).reshape(-1, x.shape[-1])
            if rows.is_cuda and weight.requires_grad:
                out = _TrainedMatMul8bit.apply(rows, weight, None, bias, state)
            else:
                out = bnb.matmul(rows, weight, bias=bias, state=state)
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
