"""The ways of quantizing, by the names that Lightning has for them."""

from __future__ import annotations

from typing import Literal, get_args

QuantizeMode = Literal["int8", "int8-training", "nf4", "nf4-dq", "fp4", "fp4-dq"]

MODES: tuple[str, ...] = get_args(QuantizeMode)


def is_4bit(mode: str) -> bool:
    """Whether weights take four bits: ``nf4`` and ``fp4``."""
    return mode[:3] in {"nf4", "fp4"}


def is_nested(mode: str) -> bool:
    """Whether the statistics of the quantization are quantized themselves ("double quantization")."""
    return mode.endswith("-dq")
