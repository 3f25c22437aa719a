"""Recipes: the operations that give a piece of memory its values, and how tensors find theirs.

A recipe belongs to a *storage*, not to a tensor: a parameter, its ``.data``, a view of it and a tied second name share
one storage, hence one recipe, without any alias map of ours. It hangs on the (meta) storage object itself, so it lives
exactly as long as somebody can still ask for it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_efficient_init.deferred.form import Form

_ATTRIBUTE = "_efficient_init_recipe"
_orders = itertools.count()


@dataclass(slots=True, eq=False)
class Recipe:
    """How one storage gets its values.

    Attributes:
        device: Where the memory would be, had it been allocated.
        num_bytes: How much of it.
        ops: The operations that write it, in order.
        label: What to call it in messages, such as ``weight of Linear``.
        external: Real memory whose values came from outside of the recording: not reproducible.
        real: The real storage that a parameter was made of, where that was given up for a deferred one.
        is_loaded: Its values come from outside of the recording, at least in part: a checkpoint was loaded into it.
        stale: ``real`` lacks what was written through the parameter since.
        aliases: Tensors that share the memory, where it is more than one parameter.
        companions: Tensors of the same recording that no module has registered.
        layer: The recurrent layer whose weights are to be in one piece of memory once all of them have some.
        form: How the one parameter in this memory keeps its values, where that is not as a plain tensor.
    """

    device: torch.device
    num_bytes: int
    ops: list[Op] = field(default_factory=list)
    label: str | None = None
    external: bool = False
    real: weakref.ref[torch.UntypedStorage] | None = None
    is_loaded: bool = False
    stale: bool = False
    aliases: Sequence[weakref.ref[torch.Tensor]] = ()
    companions: Sequence[weakref.ref[torch.Tensor]] = ()
    is_postponed: bool = False
    is_optional: bool = False
    claimed_by: str | None = None
    layer: weakref.ref[torch.nn.RNNBase] | None = None
    form: Form | None = None

    @property
    def original(self) -> Recipe | None:
        """The recipe of what this was made of as a deep copy, if it was."""
        first = self.ops[0] if self.ops else None
        is_copy = first is not None and first.func is torch.ops.aten.clone.default and isinstance(first.args[0], Ref)
        return first.args[0].recipe if first is not None and is_copy else None


@dataclass(slots=True, eq=False)
class Op:
    """One recorded operation.

    Attributes:
        func: An ``OpOverload``, or a Python function that is replayed whole.
        args: Its arguments, every tracked tensor replaced by a `Ref`.
        kwargs: The same for keyword arguments.
        device: Where it runs.
        reads: Recipes whose values it needs.
        writes: Recipes that it changes.
        outs: Tensors that it returns in memory of their own.
        overwrites: It replaces everything in ``writes[0]`` without reading it: what was there before is dead.
        is_load: It takes values from outside of the recording.
        draw: Where in a generator's stream its random numbers start.
        default_dtype: What ``torch.get_default_dtype()`` was: integers become that in some operations.
        order: Its place among all operations recorded in this process.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device
    reads: tuple[Recipe, ...] = ()
    writes: tuple[Recipe, ...] = ()
    outs: tuple[Ref | None, ...] = ()
    overwrites: bool = False
    is_load: bool = False
    draw: Any = None
    default_dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    order: int = field(default_factory=_orders.__next__)


@dataclass(slots=True, eq=False)  # not frozen: that takes three times as long to make, and each operation makes one
class Ref:
    """A tensor as a window on a recipe's memory: ``size`` and ``stride``, ``offset`` in elements.

    ``conj`` and ``mH`` do not compute anything: they mark a view of the same memory as one to be read conjugated, or
    (the imaginary part of such a view) negated.
    """

    recipe: Recipe
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_conj: bool = False
    is_neg: bool = False

    @staticmethod
    def to(tensor: torch.Tensor, recipe: Recipe) -> Ref:
        """The window that ``tensor`` is."""
        shape = tuple(tensor.size())  # lazy parameters have no ``shape``
        offset, is_conj = tensor.storage_offset(), tensor.is_conj()
        return Ref(recipe, tensor.dtype, shape, tensor.stride(), offset, is_conj, tensor.is_neg())  # type: ignore[arg-type]

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The same window on real memory."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        shown = empty.set_(storage, self.offset, self.size, self.stride)
        shown = torch._conj(shown) if self.is_conj else shown
        return torch._neg_view(shown) if self.is_neg else shown

    @property
    def numel(self) -> int:
        """How many elements it shows."""
        count = 1
        for length in self.size:
            count *= length
        return count

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements follow each other in C order."""
        expected = 1
        for length, step in zip(reversed(self.size), reversed(self.stride), strict=True):
            if length != 1 and step != expected:
                return False
            expected *= length
        return True

    @property
    def covers_recipe(self) -> bool:
        """Whether it shows every byte of its memory, in C order."""
        return self.is_contiguous and self.fills_recipe

    @property
    def fills_recipe(self) -> bool:
        """Whether it shows every byte of its memory, in whichever order."""
        expected = 1
        for step, length in sorted(zip(self.stride, self.size, strict=True)):
            if length != 1 and step != expected:
                return False
            expected *= length
        return self.offset == 0 and self.numel * self.dtype.itemsize == self.recipe.num_bytes


def recipe_of(tensor: torch.Tensor) -> Recipe | None:
    """The recipe of the memory that ``tensor`` shows, if it has one."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, nested, wrapper and lazy tensors have none
        return None
    return storage.__dict__.get(_ATTRIBUTE)


def living(refs: Iterable[weakref.ref[torch.Tensor]]) -> list[torch.Tensor]:
    """The tensors of ``refs`` that are still there.

    Objects of tensors that only C++ holds (bases of views) are brought back to life as torch asks for it; without that
    they lose their memory under whoever was given them (torch 2.6 with Python 3.11).
    """
    found = [tensor for ref in refs if (tensor := ref()) is not None]
    for tensor in found:
        tensor._fix_weakref()  # type: ignore[attr-defined]
    return found


def attach(storage: torch.UntypedStorage, recipe: Recipe) -> None:
    """Make ``recipe`` the one of ``storage``."""
    storage.__dict__[_ATTRIBUTE] = recipe


def detach(storage: torch.UntypedStorage) -> None:
    """Forget the recipe of ``storage``."""
    storage.__dict__.pop(_ATTRIBUTE, None)


def operations_for(recipes: Iterable[Recipe], before: float = float("inf")) -> list[Op]:
    """What has to run, in order, for the values that ``recipes`` have ``before`` an operation."""
    needed: dict[int, Op] = {}
    todo = [(recipe, before) for recipe in recipes]
    seen: set[tuple[int, int]] = set()
    while todo:
        recipe, end = todo.pop()
        for op in _live(recipe, end):
            if (op.order, id(recipe)) in seen:
                break  # from here on back another request has been
            seen.add((op.order, id(recipe)))
            if op.order not in needed:
                needed[op.order] = op
                todo += [(read, op.order) for read in op.reads]
                todo += [(written, op.order) for written in op.writes if written is not recipe]
    return [needed[order] for order in sorted(needed)]


def _live(recipe: Recipe, end: float) -> Iterator[Op]:
    """Writes to ``recipe`` before ``end``, the last one first, back to the one that replaces everything."""
    for op in reversed(recipe.ops):
        if op.order < end:
            yield op
            if op.overwrites:
                return
