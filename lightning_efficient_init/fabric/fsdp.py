"""The FSDP strategy for Fabric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies import FSDPStrategy
from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
from lightning.fabric.utilities.types import _PATH
from torch.nn import Module
from torch.optim import Optimizer

from lightning_efficient_init.fabric.streaming import StreamsCheckpoints
from lightning_efficient_init.lightning_checkpoint import is_streamable
from lightning_efficient_init.precision import EfficientInit
from lightning_efficient_init.strategies.fsdp import KeepsDeclaredDtypes, gathering, is_wrapped, making_mesh, wrap
from lightning_efficient_init.strategies.sharded import ShardsModules, refuse_quantized, sharded_init_context


class _Precision(KeepsDeclaredDtypes, FSDPPrecision):
    """See `KeepsDeclaredDtypes`."""


class EfficientFSDPStrategy(ShardsModules, StreamsCheckpoints, FSDPStrategy):
    """Parameters sharded by ``FullyShardedDataParallel``, as ``Fabric(strategy="efficient_init_fsdp")``, also on a CPU.

    Construction inside ``fabric.init_module()`` is only recorded. ``fabric.setup`` gives FSDP one unit after the other,
    with the values that one device would have (those of rank 0's seed). Checkpoints of any format may be loaded before
    or after; each rank reads the bytes of its part. All ranks take part, and fail together.

    It takes the arguments of Lightning's ``FSDPStrategy``. By default the units are the repeated blocks and the rest.
    """

    @property
    def precision(self) -> FSDPPrecision:
        """The plugin; `EfficientInit` in the form that FSDP needs."""
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        if isinstance(precision, EfficientInit):
            refuse_quantized(precision.quantize)
            precision = _Precision(precision.precision, lambda: self.root_device.type)
        FSDPStrategy.precision.fset(self, precision)  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        """See Lightning's ``FSDPStrategy``; a mesh may be of CPUs as well."""
        with making_mesh(self._fsdp_kwargs, lambda: self.root_device.type):
            super().setup_environment()

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Record the construction of modules, in the precision; checkpoints are read once they are sharded."""
        context = sharded_init_context(self.root_device, empty=bool(empty_init))
        with self.precision.module_init_context(), self.module_sharded_context(), context:
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
        options = {
            "cpu_offload": self.cpu_offload,
            "mixed_precision": self.mixed_precision_config,
            "sharding_strategy": self.sharding_strategy,
        }
        wrapped = wrap(module, self.root_device, {**options, **self._fsdp_kwargs})
        _setup_activation_checkpointing(wrapped, self._activation_checkpointing_kwargs)
        return wrapped

    def _read_optimizer(self, tree: Any, optimizer: Optimizer, state: Mapping[str, Any], path: str) -> dict[str, Any]:
        return self.read_optimizer(tree, optimizer, state, path)

    def _is_streamed(self, path: _PATH) -> bool:
        return is_streamable(path)
