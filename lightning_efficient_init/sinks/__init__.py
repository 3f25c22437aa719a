"""Where the bytes of a checkpoint end up: one file per kind of parameter memory."""

from __future__ import annotations

from lightning_efficient_init.sinks.choose import (
    obstacle,
    shape_of,
    sink_for,
    sink_for_part,
    sinks_again,
    sinks_for,
)
from lightning_efficient_init.sinks.chunks import ChunkSink
from lightning_efficient_init.sinks.part import PartSink
from lightning_efficient_init.sinks.plain import PLAIN_TYPES, ScratchSink, is_direct, plain_sink
from lightning_efficient_init.sinks.sink import Segment, Sink

__all__ = [
    "PLAIN_TYPES",
    "ChunkSink",
    "PartSink",
    "ScratchSink",
    "Segment",
    "Sink",
    "is_direct",
    "obstacle",
    "plain_sink",
    "shape_of",
    "sink_for",
    "sink_for_part",
    "sinks_again",
    "sinks_for",
]
