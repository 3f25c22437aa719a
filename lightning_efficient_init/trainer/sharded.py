"""What the sharding strategies for the Trainer share: construction on paper, checkpoints in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.parsing import clean_namespace

from lightning_efficient_init.deferred import look
from lightning_efficient_init.lightning_checkpoint import is_streamable, open_lightning_checkpoint
from lightning_efficient_init.load.own_code import read_attributes
from lightning_efficient_init.load.replicas import agreed
from lightning_efficient_init.load.state_dict import streaming_load_state_dict
from lightning_efficient_init.strategies.sharded import ShardsModules, sharded_init_context


class RecordsModules(ShardsModules, Strategy):
    """A strategy whose modules are recorded inside ``trainer.init_module()``, and sharded when they are set up."""

    _gave_lazy = False  # to hooks, that is

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Record the construction of modules, in the precision; checkpoints are read once they are sharded."""
        context = sharded_init_context(self.root_device, empty=bool(empty_init))
        with self.precision_plugin.tensor_init_context(), context:
            yield

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the module, and make the optimizers."""
        super().setup(trainer)
        self.clean_hparams()

    def on_train_start(self) -> None:
        """Initialize what nobody has written by now, before the module's own steps use it."""
        assert self.model is not None
        assert self.lightning_module is not None
        look(self.model)
        look(self.lightning_module)
        if self._gave_lazy:
            read_attributes(self.lightning_module)  # what hooks of callbacks have put there
            self._gave_lazy = False

    on_validation_start = on_test_start = on_predict_start = on_train_start

    def clean_hparams(self) -> None:
        """Leave out what a checkpoint cannot hold: modules among the hyperparameters, once they have been sharded."""
        assert self.lightning_module is not None
        clean_namespace(self.lightning_module.hparams)

    def _open(self, path: _PATH, weights_only: bool | None) -> dict[str, Any]:
        """The checkpoint, with weights and optimizer states as lazy tensors."""
        self._gave_lazy = True
        with agreed(self.replicas()):
            return open_lightning_checkpoint(path, torch.device("cpu"), weights_only=weights_only is not False)

    def _stream_weights(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Read this rank's part of the weights, through the module's own ``load_state_dict``."""
        assert self.lightning_module is not None
        with streaming_load_state_dict():
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)


class LoadsParts(RecordsModules):
    """A strategy that restores a module after it has been sharded, through the module's own ``load_state_dict``."""

    _path = "The checkpoint"

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The Trainer hands over the optimizers' states, which this strategy has not read."""
        return True

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, with weights and optimizer states as lazy tensors; a URL is left to Lightning."""
        self._path = str(checkpoint_path)
        if not is_streamable(checkpoint_path):
            kwargs = {} if weights_only is None else {"weights_only": weights_only}
            return super().load_checkpoint(checkpoint_path, **kwargs)
        return self._open(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Stream this rank's part of the weights through the module's own ``load_state_dict``."""
        if is_streamable(self._path):
            self._stream_weights(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read this rank's part of the optimizers' states."""
        if not is_streamable(self._path):
            return
        assert self.model is not None
        with agreed(self.replicas()):
            for optimizer, tree in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                optimizer.load_state_dict(self.read_optimizer(tree, optimizer, {"model": self.model}, self._path))
