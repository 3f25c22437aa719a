"""The state of an optimizer, read for parameters of which each rank holds a part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from lightning_efficient_init.checkpoint import Entry, LazyTensor
from lightning_efficient_init.errors import StateDictMismatchError, UnsupportedCheckpointError, shorten
from lightning_efficient_init.load.keys import strip_wrappers
from lightning_efficient_init.load.load import stream
from lightning_efficient_init.load.pipeline import Settings
from lightning_efficient_init.load.replicas import Replicas
from lightning_efficient_init.load.report import Meter
from lightning_efficient_init.load.tree import read_tree
from lightning_efficient_init.sharding import is_flat, is_flattened, like_part, part_of
from lightning_efficient_init.sinks import Sink, sink_for_part


@dataclass(frozen=True, slots=True, eq=False)
class _Saved:
    """What a checkpoint has of one parameter's state, and the group that the parameter was in."""

    state: Mapping[str, Any]
    group: Mapping[str, Any]


def read_optimizer_state(
    tree: Mapping[str, Any],
    optimizer: Optimizer,
    model: Module,
    device: torch.device,
    *,
    path: str,
    replicas: Replicas | None = None,
) -> dict[str, Any]:
    """Read what ``optimizer.load_state_dict`` takes; of state that is as large as its parameter, this rank's part.

    Args:
        tree: The saved state, with entries or lazy tensors, for whole parameters: known by their number, as
            ``optimizer.state_dict()`` has them, or by their name in the model, as sharded checkpoints do.
        optimizer: Of the sharded model.
        model: The sharded model.
        device: Where state goes that is not sharded.
        path: The checkpoint, for messages.
        replicas: The other ranks.

    Raises:
        StateDictMismatchError: The optimizer has other parameters than the one that was saved.
        UnsupportedCheckpointError: The optimizer knows flat parameters alone, of which nothing has been saved.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    _refuse_flat(params, path)
    saved = _match(tree, params, model, path)
    sinks: list[Sink] = []
    num_bytes = 0
    rest: dict[int, dict[str, Any]] = {}
    state: dict[int, dict[str, Any]] = {}
    for number, (param, found) in enumerate(zip(params, saved, strict=True)):
        state[number], rest[number] = {}, {}
        if param.numel() == 0 and is_flattened(param):
            continue  # FSDP's optimizers have no state where a rank has nothing of a parameter
        for key, value in found.state.items():
            entry = value.entry if isinstance(value, LazyTensor) else value
            part = part_of(param)
            if part is not None and isinstance(entry, Entry) and entry.shape == part.shape and entry.shape:
                made, memory = like_part(param, entry.dtype)
                state[number][key] = made
                here = replace(part, memory=memory)  # type: ignore[type-var]
                sinks.append(sink_for_part(f"{key} of parameter {number}", here, entry))
                num_bytes += memory.nbytes
            else:
                rest[number][key] = value
    with Meter(num_bytes, {device}, progress=None) as meter:
        stream(sinks, Settings(), meter)
    for number, values in read_tree(rest, device, replicas=replicas).items():
        state[number] |= values
    return {"state": {n: s for n, s in state.items() if s}, "param_groups": list(_groups(optimizer, saved, device))}


def _refuse_flat(params: list[torch.Tensor], path: str) -> None:
    flat = sum(is_flat(param) for param in params)
    if flat:
        raise UnsupportedCheckpointError(
            f"{path}: expected an optimizer of the model's own parameters, found one of {flat} flat parameters, into "
            "which FSDP has put them: a checkpoint knows states by the former. Choose the strategy with "
            "use_orig_params=True, its default, or load the model alone."
        )


def _match(tree: Mapping[str, Any], params: list[torch.Tensor], model: Module, path: str) -> list[_Saved]:
    """For each parameter of the optimizer, what was saved of it."""
    state = tree.get("state", {})  # distributed checkpoints have no empty dicts
    keys = [(key, group) for group in tree["param_groups"] for key in group["params"]]
    if all(isinstance(key, int) for key, _ in keys):
        if len(keys) != len(params):
            raise StateDictMismatchError(
                f"{path}: the optimizer has {len(params)} parameters, the saved one {len(keys)}. Make the optimizer of "
                "the same parameters in the same order, or load the model alone."
            )
        return [_Saved(state.get(key, {}), group) for key, group in keys]
    by_name = {strip_wrappers(str(key)): _Saved(state.get(key, {}), group) for key, group in keys}
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(strip_wrappers(name))
    found = [next((by_name[name] for name in names.get(id(p), []) if name in by_name), None) for p in params]
    if missing := [names.get(id(p), ["?"])[0] for p, hit in zip(params, found, strict=True) if hit is None]:
        raise StateDictMismatchError(
            f"{path}: {len(missing)} parameters of the optimizer are not in the saved one: {shorten(missing)}. Make "
            "the optimizer of the same parameters, or load the model alone.",
            missing=tuple(missing),
        )
    return [hit for hit in found if hit is not None]


def _groups(optimizer: Optimizer, saved: list[_Saved], device: torch.device) -> Iterator[dict[str, Any]]:
    """The optimizer's groups, with the settings that were saved."""
    start = 0
    for group in optimizer.param_groups:
        count = len(group["params"])
        settings = {**saved[start].group} if count else {k: v for k, v in group.items() if k != "params"}
        yield {**read_tree(settings, torch.device("cpu")), "params": list(range(start, start + count))}
        start += count
