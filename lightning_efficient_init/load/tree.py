"""Reads whole parts of a checkpoint, such as an optimizer's state, into new tensors."""

from __future__ import annotations

from typing import Any

import torch

from lightning_efficient_init.checkpoint import Entry, LazyTensor, map_leaves
from lightning_efficient_init.load.load import stream
from lightning_efficient_init.load.pipeline import Settings
from lightning_efficient_init.load.replicas import Replicas
from lightning_efficient_init.load.report import Meter
from lightning_efficient_init.sinks import sink_for


def read_tree(
    tree: Any, device: torch.device, settings: Settings | None = None, replicas: Replicas | None = None
) -> Any:
    """Replace every entry and lazy tensor in ``tree`` by a tensor with its values.

    Args:
        tree: Nested containers, as ``index_checkpoint`` gives them.
        device: Where the tensors go. Scalars (step counters, loss scales) stay on the CPU, where their users read them.
        settings: Host memory and threads.
        replicas: Other ranks that read the same, to share the reading.

    Returns:
        The tree in new containers. What was one tensor in the checkpoint is one tensor here.
    """
    tensors: dict[Entry, torch.Tensor] = {}
    names: dict[Entry, str] = {}

    def reserve(leaf: Entry | LazyTensor, path: tuple[object, ...]) -> torch.Tensor:
        entry = leaf if isinstance(leaf, Entry) else leaf.entry
        if entry is None:
            assert isinstance(leaf, LazyTensor)
            return leaf.read().to(device)
        if entry not in tensors:
            names[entry] = ".".join(map(str, path))
            target = device if entry.shape else torch.device("cpu")
            tensors[entry] = torch.empty(entry.shape, dtype=entry.dtype, device=target)
        return tensors[entry]

    result = map_leaves(tree, (Entry, LazyTensor), reserve)
    with Meter(sum(entry.extent_bytes for entry in tensors), {device}, progress=None) as meter:
        sharing = replicas and replicas.confirm([names, device.type, settings])
        sinks = [sink_for(name, tensors[entry], entry) for entry, name in names.items()]
        stream(sinks, settings or Settings(), meter, sharing)
    return result
