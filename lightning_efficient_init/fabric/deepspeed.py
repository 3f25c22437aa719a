"""The DeepSpeed strategy for Fabric."""

from __future__ import annotations

import os
from typing import Any

from lightning.fabric.plugins.precision import DeepSpeedPrecision
from lightning.fabric.strategies import DeepSpeedStrategy
from lightning.fabric.utilities.seed import reset_seed
from lightning.fabric.utilities.types import _PATH
from torch.nn import Module
from torch.optim import Optimizer

from lightning_efficient_init.checkpoint.deepspeed import num_ranks
from lightning_efficient_init.deferred import watch
from lightning_efficient_init.errors import UnsupportedCheckpointError
from lightning_efficient_init.fabric.sharded import RecordsModules
from lightning_efficient_init.sharding import is_engine
from lightning_efficient_init.strategies.deepspeed import (
    BuildsInDtype,
    PartitionsModules,
    initializing,
    is_resumable,
)
from lightning_efficient_init.strategies.sharded import adapting


class _Precision(BuildsInDtype, DeepSpeedPrecision):
    """`EfficientInit` for DeepSpeed."""


class EfficientDeepSpeedStrategy(PartitionsModules, RecordsModules, DeepSpeedStrategy):
    """ZeRO-3, as ``Fabric(strategy="efficient_init_deepspeed_stage_3")``, on GPUs and on the CPU.

    Construction inside ``fabric.init_module()`` is only recorded. ``fabric.setup`` partitions one parameter after the
    other, with the values that one device would have (those of rank 0's seed). Checkpoints of any format may be loaded
    before or after; each rank reads the bytes of its partition, and ``strict`` means it. Folders that DeepSpeed has
    saved with as many ranks are restored by DeepSpeed, optimizer states included, into a model that is being trained.

    It takes the arguments of Lightning's ``DeepSpeedStrategy``; ``stage`` is 3.

    Raises:
        ValueError: The configuration asks for another stage.
    """

    precision = adapting(DeepSpeedStrategy.precision)
    precision_class = _Precision
    stock = DeepSpeedStrategy

    def _setup_distributed(self) -> None:
        if self.root_device.type != "cpu":
            super()._setup_distributed()
            return
        reset_seed()
        self._set_world_ranks()
        self._init_deepspeed_distributed()
        self._format_config()
        self._config_initialized = True

    def module_to_device(self, module: Module) -> None:
        """Nothing yet: it is partitioned first."""

    def setup_module_and_optimizers(
        self, module: Module, optimizers: list[Optimizer], *scheduler: Any
    ) -> tuple[Any, ...]:
        """Partition the module, and let DeepSpeed take over the one optimizer; newer Lightning hands on a scheduler."""
        self.make_partitions(module)
        with initializing():
            found = DeepSpeedStrategy.setup_module_and_optimizers(self, module, optimizers, *scheduler)
        watch(module)
        return found

    def setup_module(self, module: Module) -> Module:  # type: ignore[override]
        """Partition the module for inference."""
        self.make_partitions(module)
        with initializing():
            engine = DeepSpeedStrategy.setup_module(self, module)
        watch(module)
        return engine  # type: ignore[no-any-return]

    def load_checkpoint(
        self,
        path: _PATH,
        state: Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Restore ``state`` in place, from what DeepSpeed has saved or from a checkpoint of any other kind.

        Args:
            path: A file or folder.
            state: A module, or a dict of objects to restore.
            strict: Whether a module's names must match exactly, and every key of ``state`` must be there.
            weights_only: Whether the pickle may only hold tensors and plain containers (the default).

        Returns:
            What was not asked for; its tensors are lazy, unless DeepSpeed restores them.

        Raises:
            UnsupportedCheckpointError: An optimizer is to be restored from what DeepSpeed has not saved, or not with
                as many ranks.
        """
        from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer  # noqa: PLC0415 (an optional dependency)

        engines = [obj for obj in state.values() if is_engine(obj)] if isinstance(state, dict) else []
        is_trained = any(isinstance(engine.optimizer, DeepSpeedOptimizer) for engine in engines)
        if is_trained and is_resumable(path, self.world_size):
            return DeepSpeedStrategy.load_checkpoint(self, path, state, strict)
        objects = state.values() if isinstance(state, dict) else [state]
        if self._is_streamed(path) and any(isinstance(obj, DeepSpeedOptimizer | Optimizer) for obj in objects):
            saving = num_ranks(os.fspath(path))
            found = f"one of {saving}" if saving else "another checkpoint"
            raise UnsupportedCheckpointError(
                f"{path}: expected a folder that DeepSpeed has saved with {self.world_size} ranks, as there are now, "
                f"found {found}; DeepSpeed cannot take over an optimizer's state from that. Load the model alone, or "
                "the model and its optimizer from what fabric.save has written with this strategy and as many ranks."
            )
        return super().load_checkpoint(path, state, strict, weights_only)
