"""Deferred parameters that a sharding engine takes apart: what each rank keeps of them gets the values of the whole.

Engines put new objects in the place of a module's parameters. What stays is the module and the parameter's name there,
so `windows` notes the recipes under those before the engine comes. Afterwards `evaluate_each` runs one recipe after the
other on scratch memory and hands the whole tensor over, for the caller to keep a part of it. Recipes do not depend on
each other's memory, so at no time is there more than one parameter's worth of it (and what that one is made from).

That all ranks keep parts of one and the same tensor is `agree`'s work: rank 0 says where its generators stood, and what
numbers from outside (NumPy, ``random``) went into its recipes.
"""

from __future__ import annotations

import ctypes
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import distributed
from torch.nn import Module

from lightning_efficient_init.deferred import parameter
from lightning_efficient_init.deferred.arguments import alike, map_tensors
from lightning_efficient_init.deferred.engines import window_of
from lightning_efficient_init.deferred.recipe import Op, Recipe, Ref, operations_for
from lightning_efficient_init.deferred.replay import Replay
from lightning_efficient_init.deferred.streams import State, Stream
from lightning_efficient_init.errors import DeferredInitError
from lightning_efficient_init.rendezvous import exchange, is_alone

Windows: TypeAlias = dict[tuple[Module, str], Ref]


def windows(module: Module) -> Windows:
    """The recipe of each deferred parameter and buffer of ``module``, by the submodule and the name it has there."""
    found: Windows = {}
    with torch._C.DisableTorchFunction():
        for child in module.modules():
            for name, tensor in (*child._parameters.items(), *child._buffers.items()):
                window = window_of(tensor) if tensor is not None else None
                if window is not None:
                    found[child, name] = window
    return found


def release(module: Module) -> None:
    """Let engines handle the deferred parameters of ``module`` as the plain meta tensors that they know."""
    for tensor in (*module.parameters(), *module.buffers()):
        parameter.unguard(tensor)


def evaluate_each(
    wanted: Iterable[tuple[Ref, Callable[[torch.Tensor], None]]], device: torch.device | None = None
) -> None:
    """Run recipes one after the other, and hand over what each window shows.

    Args:
        wanted: Windows, each with a function that is given the whole tensor on scratch memory, in the window's shape
            and dtype, and copies what it wants to keep. Each recipe runs once, however many windows it has.
        device: Where to run what was recorded for a default device; the recorded device unless given.
    """
    takers: dict[Recipe, list[tuple[Ref, Callable[[torch.Tensor], None]]]] = {}
    for ref, take in wanted:
        takers.setdefault(ref.recipe, []).append((ref, take))

    def deliver(recipe: Recipe, storage: torch.UntypedStorage) -> None:
        for ref, take in takers[recipe]:
            take(ref.on(storage))

    with parameter.undisturbed(), Replay(device) as replay:
        for recipe in sorted(takers, key=_first_order):
            replay.run(operations_for([recipe]), [recipe], deliver)


def _first_order(recipe: Recipe) -> int:
    """Where in the recording it starts: in that order generators only go forward."""
    return next((op.order for op in operations_for([recipe])), -1)


def agree(refs: Iterable[Ref], device: torch.device) -> None:
    """Let the recipes of all ranks give what rank 0's give, whatever the seeds of the others. All ranks come here.

    Args:
        refs: The same windows in the same order on all ranks.
        device: This rank's device, which stands for rank 0's.

    Raises:
        DeferredInitError: The ranks have recorded different models.
    """
    if is_alone():
        return
    with parameter.undisturbed():
        recipes = dict.fromkeys(ref.recipe for ref in refs)
        ops = operations_for(recipes)
        _agree_on_numbers(ops, recipes)
        _agree_on_streams(ops, device)


def _agree_on_numbers(ops: list[Op], recipes: Iterable[Recipe]) -> None:
    """Compare what the operations are, and their numbers and constants; rank 0's count."""
    prints = [zlib.crc32(pickle.dumps(list(map(_content, _leaves(op))))) for op in ops]
    found = exchange((_digest(_structure(ops, recipes)), _digest(prints)))
    if len({structure for structure, _ in found}) > 1:
        counts = [rank for rank, (structure, _) in enumerate(found) if structure != found[0][0]]
        raise DeferredInitError(
            f"The ranks {counts} have recorded another construction than rank 0 (here: {len(ops)} operations). Build "
            "the same model on every rank, in the same order; its random numbers are rank 0's in any case."
        )
    if len({content for _, content in found}) > 1:
        theirs = from_first([list(_leaves(op)) for op in ops])
        for op, leaves in zip(ops, theirs, strict=True):
            _replace_leaves(op, leaves)


def _structure(ops: list[Op], recipes: Iterable[Recipe]) -> Any:
    """What each operation is, which of the recipes it writes, and what has been drawn before it."""
    numbers = {recipe: number for number, recipe in enumerate(recipes)}
    steps = [(_name_of(op.func), [numbers.get(recipe) for recipe in op.writes]) for op in ops]
    streams = list(_streams(ops))
    order = {id(stream): number for number, stream in enumerate(streams)}
    draws = [*(op.draw for op in ops), *(stream.parent or stream.before for stream in streams)]
    places = [None if draw is None else (order[id(draw.stream)], draw.index) for draw in draws]
    ends = [0 for _ in streams]
    for number, index in filter(None, places):
        ends[number] = max(ends[number], index)
    return steps, places, [_drawn(op) for stream, end in zip(streams, ends, strict=True) for op in stream.ops[:end]]


def _drawn(op: Op) -> Any:
    """How much an operation draws, as far as that is known without running it."""
    return _name_of(op.func), [(ref.size, ref.dtype) for ref in (*op.outs, *op.args) if isinstance(ref, Ref)]


def _agree_on_streams(ops: list[Op], device: torch.device) -> None:
    streams = list(_streams(ops))
    elsewhere = [stream.elsewhere.get(device) for stream in streams]
    theirs = from_first(list(zip(map(_known_states, streams), elsewhere, strict=True)))
    if distributed.get_rank() == 0:
        return
    for stream, (states, there) in zip(streams, theirs, strict=True):
        stream._twins.clear()
        stream.states = states
        stream.elsewhere = {} if there is None else {device: there}


def _known_states(stream: Stream) -> dict[int, State]:
    """Where the generator stood: all that is known if states are small, else where the stream starts."""
    known = sorted(stream.states.items())
    return dict(known[:1] if stream.generator.device.type == "cpu" else known)


def _streams(ops: Iterable[Op]) -> Iterator[Stream]:
    """The streams that the operations draw from, and those that they go on from, each once."""
    seen: set[int] = set()
    for op in ops:
        stream = op.draw.stream if op.draw is not None else None
        while stream is not None and id(stream) not in seen:
            seen.add(id(stream))
            yield stream
            origin = stream.parent or stream.before
            stream = origin.stream if origin is not None else None


def from_first(value: Any) -> Any:
    """What rank 0 has; anything that can be pickled. All ranks come here."""
    sent = pickle.dumps(value) if distributed.get_rank() == 0 else b""  # if this fails, the others still listen
    exchange(None)
    box = [sent]
    distributed.broadcast_object_list(box, src=0)
    return pickle.loads(box[0])


def _name_of(func: Any) -> str:
    """The same in every process: what ``str`` says of a Python function has an address in it."""
    return f"{func.__module__}.{func.__qualname__}" if isinstance(func, FunctionType) else str(func)


def _digest(value: Any) -> int:
    return zlib.crc32(repr(value).encode())  # a pickle would tell equal strings from identical ones


def _leaves(op: Op) -> Iterator[Any]:
    """The arguments that are numbers, texts and tensors from outside."""

    def visit(value: Any) -> Iterator[Any]:
        if isinstance(value, list | tuple):
            for item in value:
                yield from visit(item)
        elif _is_leaf(value):
            yield value

    yield from visit((*op.args, *op.kwargs.values()))


def _is_leaf(value: Any) -> bool:
    return isinstance(value, bool | int | float | complex | str | torch.Tensor)


def _content(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    flat = leaf.detach().cpu().contiguous()
    return str(leaf.dtype), tuple(leaf.shape), zlib.crc32(ctypes.string_at(flat.data_ptr(), flat.nbytes))


def _replace_leaves(op: Op, leaves: list[Any]) -> None:
    fresh = iter(leaves)

    def visit(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return alike(value, [visit(item) for item in value])
        if not _is_leaf(value):
            return value
        leaf = next(fresh)
        return map_tensors(lambda tensor: tensor.to(value.device), leaf) if isinstance(leaf, torch.Tensor) else leaf

    op.args = tuple(visit(arg) for arg in op.args)
    op.kwargs = {name: visit(arg) for name, arg in op.kwargs.items()}
