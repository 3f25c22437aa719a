"""The FSDP2 strategy for the Trainer, with tensor parallelism for those who ask for it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import Module

from lightning_efficient_init.deferred.sharded import windows
from lightning_efficient_init.strategies.fsdp2 import SizesMesh, check_parallelized, is_parallelized, shard_blocks
from lightning_efficient_init.strategies.sharded import adapting
from lightning_efficient_init.trainer.sharded import LoadsParts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class EfficientFSDP2Strategy(SizesMesh, LoadsParts, ModelParallelStrategy):
    """Parameters sharded by ``fully_shard``, as ``Trainer(strategy="efficient_init_fsdp2")``.

    Construction inside ``trainer.init_module()``, which works before there are processes, and in ``configure_model`` is
    only recorded. When fitting starts, the model is sharded, and each rank gives its part memory, with the values that
    one device would have (those of rank 0's seed). Checkpoints of any format may be loaded before, or as ``ckpt_path``;
    each rank reads the bytes of its part, of the weights and of the optimizers' states. All ranks fail together.

    A ``configure_model`` that shards the module itself, as Lightning's ``ModelParallelStrategy`` asks for, may do so.

    Args:
        parallelize_fn: Shards the module: called with it and the device mesh, returns it. It sees parameters on the
            meta device. By default ``fully_shard`` is applied to the repeated blocks, and then to the rest.
        data_parallel_size: See Lightning's ``ModelParallelStrategy``; all ranks, unless the sizes are given.
        tensor_parallel_size: See Lightning's ``ModelParallelStrategy``; 1, unless the sizes are given.
        save_distributed_checkpoint: See Lightning's ``ModelParallelStrategy``.
        process_group_backend: See Lightning's ``ModelParallelStrategy``.
        timeout: See Lightning's ``ModelParallelStrategy``.
    """

    strategy_name = "efficient_init_fsdp2"
    precision_plugin = adapting(ModelParallelStrategy.precision_plugin)

    def __init__(
        self,
        parallelize_fn: Callable[[Any, DeviceMesh], Any] | None = None,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        is_default = parallelize_fn is None and tensor_parallel_size == data_parallel_size == "auto"
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1 if is_default else tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._parallelize_fn: Callable[[Any, DeviceMesh], Any] = parallelize_fn or shard_blocks

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the module, give each rank its part, and make the optimizers."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        known = windows(self.model)
        self.model = self.shard(self.precision_plugin.convert_module(self.model), self._parallelize, known)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)
        self.clean_hparams()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step inside its forward, where FSDP2 has gathered what belongs to no block."""
        with self.precision_plugin.train_step_context():
            return self._step("training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """See ``training_step``."""
        with self.precision_plugin.val_step_context():
            return self._step("validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """See ``training_step``."""
        with self.precision_plugin.test_step_context():
            return self._step("test_step", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """See ``training_step``."""
        with self.precision_plugin.predict_step_context():
            return self._step("predict_step", *args, **kwargs)

    def _step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert module is not None
        if self.model is module and not hasattr(module, "_get_fsdp_state"):
            return getattr(module, name)(*args, **kwargs)  # what is sharded is below
        assert self.model is not None
        return self._forward_redirection(self.model, module, name, *args, **kwargs)

    def _parallelize(self, module: Module) -> Module:
        if is_parallelized(module):
            return check_parallelized(module)
        return check_parallelized(self._parallelize_fn(module, self.device_mesh))
