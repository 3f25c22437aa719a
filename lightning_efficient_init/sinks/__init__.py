"""Where the bytes of a checkpoint end up: one file per kind of parameter memory."""

from __future__ import annotations

from lightning_efficient_init.sinks.choose import shape_of, sink_for, sinks_for
from lightning_efficient_init.sinks.part import PartSink
from lightning_efficient_init.sinks.plain import PLAIN_TYPES, PlainSink
from lightning_efficient_init.sinks.sink import Segment, Sink

__all__ = ["PLAIN_TYPES", "PartSink", "PlainSink", "Segment", "Sink", "shape_of", "sink_for", "sinks_for"]
