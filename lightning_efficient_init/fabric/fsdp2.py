"""The FSDP2 strategy for Fabric, with tensor parallelism for those who ask for it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import ModelParallelStrategy
from torch.nn import Module

from lightning_efficient_init.fabric.sharded import RecordsModules
from lightning_efficient_init.strategies.fsdp2 import SizesMesh, check_parallelized, shard_blocks
from lightning_efficient_init.strategies.sharded import adapting

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class EfficientFSDP2Strategy(SizesMesh, RecordsModules, ModelParallelStrategy):
    """Parameters sharded by ``fully_shard``, as ``Fabric(strategy="efficient_init_fsdp2")``.

    Construction inside ``fabric.init_module()`` is only recorded. ``fabric.setup`` shards the model and gives each rank
    its part, with the values that one device would have (those of rank 0's seed). Checkpoints of any format may be
    loaded before or after; each rank reads the bytes of its part. All ranks take part, and fail together.

    Args:
        parallelize_fn: Shards the model: called with it and the device mesh, returns it. It sees parameters on the meta
            device. By default ``fully_shard`` is applied to the repeated blocks, and then to the rest.
        data_parallel_size: See Lightning's ``ModelParallelStrategy``; without ``parallelize_fn`` all ranks.
        tensor_parallel_size: See Lightning's ``ModelParallelStrategy``; without ``parallelize_fn`` 1.
        save_distributed_checkpoint: See Lightning's ``ModelParallelStrategy``.
        process_group_backend: See Lightning's ``ModelParallelStrategy``.
        timeout: See Lightning's ``ModelParallelStrategy``.
    """

    precision = adapting(ModelParallelStrategy.precision)

    def __init__(
        self,
        parallelize_fn: Callable[[Any, DeviceMesh], Any] | None = None,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        is_default = parallelize_fn is None and tensor_parallel_size == "auto"
        super().__init__(
            parallelize_fn=parallelize_fn or shard_blocks,
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1 if is_default else tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_module(self, module: Module) -> Module:
        """Shard the module, and give each rank its part."""
        return self.shard(module, self._parallelize)

    def _parallelize(self, module: Module) -> Module:
        parallelize: Callable[[Any, DeviceMesh], Any] = self._parallelize_fn
        return check_parallelized(parallelize(module, self.device_mesh))
