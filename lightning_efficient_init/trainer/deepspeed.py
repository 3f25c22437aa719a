"""The DeepSpeed strategy for the Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.seed import reset_seed
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.nn import Module

from lightning_efficient_init.deferred import watch
from lightning_efficient_init.strategies.deepspeed import (
    BuildsInDtype,
    PartitionsModules,
    initializing,
    is_resumable,
)
from lightning_efficient_init.strategies.sharded import adapting
from lightning_efficient_init.trainer.sharded import RecordsModules


class _Precision(BuildsInDtype, DeepSpeedPrecision):
    """`EfficientInit` for DeepSpeed."""


class EfficientDeepSpeedStrategy(PartitionsModules, RecordsModules, DeepSpeedStrategy):
    """ZeRO-3, as ``Trainer(strategy="efficient_init_deepspeed_stage_3")``, on GPUs and on the CPU.

    Construction inside ``trainer.init_module()``, which works before there are processes, and in ``configure_model`` is
    only recorded. One parameter after the other is then partitioned, with the values that one device would have (those
    of rank 0's seed). ``ckpt_path`` may be a checkpoint of any kind: of a file each rank reads its part of the weights,
    strictly if the module's ``strict_loading`` says so; in ``fit``, folders that DeepSpeed has saved with as many ranks
    are restored by DeepSpeed, optimizer states included.

    It takes the arguments of Lightning's ``DeepSpeedStrategy``; ``stage`` is 3.

    Raises:
        ValueError: The configuration asks for another stage.
    """

    strategy_name = "efficient_init_deepspeed_stage_3"

    precision_plugin = adapting(DeepSpeedStrategy.precision_plugin)
    precision_class = _Precision
    stock = DeepSpeedStrategy
    # what is recorded is partitioned at setup; Lightning warns of `init_module` where this is overridden
    model_sharded_context = Strategy.model_sharded_context

    def setup_distributed(self) -> None:
        """Start the processes' communication."""
        if self.root_device.type != "cpu":
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer: pl.Trainer) -> None:
        """Partition the module, and let DeepSpeed take over."""
        with initializing():
            super().setup(trainer)
        assert self.lightning_module is not None
        watch(self.lightning_module)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint: what DeepSpeed can resume from is restored at once, of others the weights are lazy."""
        module = self.lightning_module
        is_fitting = module is not None and module.trainer.state.fn == TrainerFn.FITTING
        if is_fitting and is_resumable(checkpoint_path, self.world_size):
            return super().load_checkpoint(checkpoint_path)
        checkpoint = self._open(checkpoint_path, weights_only)
        if is_fitting:
            rank_zero_warn(
                f"{checkpoint_path}: not saved by DeepSpeed with {self.world_size} ranks, as there are now; of other "
                "checkpoints it can take over the weights but not the optimizers' states: these start anew. To resume "
                "with them, pass a folder that this strategy has saved with as many ranks."
            )
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Stream this rank's part of the weights through the module's own ``load_state_dict``."""
        if "state_dict" in checkpoint:
            self._stream_weights(checkpoint, strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """DeepSpeed restores optimizers, or nobody does."""
        return False

    def _setup_model(self, model: Module) -> Module:  # type: ignore[override]
        return self.make_partitions(model)
