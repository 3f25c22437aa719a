"""Which sink fills a tensor: one line here for each kind of parameter memory."""

from __future__ import annotations

import torch

from lightning_efficient_init import sharding
from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.sharding import Part, part_of, whole_part
from lightning_efficient_init.sinks.chunks import ChunkSink
from lightning_efficient_init.sinks.part import PartSink
from lightning_efficient_init.sinks.plain import PlainSink
from lightning_efficient_init.sinks.sink import Sink


def sink_for(name: str, tensor: torch.Tensor, entry: Entry) -> Sink:
    """The sink that fills ``tensor``, called ``name`` in the model, from ``entry``."""
    part = part_of(tensor)
    if part is None and not entry.chunks:
        return PlainSink(name, tensor, entry)
    return sink_for_part(name, whole_part(tensor) if part is None else part, entry)


def sink_for_part(name: str, part: Part, entry: Entry) -> Sink:
    """The sink that fills this rank's part of a tensor."""
    return ChunkSink(name, part, entry) if entry.chunks else PartSink(name, part, entry)


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape that a checkpoint has for ``tensor``, which may be a part of it or hold it in another form."""
    return sharding.shape_of(tensor)
