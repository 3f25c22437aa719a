"""``LightningModule.load_from_checkpoint`` inside ``init_module``: the checkpoint streams.

Lightning reads the whole file, optimizer states included, builds the model, hands it the state dict, and moves the
model to the device of the state dict's first tensor. Inside ``init_module`` the file is indexed instead, and the
state dict holds lazy tensors that name the model's own device; everything else in Lightning's function stays as it
is: hyperparameters, ``hparams_file``, ``strict``, ``configure_model`` and the ``on_load_checkpoint`` hook.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.core import saving

from lightning_efficient_init.checkpoint import Seal, index_tree, lazy_tree
from lightning_efficient_init.deferred import eager
from lightning_efficient_init.errors import UnsupportedCheckpointError
from lightning_efficient_init.garbage import collections_paused
from lightning_efficient_init.load.tree import read_tree
from lightning_efficient_init.patching import ScopedPatch

#: Parts of a Lightning checkpoint that are read only when somebody uses them.
LAZY_KEYS = ("state_dict", "optimizer_states")


@collections_paused()
def open_lightning_checkpoint(
    path: str | os.PathLike[str], device: torch.device, *, weights_only: bool
) -> dict[str, Any]:
    """The checkpoint as ``torch.load`` would return it, with weights and optimizer states as lazy tensors.

    Args:
        path: A Lightning checkpoint file.
        device: Where weights and optimizer states go when they are read one by one. The rest is read to the CPU.
        weights_only: Whether the pickle may only hold tensors and plain containers.

    Raises:
        UnsupportedCheckpointError: It is a checkpoint, but not Lightning's.
    """
    with eager():
        found = index_tree(path, weights_only=weights_only)
        tree = _in_one_piece(found.tree)
        if not isinstance(tree, dict) or "state_dict" not in tree:
            raise UnsupportedCheckpointError(
                f"{path}: expected a Lightning checkpoint, a dict with the key 'state_dict'; found {found.format} with "
                "bare weights. Load it into a model with lightning_efficient_init.load_checkpoint(model, path)."
            )
        rest = {key: value for key, value in tree.items() if key not in LAZY_KEYS}
        seal = Seal(found.files)
        lazy = {key: lazy_tree(value, device, seal) for key, value in tree.items() if key in LAZY_KEYS}
        return {**read_tree(rest, torch.device("cpu")), **lazy}


def _in_one_piece(tree: Any) -> Any:
    """A checkpoint that Lightning saved in a folder, with its parts where they are in a file."""
    if not isinstance(tree, dict) or "pytorch-lightning_version" not in tree:
        return tree
    tree = dict(tree)
    if "state_dict" not in tree and "model" in tree:  # as FSDP's strategy calls it
        tree["state_dict"] = tree.pop("model")
    states = list(itertools.takewhile(lambda key: key in tree, map("optimizer_{}".format, itertools.count())))
    if states:
        tree["optimizer_states"] = [tree.pop(key) for key in states]
    return tree


def is_streamable(path: Any) -> bool:
    """Whether ``path`` names a local file; file objects and URLs are left to Lightning."""
    return isinstance(path, (str, os.PathLike)) and _is_local_file_protocol(str(path))


def _load(
    original: Callable[..., Any],
    path_or_url: Any,
    map_location: Any = None,
    weights_only: bool | None = None,
) -> Any:
    is_by_location = callable(map_location) and map_location is not saving._default_map_location
    if not is_streamable(path_or_url) or is_by_location or isinstance(map_location, dict):
        # where each tensor goes depends on where it was saved from: Lightning's own way
        with eager():
            return original(path_or_url, map_location=map_location, weights_only=weights_only is not False)
    device = (
        torch.get_default_device() if callable(map_location) or map_location is None else torch.device(map_location)
    )
    return open_lightning_checkpoint(path_or_url, device, weights_only=weights_only is not False)


#: Open inside ``init_module``; acts on checkpoints in the local file system.
streaming_load_from_checkpoint = ScopedPatch(saving, "pl_load", _load)
