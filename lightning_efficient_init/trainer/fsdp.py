"""The FSDP strategy for the Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.precision.fsdp import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch.nn import Module
from torch.optim import Optimizer

from lightning_efficient_init.strategies.fsdp import (
    KeepsDeclaredDtypes,
    WrapsModules,
    gathering,
    is_wrapped,
    keep_root,
    making_mesh,
    root_of,
)
from lightning_efficient_init.strategies.sharded import adapting
from lightning_efficient_init.trainer.sharded import LoadsParts


class _Precision(KeepsDeclaredDtypes, FSDPPrecision):
    """See `KeepsDeclaredDtypes`."""


class EfficientFSDPStrategy(WrapsModules, LoadsParts, FSDPStrategy):
    """Parameters sharded by ``FullyShardedDataParallel``, as ``Trainer(strategy="efficient_init_fsdp")``.

    Construction inside ``trainer.init_module()``, which works before there are processes, and in ``configure_model`` is
    only recorded. When fitting starts FSDP gets one unit after the other, with the values that one device would have
    (those of rank 0's seed). Checkpoints of any format may be loaded before, or as ``ckpt_path``; each rank reads the
    bytes of its part, of the weights and of the optimizers' states. All ranks fail together. It works on a CPU, too.

    It takes the arguments of Lightning's ``FSDPStrategy``. By default the units are the repeated blocks and the rest.
    """

    strategy_name = "efficient_init_fsdp"

    precision_plugin = adapting(FSDPStrategy.precision_plugin)
    precision_class = _Precision

    def setup_environment(self) -> None:
        """See Lightning's ``FSDPStrategy``; a mesh may be of CPUs as well."""
        with making_mesh(self.kwargs, lambda: self.root_device.type):
            super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """See Lightning's ``FSDPStrategy``."""
        with gathering():
            return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """See Lightning's ``FSDPStrategy``."""
        with gathering():
            return super().optimizer_state(optimizer)

    def _setup_model(self, model: Module) -> Module:
        """Wrap the module, once: it keeps its parameters when it is tested after it was trained, by any Trainer."""
        root = root_of(model)
        if root is None:
            root = self.shard(model, self._wrap)
            keep_root(root)
        return root

    def _wrap(self, module: Module) -> Module:
        if is_wrapped(module):
            return FSDPStrategy._setup_model(self, module)
        return self.wrap(module, self.kwargs)
