"""Which sink fills a tensor: one line here for each kind of parameter memory."""

from __future__ import annotations

import torch

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.sinks.plain import PlainSink
from lightning_efficient_init.sinks.sink import Sink


def sink_for(name: str, tensor: torch.Tensor, entry: Entry) -> Sink:
    """The sink that fills ``tensor``, called ``name`` in the model, from ``entry``."""
    return PlainSink(name, tensor, entry)


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape that a checkpoint has for ``tensor``, which may be a part of it or hold it in another form."""
    return tuple(tensor.shape)
