"""The first FSDP: which range of a flat parameter each original parameter has on this rank.

With ``use_orig_params=True`` the original parameters stay objects of the module: flat views into this rank's shard, or
empty. Without, only flat parameters are left, and a *stand-in* takes the place that each original one had. Either is
marked with where it belongs; what that is in memory is looked up when somebody asks.

The attributes of flat parameters are private to torch and have had these names from 2.6 to 2.13.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.nn import Module

from lightning_efficient_init.sharding.part import Stretch

FLAT_NAME = "_flat_param"
MARK = "_efficient_init_flat"

_stand_ins: weakref.WeakKeyDictionary[Module, dict[str, torch.Tensor]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where an original parameter is: which one of which flat parameter; and the ranks with the same shard."""

    handle: weakref.ref[Any]
    index: int
    copies: distributed.ProcessGroup | None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy or a pickle of the parameter is no part of it


def mark_parts(module: Module) -> None:
    """Note, for every parameter below ``module`` that FSDP has flattened, where it is."""
    for handle, copies in _handles(module):
        flat = handle.flat_param
        index_of = {(info.module, info.param_name): index for index, info in enumerate(flat._param_infos)}
        shared = {
            (info.module, info.param_name): index_of[info.prim_module, info.prim_param_name]
            for info in flat._shared_param_infos
        }
        stands: dict[int, torch.Tensor] = {}
        for (owner, name), index in (*index_of.items(), *shared.items()):
            param = owner._parameters.get(name)
            if param is None:  # a stand-in, the same one for all names of a tied parameter
                known = _stand_ins.setdefault(owner, {})
                made = stands.setdefault(index, known.get(name, torch.empty(0, dtype=flat.dtype, device=flat.device)))
                param = known[name] = made
            param.__dict__[MARK] = _Place(weakref.ref(handle), index, copies)


def stand_ins(module: Module) -> dict[str, torch.Tensor]:
    """What stands for the parameters that ``module`` itself has lost to flat ones, by name."""
    return _stand_ins.get(module, {})


def is_flat(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is one of FSDP's own, made of several parameters."""
    return bool(getattr(tensor, "_is_flat_param", False))


def is_flattened(tensor: torch.Tensor) -> bool:
    """Whether `mark_parts` has seen ``tensor``."""
    return tensor.__dict__.get(MARK) is not None


def repeated_flat(tensor: torch.Tensor) -> distributed.ProcessGroup | None:
    """The ranks with the same part of a parameter that FSDP has flattened, if it shards in the hybrid way."""
    place: _Place = tensor.__dict__[MARK]
    return place.copies


def stretch_of(tensor: torch.Tensor) -> Stretch:
    """What this rank holds of a parameter that FSDP has flattened."""
    place: _Place = tensor.__dict__[MARK]
    handle = place.handle()
    assert handle is not None, "the model that FSDP wrapped is gone"
    flat = handle.flat_param
    shard = getattr(flat, "_local_shard", flat).detach()  # before its first use FSDP has it in the parameter alone
    info = flat._shard_param_infos[place.index]
    shape = tuple(flat._shapes[place.index])
    is_whole = not handle.uses_sharded_strategy or handle.world_size == 1
    if not info.in_shard:
        return Stretch(shape, 0, shard[:0], is_whole)
    memory = shard[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]
    return Stretch(shape, info.intra_param_start_idx, memory, is_whole)


def reshard_flat(modules: Iterable[Module]) -> None:
    """Free whole flat parameters that a forward without a backward has left to ``modules``: of the root, if not of all.

    As long as they are there FSDP gathers none anew, and does not see what has been loaded into shards.
    """
    tensors = [tensor for module in modules for tensor in (*module._parameters.values(), *stand_ins(module).values())]
    places: list[_Place] = [tensor.__dict__[MARK] for tensor in tensors if tensor is not None and is_flattened(tensor)]
    handles: set[Any] = {place.handle() for place in places} - {None}
    for handle in handles:
        was_used = hasattr(handle.flat_param, "_full_param_padded")
        if was_used and handle.uses_sharded_strategy and not handle.needs_unshard():
            handle.reshard(True)


def _handles(module: Module) -> Iterator[tuple[Any, distributed.ProcessGroup | None]]:
    """FSDP's units; and, where it shards in the hybrid way, the ranks of the other groups that have the same shard."""
    if not distributed.is_initialized():  # without processes FSDP cannot have wrapped anything
        return
    for child in module.modules():
        if "_fsdp_wrapped_module" in child._modules and (handle := getattr(child, "_handle", None)) is not None:
            copies = getattr(child, "_inter_node_pg", None)
            yield handle, copies if copies is not None and copies.size() > 1 else None
