"""What Fabric's and the Trainer's FSDP2 strategies share: how a model is sharded by default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from torch.nn import Module, ModuleDict, ModuleList, Sequential

from lightning_efficient_init.sharding import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class SizesMesh:
    """A strategy that shards over all ranks, unless it was told how many there are in each direction."""

    _data_parallel_size: Literal["auto"] | int
    _tensor_parallel_size: Literal["auto"] | int
    num_nodes: int
    num_processes: int

    def setup_environment(self) -> None:
        """Start the processes' communication, and make the mesh of devices."""
        if self._tensor_parallel_size != "auto" and self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes // self._tensor_parallel_size
        super().setup_environment()  # type: ignore[misc]


def shard_blocks(module: Module, mesh: DeviceMesh) -> Module:
    """Apply ``fully_shard`` to each repeated block of a model, and to the rest as a whole."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 (slow to import, for those who use it)

    data_parallel = mesh["data_parallel"]
    for block in repeated_blocks(module):
        fully_shard(block, mesh=data_parallel)
    fully_shard(module, mesh=data_parallel)
    return module


def repeated_blocks(module: Module) -> Iterator[Module]:
    """The outermost modules of which a container holds several of one class, with parameters."""
    waiting = [module]
    while waiting:
        parent = waiting.pop()
        children = list(dict.fromkeys(parent.children()))
        if isinstance(parent, ModuleList | ModuleDict | Sequential) and _is_repetition(children):
            yield from children
        else:
            waiting += reversed(children)


def is_parallelized(module: Module) -> bool:
    """Whether somebody has sharded the module, or a part of it, already."""
    return any(hasattr(child, "_get_fsdp_state") for child in module.modules()) or any(
        is_dtensor(param) for param in module.parameters()
    )


def check_parallelized(module: Any) -> Module:
    """Refuse what is no module any more, or is one that the first FSDP has wrapped."""
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415 (slow to import)

    if not isinstance(module, Module):
        raise TypeError(f"parallelize_fn must return a torch.nn.Module, found {type(module).__name__}.")
    if any(isinstance(child, FullyShardedDataParallel) for child in module.modules()):
        raise TypeError(
            "Found a module wrapped by torch.distributed.fsdp.FullyShardedDataParallel: this strategy works with "
            "torch.distributed.fsdp.fully_shard. Use that, or strategy='efficient_init_fsdp'."
        )
    return module


def _is_repetition(children: list[Module]) -> bool:
    return (
        len(children) > 1
        and len({type(child) for child in children}) == 1
        and all(next(child.children(), None) is not None for child in children)
        and all(next(child.parameters(), None) is not None for child in children)
    )
