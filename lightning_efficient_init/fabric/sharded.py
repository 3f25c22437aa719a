"""What the sharding strategies for Fabric share: construction on paper, and optimizers that are read in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.types import _PATH
from torch.optim import Optimizer

from lightning_efficient_init.fabric.streaming import StreamsCheckpoints
from lightning_efficient_init.lightning_checkpoint import is_streamable
from lightning_efficient_init.strategies.sharded import ShardsModules, sharded_init_context


class RecordsModules(ShardsModules, StreamsCheckpoints):
    """A strategy whose modules are recorded inside ``fabric.init_module()``, and sharded by ``fabric.setup``."""

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Record the construction of modules, in the precision; checkpoints are read once they are sharded."""
        with self.precision.module_init_context(), sharded_init_context(self.root_device, empty=bool(empty_init)):
            yield

    def _read_optimizer(self, tree: Any, optimizer: Optimizer, state: Mapping[str, Any], path: str) -> dict[str, Any]:
        return self.read_optimizer(tree, optimizer, state, path)

    def _is_streamed(self, path: _PATH) -> bool:
        return is_streamable(path)
