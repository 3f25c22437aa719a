"""What a state dict has for a quantized layer: a weight in full, or one that was quantized before.

The layout is bitsandbytes' own, which transformers shares. Four bits: ``weight`` (packed), ``weight.absmax``,
``weight.quant_map``, with double quantization also ``weight.nested_absmax`` and ``weight.nested_quant_map``, and
``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``), bytes of JSON with what is not a tensor. int8: ``weight``,
``SCB`` and perhaps ``weight_format``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_efficient_init.checkpoint import Entry, LazyTensor, read_entry
from lightning_efficient_init.quantize.layers import QuantizedLayer, QuantizedParameter

_BLOB = "weight.quant_state.bitsandbytes__"
_TENSORS = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", "SCB")
_ROW_MAJOR = (0, "row")
_MOST_BLOB_BYTES = 1 << 16


@dataclass(slots=True)
class Found:
    """What a state dict has for one layer's weight.

    Attributes:
        used: Keys that are about the weight.
        sources: Part of the layer (``weight``, ``weight.absmax``) to the value for it.
        is_packed: Whether the weight was quantized before.
        missing: Keys that ought to be there.
        errors: What stands in the way, as sentences.
        notes: What a checkpoint says beside tensors.
    """

    used: set[str] = field(default_factory=set)
    sources: dict[str, Any] = field(default_factory=dict)
    is_packed: bool = False
    missing: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


def weight_of(key: str) -> str | None:
    """The weight for which a key of a state dict says how it was quantized; None if it does not."""
    prefix, found, _ = key.partition(_BLOB)
    if found:
        return f"{prefix}weight"
    part = next((part for part in _TENSORS if key == part or key.endswith(f".{part}")), None)
    return None if part is None else f"{key.removesuffix(part)}weight"


def parts_of(model: Module) -> dict[str, Tensor]:
    """Name in a state dict of ``model`` to the memory of every part of a quantized weight, except ``weight``."""
    return {
        f"{path}.{part}" if path else part: tensor
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLayer) and isinstance(module.weight, QuantizedParameter)
        for part, tensor in module.weight.parts().items()
        if part != "weight"
    }


def find(layer: QuantizedLayer, state: Mapping[str, Any], prefix: str) -> Found:
    """Look for the layer's weight in a state dict. Values are entries, lazy tensors or tensors.

    Args:
        layer: The layer.
        state: Of the whole model.
        prefix: The layer's name, with a dot.
    """
    found = Found()
    blobs = [key for kind in ("nf4", "fp4") if (key := f"{_BLOB}{kind}") and prefix + key in state]
    present = {name: state[prefix + name] for name in ("weight", *_TENSORS, "weight_format") if prefix + name in state}
    found.used = {prefix + name for name in (*present, *blobs)}
    if "weight" not in present:
        found.missing.append(f"{prefix}weight")
        return found
    weight = _entry_or_value(present["weight"])
    statistics = [name for name in (*_TENSORS, *blobs) if name in present or name in blobs]
    if not isinstance(weight, (Entry, Tensor)):
        found.errors.append(f"{prefix}weight: expected a tensor, found {type(weight).__name__}")
    elif statistics or weight.dtype in {torch.int8, torch.uint8}:
        found.is_packed = True
        found.notes = _read_blob(state[prefix + blobs[0]], found, prefix) if blobs else {}
        _match_packed(layer, {**present, "weight": weight}, found, prefix)
    elif not weight.dtype.is_floating_point:
        found.errors.append(f"{prefix}weight: expected floating-point values, found {weight.dtype}")
    else:
        found.sources["weight"] = weight
    return found


def load(layer: QuantizedLayer, found: Found, prefix: str, errors: list[str]) -> None:
    """Copy what was found into the layer; for ``Module.load_state_dict``, which copies while it goes through modules.

    Args:
        layer: The layer.
        found: As `find` found it.
        prefix: The layer's name, with a dot.
        errors: Messages of what could not be copied are added here, in torch's words.
    """
    if found.errors or found.missing or not found.sources:
        return
    weight = layer.weight
    with torch.no_grad():
        if not found.is_packed:
            source, expected = found.sources["weight"], full_shape(layer)
            if tuple(source.shape) != expected:
                errors.append(
                    f"size mismatch for {prefix}weight: copying a param with shape {torch.Size(source.shape)} from "
                    f"checkpoint, the shape in current model is {torch.Size(expected)}."
                )
                return
            weight.copy_(_tensor(source))
            return
        assert layer.packing is not None
        if not isinstance(weight, QuantizedParameter):
            device = torch.device("cpu") if weight.is_meta else weight.device
            layer.packing.allocate(weight, device)
            layer.is_waiting = False
        assert isinstance(layer.weight, QuantizedParameter)
        for name, part in layer.weight.parts().items():
            if name in found.sources:
                part.copy_(_tensor(found.sources[name]))
        adopt(layer, found.notes)


def full_shape(layer: QuantizedLayer) -> tuple[int, ...]:
    """The shape of the layer's weight in full, in a checkpoint."""
    return tuple(layer.weight.shape) if layer.packing is None else layer.packing.source_shape


def adopt(layer: QuantizedLayer, notes: Mapping[str, Any]) -> None:
    """Take over what a quantized checkpoint says beside tensors."""
    state = getattr(layer.weight, "quant_state", None)
    if state is not None and notes:
        state.dtype = getattr(torch, notes["dtype"])
        if state.nested:
            state.offset.fill_(notes["nested_offset"])


def _entry_or_value(value: Any) -> Any:
    if isinstance(value, LazyTensor):
        return value.read() if value.entry is None else value.entry
    return value


def _tensor(value: Entry | Tensor) -> Tensor:
    return read_entry(value) if isinstance(value, Entry) else value


def _read_blob(value: Any, found: Found, prefix: str) -> dict[str, Any]:
    """The few numbers that are stored as bytes of JSON."""
    source = _entry_or_value(value)
    try:
        if source.dtype != torch.uint8 or len(source.shape) != 1 or source.shape[0] > _MOST_BLOB_BYTES:
            raise ValueError(f"expected bytes, found {source.dtype} of shape {list(source.shape)}")
        notes = json.loads(bytes(_tensor(source).tolist()).decode())
        _check_notes(notes)
    except (ValueError, AttributeError, RecursionError) as error:
        found.errors.append(f"{prefix}{_BLOB}*: the description of the quantization cannot be read: {error}")
        return {}
    return dict(notes)


_NOTES: dict[str, Callable[[Any], bool]] = {
    "quant_type": lambda value: value in ("nf4", "fp4"),
    "blocksize": lambda value: type(value) is int,
    "dtype": lambda value: value in ("float16", "bfloat16", "float32"),
    "shape": lambda value: isinstance(value, list) and all(type(size) is int for size in value),
}
_NESTED_NOTES: dict[str, Callable[[Any], bool]] = {
    "nested_blocksize": lambda value: type(value) is int,
    "nested_dtype": lambda value: value == "float32",
    "nested_offset": lambda value: type(value) is float,
}


def _check_notes(notes: Any) -> None:
    if not isinstance(notes, dict):
        raise ValueError(f"expected a dict, found {type(notes).__name__}")
    checks = {**_NOTES, **(_NESTED_NOTES if "nested_blocksize" in notes else {})}
    for name, is_valid in checks.items():
        if name not in notes or not is_valid(notes[name]):
            raise ValueError(f"{name!r} is {notes.get(name)!r}")


def _match_packed(layer: QuantizedLayer, present: dict[str, Any], found: Found, prefix: str) -> None:
    """Take the parts if they were quantized as the layer is, else say why not."""
    mode = _mode_of(present, found)
    if found.errors:
        return
    if mode != layer.mode:
        found.errors.append(
            f"{prefix}weight: the checkpoint has it quantized as {mode}, the model is {layer.mode}. Build the model "
            f'with EfficientInit(..., quantize="{mode}"), or load the checkpoint that this one was made from'
        )
        return
    expected = _expected(layer)
    for name, (shape, dtype) in expected.items():
        value = _entry_or_value(present[name]) if name in present else None
        if value is None:
            found.missing.append(prefix + name)
            continue
        value = _as_bytes(value) if name == "weight" and dtype == torch.uint8 else value
        if tuple(value.shape) != shape or (value.dtype != dtype and name != "SCB"):
            found.errors.append(
                f"{prefix}{name}: expected {dtype} of shape {list(shape)}, found {value.dtype} of shape "
                f"{list(value.shape)}"
            )
        found.sources[name] = value
    _match_notes(layer, present, found, prefix)


def _mode_of(present: dict[str, Any], found: Found) -> str:
    if "SCB" in present or present["weight"].dtype == torch.int8:
        return "int8"
    kind = found.notes.get("quant_type", "4-bit")
    return f"{kind}-dq" if "weight.nested_absmax" in present else str(kind)


def _expected(layer: QuantizedLayer) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each part, without memory for any."""
    assert layer.packing is not None
    param: Any = torch.nn.Parameter(torch.empty(layer.packing.shape, device="meta"))
    layer.packing.allocate(param, torch.device("meta"))
    return {name: (tuple(part.shape), part.dtype) for name, part in param.parts().items() if name != "offset"}


def _as_bytes(value: Any) -> Any:
    """Packed values as bytes in a column, whichever dtype they are stored in (``bnb_4bit_quant_storage``)."""
    if isinstance(value, Entry) and value.is_contiguous:
        return replace(value, dtype=torch.uint8, shape=(value.num_bytes, 1), stride=(1, 1))
    return value.contiguous().view(torch.uint8).view(-1, 1) if isinstance(value, Tensor) else value


def _match_notes(layer: QuantizedLayer, present: dict[str, Any], found: Found, prefix: str) -> None:
    if layer.mode == "int8":
        layout = _entry_or_value(present.get("weight_format", 0))
        layout = _tensor(layout).item() if isinstance(layout, (Entry, Tensor)) else layout
        if layout not in _ROW_MAJOR:
            found.errors.append(f"{prefix}weight_format: expected row-major order (0), found {layout!r}")
        return
    assert layer.packing is not None
    if not found.notes:
        found.missing.append(f"{prefix}{_BLOB}{layer.mode[:3]}")
        return
    wanted = {"blocksize": 64, "shape": list(layer.packing.shape), "nested_blocksize": 256}
    for name, value in wanted.items():
        if name in found.notes and found.notes[name] != value:
            found.errors.append(f"{prefix}weight: expected quantization with {name} {value}, found {found.notes[name]}")
