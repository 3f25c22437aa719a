"""The FSDP strategy for Fabric."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from lightning.fabric.strategies import FSDPStrategy
from torch.nn import Module

from lightning_efficient_init.fabric.sharded import RecordsModules
from lightning_efficient_init.strategies.fsdp import (
    KeepsDeclaredDtypes,
    WrapsModules,
    gathering,
    is_wrapped,
    making_mesh,
)
from lightning_efficient_init.strategies.sharded import adapting


class _Precision(KeepsDeclaredDtypes, FSDPPrecision):
    """See `KeepsDeclaredDtypes`."""


class EfficientFSDPStrategy(WrapsModules, RecordsModules, FSDPStrategy):
    """Parameters sharded by ``FullyShardedDataParallel``, as ``Fabric(strategy="efficient_init_fsdp")``, also on a CPU.

    Construction inside ``fabric.init_module()`` is only recorded. ``fabric.setup`` gives FSDP one unit after the other,
    with the values that one device would have (those of rank 0's seed). Checkpoints of any format may be loaded before
    or after; each rank reads the bytes of its part. All ranks take part, and fail together.

    It takes the arguments of Lightning's ``FSDPStrategy``. By default the units are the repeated blocks and the rest.
    """

    precision = adapting(FSDPStrategy.precision)
    precision_class = _Precision

    def setup_environment(self) -> None:
        """See Lightning's ``FSDPStrategy``; a mesh may be of CPUs as well."""
        with making_mesh(self._fsdp_kwargs, lambda: self.root_device.type):
            super().setup_environment()

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Record the construction of modules, in the precision; ``wrap`` inside knows what this strategy wants."""
        with self.module_sharded_context(), super().module_init_context(empty_init):
            yield

    def setup_module(self, module: Module) -> Module:
        """Shard the module, and give each rank its part."""
        return self.shard(module, self._wrap)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """See Lightning's ``FSDPStrategy``."""
        with gathering():
            super().save_checkpoint(*args, **kwargs)

    def _wrap(self, module: Module) -> Module:
        if is_wrapped(module):
            return FSDPStrategy.setup_module(self, module)
        return self.wrap(module, self._fsdp_kwargs)
