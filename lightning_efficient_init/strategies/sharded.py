"""What Fabric's and the Trainer's sharding strategies share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from lightning_efficient_init.deferred import distribute, initialize_required, postponed_init, unrecorded_engines, watch
from lightning_efficient_init.deferred.sharded import Windows
from lightning_efficient_init.errors import QuantizationError
from lightning_efficient_init.init_context import init_context
from lightning_efficient_init.load.load import run_plan
from lightning_efficient_init.load.optimizer import read_optimizer_state
from lightning_efficient_init.load.postponed import has_waiting, take_waiting
from lightning_efficient_init.load.replicas import agreed
from lightning_efficient_init.quantize import QuantizedLayer
from lightning_efficient_init.sharding import reshard
from lightning_efficient_init.strategies.ddp import HasReplicas


class ShardsModules(HasReplicas):
    """A strategy whose modules are recorded, sharded, and only then given memory, each rank its part."""

    root_device: torch.device

    def adapt_precision(self, plugin: Any) -> Any:
        """A precision plugin in the form that this strategy can work with; it must not quantize."""
        refuse_quantized(getattr(plugin, "quantize", None))
        return plugin

    def shard(self, module: Module, engine: Callable[[Module], Module], known: Windows | None = None) -> Module:
        """Let ``engine`` shard a module; then read the checkpoints that were loaded into it before, and watch it.

        Args:
            module: The module.
            engine: Shards it, and returns it.
            known: See `distribute`.
        """
        refuse_quantized(next((m.mode for m in module.modules() if isinstance(m, QuantizedLayer)), None))
        reshard(list(module.modules()))  # one that has been evaluated is set up again
        replicas = self.replicas()
        with agreed(replicas):
            is_empty = has_waiting(module)
            sharded = distribute(module, engine, self.root_device, is_empty=is_empty, known=known)
            for plan, settings in take_waiting(sharded):
                run_plan(plan, settings, replicas=replicas)
            initialize_required(sharded)
        watch(sharded)
        return sharded

    def read_optimizer(self, tree: Any, optimizer: Optimizer, state: Mapping[str, Any], path: str) -> dict[str, Any]:
        """What ``optimizer`` can load of its saved state: of each parameter's this rank's part.

        Args:
            tree: The saved state.
            optimizer: Whose state it will be.
            state: What is being loaded, among it the model.
            path: The checkpoint, for messages.
        """
        owned = {id(param) for group in optimizer.param_groups for param in group["params"]}
        models = [value for value in state.values() if isinstance(value, Module)]
        model = next((m for m in models if any(id(p) in owned for p in m.parameters())), Module())
        replicas = self.replicas()
        return read_optimizer_state(tree, optimizer, model, self.root_device, path=path, replicas=replicas)


def adapting(stock: Any) -> Any:
    """Lightning's property for the precision plugin, which Fabric and the Trainer name differently.

    What is set goes through the strategy's ``adapt_precision`` first.
    """

    def adapt(strategy: ShardsModules, plugin: Any) -> None:
        stock.fset(strategy, strategy.adapt_precision(plugin))

    return property(stock.fget, adapt, doc="The precision plugin, in the form that this strategy can work with.")


def refuse_quantized(mode: str | None) -> None:
    """Raise if weights are, or are going to be, quantized: their parts mean nothing by themselves.

    Raises:
        QuantizationError: They are.
    """
    if mode is not None:
        raise QuantizationError(
            f'quantize="{mode}" does not go with a strategy that shards parameters: packed weights and their '
            'statistics cannot be cut. Use strategy="efficient_init" or "efficient_init_ddp", or leave quantize out.'
        )


@contextmanager
def sharded_init_context(device: torch.device, *, empty: bool) -> Iterator[None]:
    """Construct modules that are going to be sharded: on paper, for ``device``; checkpoints wait for them."""
    with device, init_context(empty=False), postponed_init(is_optional=empty), unrecorded_engines():
        yield
