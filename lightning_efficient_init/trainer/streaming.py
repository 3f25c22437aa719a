"""What the strategies for the Trainer share: building in place, and checkpoints that stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from lightning_efficient_init.deferred import watch
from lightning_efficient_init.first_use import look_at_setup
from lightning_efficient_init.init_context import init_context
from lightning_efficient_init.lightning_checkpoint import is_streamable, open_lightning_checkpoint
from lightning_efficient_init.load.own_code import read_attributes
from lightning_efficient_init.load.replicas import Replicas, agreed
from lightning_efficient_init.load.state_dict import streaming_load_state_dict
from lightning_efficient_init.load.tree import read_tree


class StreamsCheckpoints(Strategy):
    """A strategy with which ``ckpt_path`` in ``fit``, ``validate``, ``test`` and ``predict`` streams.

    Optimizer states are read by ``fit`` only. To be mixed into one of Lightning's strategies, before it.
    """

    _gave_lazy = False  # to hooks, that is

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Construct modules on the device, in the precision, empty if asked for; checkpoints stream into them."""
        with super().tensor_init_context(empty_init=empty_init), init_context(empty=bool(empty_init)):
            yield

    def setup(self, trainer: pl.Trainer) -> None:
        """Initialize parameters that nobody has written, before optimizers and hooks of the user's see them."""
        assert self.model is not None
        self._read_attributes()
        look_at_setup(self.model)
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """See Lightning's strategy; what nobody has written is initialized before it is saved."""
        assert self.lightning_module is not None
        watch(self.lightning_module)
        return super().lightning_module_state_dict()

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, with weights and optimizer states as lazy tensors; a URL is left to Lightning."""
        if not is_streamable(checkpoint_path) or type(self.checkpoint_io) is not TorchCheckpointIO:
            kwargs = {} if weights_only is None else {"weights_only": weights_only}
            return super().load_checkpoint(checkpoint_path, **kwargs)
        device = torch.device("cpu")
        self._gave_lazy = True
        with agreed(self.replicas()):
            return open_lightning_checkpoint(checkpoint_path, device, weights_only=weights_only is not False)

    def _read_attributes(self) -> None:
        """Make real what hooks of callbacks, which run when the weights are loaded, have put into the module."""
        if self._gave_lazy and self.model is not None:
            read_attributes(self.model)
            self._gave_lazy = False

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Stream the weights through the module's own ``load_state_dict``."""
        with streaming_load_state_dict():
            super().load_model_state_dict(checkpoint, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read the optimizers' states straight to the device."""
        replicas = self.replicas()
        with agreed(replicas):
            states = read_tree(checkpoint["optimizer_states"], self.root_device, replicas=replicas)
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    def replicas(self) -> Replicas | None:
        """The other ranks, where all of them have the same model and load it together."""
        return None
