"""What an empty parameter keeps: its recipe, through copies of any kind, but not through a pickle.

`torch.nn.Parameter` copies values alone. A copy of empty memory without its recipe would be garbage that nobody can
mend, so an empty parameter answers for itself when it is copied or pickled. It does so by attributes of the object,
which go with the recipe: its class stays the one it was made with.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_efficient_init.deferred import canary
from lightning_efficient_init.deferred.active import current
from lightning_efficient_init.deferred.recipe import Recipe, Ref, living
from lightning_efficient_init.deferred.trial import is_trial, stand_in
from lightning_efficient_init.deferred.wording import empty_misuse
from lightning_efficient_init.sharding import part_of

_RECIPE = "_efficient_init_empty"


def keep(tensor: torch.Tensor, ref: Ref) -> None:
    """Let ``tensor``, which has memory that nobody has written, keep its recipe, and hand it on to copies."""
    kept = _Kept(tensor, ref)
    tensor.__dict__ |= {_RECIPE: kept, "__deepcopy__": kept.deepcopy, "__reduce_ex__": kept.reduce}


def note_copy(made: torch.Tensor, original: torch.Tensor) -> None:
    """Note that ``made`` is a deep copy of ``original``, made while that was empty; both keep their recipes."""
    made.__dict__[_RECIPE].follow(original.__dict__[_RECIPE])


def forget(tensor: torch.Tensor) -> None:
    """Drop the recipe of an allocated tensor."""
    if tensor.__dict__.pop(_RECIPE, None) is not None:
        del tensor.__dict__["__deepcopy__"], tensor.__dict__["__reduce_ex__"]


def recipe_of_empty(tensor: torch.Tensor) -> Recipe | None:
    """The recipe of a tensor that keeps one."""
    kept = tensor.__dict__.get(_RECIPE)
    return kept.ref.recipe if kept is not None else None


def window_of(tensor: torch.Tensor) -> Ref:
    """What the recipe of a tensor that keeps one has for it."""
    kept: _Kept = tensor.__dict__[_RECIPE]
    return kept.ref


def copies_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Deep copies of ``tensor``, and theirs, that were made while it was empty, live, and keep their recipe."""
    kept = tensor.__dict__.get(_RECIPE)
    if kept is None or not kept.copies:
        return []
    return [made for made in living(kept.copies) if recipe_of_empty(made) is not None]


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """What there is of an allocated tensor in the memory of this rank, in whichever form."""
    recipe = recipe_of_empty(tensor)
    if recipe is not None and recipe.form is not None:
        return recipe.form.marked(tensor)
    part = part_of(tensor)
    return tensor if part is None else part.memory


class _Kept:
    """The recipe of one tensor, and how that tensor is copied and pickled.

    Attributes:
        ref: What the recipe has for the tensor.
        copies: Deep copies of the tensor, and copies of those.
    """

    __slots__ = ("_originals", "_tensor", "copies", "ref")

    def __init__(self, tensor: torch.Tensor, ref: Ref) -> None:
        self._tensor = weakref.ref(tensor)
        self.ref = ref
        self.copies: list[weakref.ref[torch.Tensor]] = []
        self._originals: tuple[_Kept, ...] = ()

    def deepcopy(self, memo: dict[int, Any]) -> Any:
        """The ``__deepcopy__`` of the tensor: a copy with the same recipe."""
        tensor = self._living()
        if id(tensor) not in memo:
            with _unrecorded():
                made = memo[id(tensor)] = type(tensor).__deepcopy__(tensor, memo)
            keep(made, self.ref)
            note_copy(made, tensor)
        return memo[id(tensor)]

    def follow(self, original: _Kept) -> None:
        """Note that this is of a deep copy of the tensor that ``original`` is of."""
        self._originals = (original, *original._originals)
        for kept in self._originals:
            kept.copies.append(self._tensor)

    def reduce(self, protocol: Any) -> Any:
        """The ``__reduce_ex__`` of the tensor: for `copy.copy`, and for a pickle if somebody has written by now."""
        if is_trial():
            return stand_in()
        tensor = self._living()
        bare = _without_recipe(type(tensor).__reduce_ex__(tensor, protocol))
        return (_copy, (self, *bare)) if len(bare) == 2 and self._is_empty(tensor) else bare

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return self  # as part of a tensor's attributes: the copied tensor gets one of its own

    def __reduce__(self) -> Any:
        raise empty_misuse(self._living(), self.ref.recipe)

    def _living(self) -> torch.Tensor:
        tensors = living((self._tensor,))
        assert tensors, "the attributes of a tensor outlived it"
        return tensors[0]

    @staticmethod
    def _is_empty(tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            memory = memory_of(tensor).detach()
            return bool(memory.numel()) and canary.intact([memory])[0] > 0


def _copy(kept: _Kept, rebuild: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What `copy.copy` calls: the copy shares the memory, and keeps the recipe too. A pickle stops at ``kept``."""
    made = rebuild(*args)
    keep(made, kept.ref)
    return made


def _without_recipe(value: Any) -> Any:
    """What a tensor is pickled as, less what `keep` added to its attributes."""
    if isinstance(value, tuple):
        return tuple(_without_recipe(item) for item in value)
    if isinstance(value, dict) and _RECIPE in value:
        return {key: item for key, item in value.items() if key not in (_RECIPE, "__deepcopy__", "__reduce_ex__")}
    return value


@contextmanager
def _unrecorded() -> Iterator[None]:
    """A recording in whose midst the copy is made has no part in it: memory without values is no recipe."""
    recorder = current()
    if recorder is None:
        yield
        return
    with recorder.pausing(True), torch.utils._python_dispatch._disable_current_modes():
        yield
