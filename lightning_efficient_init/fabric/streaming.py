"""What the strategies for Fabric share: building in place, and checkpoints that stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.strategies import Strategy
from lightning.fabric.strategies.strategy import _validate_keys_for_strict_loading
from lightning.fabric.utilities.types import _PATH, _Stateful
from torch.nn import Module
from torch.optim import Optimizer

from lightning_efficient_init.checkpoint import CheckpointTree, Seal, index_tree
from lightning_efficient_init.deferred import watch
from lightning_efficient_init.garbage import collections_paused
from lightning_efficient_init.init_context import init_context
from lightning_efficient_init.lightning_checkpoint import is_streamable
from lightning_efficient_init.load.load import run_plan
from lightning_efficient_init.load.pipeline import Settings
from lightning_efficient_init.load.plan import plan_part
from lightning_efficient_init.load.replicas import Replicas, agreed
from lightning_efficient_init.load.tree import ReadWhenUsed, read_tree


class StreamsCheckpoints(Strategy):
    """A strategy whose ``fabric.load_raw`` and ``fabric.load`` read every format that ``load_checkpoint`` does.

    What is not asked for, an optimizer's state say, comes back in a dict that reads it when somebody takes it out. To
    be mixed into one of Lightning's strategies, before it.
    """

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Construct modules on the device, in the precision, empty if asked for; checkpoints stream into them."""
        with super().module_init_context(empty_init=empty_init), init_context(empty=bool(empty_init)):
            yield

    def setup_module(self, module: Module) -> Module:
        """Watch for parameters that nobody has written by the time the module is first used."""
        watch(module)
        return super().setup_module(module)

    @collections_paused()
    def load_checkpoint(
        self,
        path: _PATH,
        state: Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Restore ``state`` in place from a checkpoint.

        Args:
            path: A local file or folder in any format; a URL is left to Lightning.
            state: A module or an optimizer (the file holds its bare state), or a dict of objects to restore. ``None``
                returns the whole checkpoint, read.
            strict: Whether a module's names must match exactly, and every key of ``state`` must be there.
            weights_only: Whether the pickle may only hold tensors and plain containers (the default). ``False`` runs
                whatever code the file brings along.

        Returns:
            What was not asked for, as a dict that reads what is under a key when it is taken out.
        """
        if not self._is_streamed(path):
            kwargs = {} if weights_only is None else {"weights_only": weights_only}
            return super().load_checkpoint(path, state, strict, **kwargs)
        replicas = self.replicas()
        with agreed(replicas):
            found = index_tree(path, weights_only=weights_only is not False)
            if isinstance(state, Module):
                _load_modules([(state, found, None)], strict, replicas)
                return {}
            if isinstance(state, Optimizer):
                state.load_state_dict(read_tree(found.tree, self.root_device, replicas=replicas))
                return {}
            if not state:
                return read_tree(found.tree, torch.device("cpu"), replicas=replicas)  # type: ignore[no-any-return]
            return self._load_state(state, found, strict, replicas)

    def save_checkpoint(self, path: _PATH, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """See Lightning's strategy; what nobody has written is initialized before it is saved."""
        for value in state.values():
            if isinstance(value, Module):
                watch(value)
        super().save_checkpoint(path, state, *args, **kwargs)

    def _is_streamed(self, path: _PATH) -> bool:
        """Whether the strategy reads the checkpoint, and not a plugin of the user's or Lightning."""
        return is_streamable(path) and type(self.checkpoint_io) is TorchCheckpointIO

    def replicas(self) -> Replicas | None:
        """The other ranks, where all of them have the same model and load it together."""
        return None

    def _load_state(
        self, state: dict[str, Any], found: CheckpointTree, strict: bool, replicas: Replicas | None
    ) -> dict[str, Any]:
        tree: Mapping[str, Any] = found.tree
        _validate_keys_for_strict_loading(state.keys(), tree.keys(), strict=strict)
        asked = {name: obj for name, obj in state.items() if name in tree}
        modules = [(obj, found, name) for name, obj in asked.items() if isinstance(obj, Module)]
        _load_modules(modules, strict, replicas)
        for name, obj in asked.items():
            if isinstance(obj, Module):
                continue
            device = self.root_device if isinstance(obj, _Stateful) else torch.device("cpu")
            if isinstance(obj, Optimizer):
                value = self._read_optimizer(tree[name], obj, state, found.path)
            else:
                value = read_tree(tree[name], device, replicas=replicas)
            if isinstance(obj, _Stateful):
                obj.load_state_dict(value)
            else:
                state[name] = value
        return ReadWhenUsed({name: value for name, value in tree.items() if name not in asked}, Seal(found.files))

    def _read_optimizer(self, tree: Any, optimizer: Optimizer, state: Mapping[str, Any], path: str) -> dict[str, Any]:
        """What ``optimizer`` can load of its saved state; ``state`` has the model, where that is known."""
        return read_tree(tree, self.root_device, replicas=self.replicas())  # type: ignore[no-any-return]


def _load_modules(
    wanted: Sequence[tuple[Module, CheckpointTree, str | None]], strict: bool, replicas: Replicas | None
) -> None:
    """Plan all modules first: nothing changes unless everything fits."""
    plans = [plan_part(module, found, key, strict=strict) for module, found, key in wanted]
    for plan in plans:
        run_plan(plan, Settings(), replicas=replicas)
