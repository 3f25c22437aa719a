"""Which sinks fill a tensor: one line here for each kind of parameter memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_efficient_init import sharding
from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.quantize.layers import QuantizedParameter, plain
from lightning_efficient_init.sharding import Part, part_of, whole_part
from lightning_efficient_init.sinks.bitsandbytes import quantizing_sinks
from lightning_efficient_init.sinks.chunks import ChunkSink
from lightning_efficient_init.sinks.part import PartSink
from lightning_efficient_init.sinks.plain import plain_sink
from lightning_efficient_init.sinks.sink import Sink

_SPARSE = frozenset({torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})


def sinks_for(name: str, tensor: torch.Tensor, entry: Entry, part: Part | None) -> Sequence[Sink]:
    """The sinks that fill ``tensor``, called ``name`` in the model, or this rank's ``part`` of it, from ``entry``."""
    if isinstance(tensor, QuantizedParameter) and entry.dtype.is_floating_point:
        return quantizing_sinks(name, tensor, entry, is_scaled=False)
    return (_sink(name, tensor, entry, part),)


def sinks_again(name: str, param: QuantizedParameter, entry: Entry) -> Sequence[Sink]:
    """The sinks that fill a quantized ``param`` once more, with scaled values, if some did not fit; hardly ever any."""
    is_quantized_here = entry.dtype.is_floating_point and param.packing.has_overflowed(param)  # type: ignore[arg-type]
    return quantizing_sinks(name, param, entry, is_scaled=True) if is_quantized_here else ()


def sink_for(name: str, tensor: torch.Tensor, entry: Entry) -> Sink:
    """The sink that fills ``tensor``, called ``name`` in the model, from ``entry``, if one does."""
    return _sink(name, tensor, entry, part_of(tensor))


def _sink(name: str, tensor: torch.Tensor, entry: Entry, part: Part | None) -> Sink:
    if isinstance(tensor, QuantizedParameter):
        return plain_sink(name, plain(tensor), entry)  # it was quantized before
    if part is None and not entry.chunks:
        return plain_sink(name, tensor, entry)
    return sink_for_part(name, whole_part(tensor) if part is None else part, entry)


def sink_for_part(name: str, part: Part, entry: Entry) -> Sink:
    """The sink that fills this rank's part of a tensor."""
    return ChunkSink(name, part, entry) if entry.chunks else PartSink(name, part, entry)


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape that a checkpoint has for ``tensor``, which may be a part of it or hold it in another form."""
    if isinstance(tensor, QuantizedParameter):
        return tensor.packing.source_shape
    return sharding.shape_of(tensor)


def obstacle(tensor: torch.Tensor, entry: Entry) -> str | None:
    """Why no sink can fill ``tensor`` from ``entry``, in spite of their shapes; None if one can."""
    if isinstance(tensor, QuantizedParameter) and entry.chunks:
        return (
            f"expected a checkpoint that has it in one piece, to quantize it block by block, found {len(entry.chunks)} "
            "chunks: save the model in one file (state_dict_type='full', or save_distributed_checkpoint=False)"
        )
    if tensor.layout in _SPARSE:
        return (
            f"expected a dense tensor in the model, as in the checkpoint, found one of layout {tensor.layout}: call "
            ".to_dense() on it when the model is built, or register it with persistent=False"
        )
    return None
