"""Quantization while models are built and loaded. Nothing here imports bitsandbytes until a model is quantized."""

from __future__ import annotations

from lightning_efficient_init.quantize.layers import QuantizedLayer, QuantizedParameter, Writer
from lightning_efficient_init.quantize.modes import MODES, QuantizeMode
from lightning_efficient_init.quantize.quantizer import Quantizer
from lightning_efficient_init.quantize.state import parts_of

__all__ = [
    "MODES",
    "QuantizeMode",
    "QuantizedLayer",
    "QuantizedParameter",
    "Quantizer",
    "Writer",
    "parts_of",
]
