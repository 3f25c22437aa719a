"""The tape: how operations are written down in the recipes of the memory that they write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lightning_efficient_init.deferred.arguments import (
    CONSTANT_BYTES,
    CPU,
    alike,
    indexed,
    is_strided,
    reads_outside,
    recorded_device,
    tensors_in,
    written_by,
)
from lightning_efficient_init.deferred.operators import Traits, traits_of
from lightning_efficient_init.deferred.recipe import Op, Recipe, Ref, attach, recipe_of
from lightning_efficient_init.deferred.streams import generator_of, lock, places
from lightning_efficient_init.deferred.wording import refusal

_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)


class Tape:
    """Writes operations down.

    Attributes:
        generators: Those that were drawn from.
    """

    def __init__(self) -> None:
        self.generators: set[torch.Generator] = set()

    def new_recipe(self, tensor: torch.Tensor, device: torch.device) -> Recipe:
        """A recipe for the memory of ``tensor``."""
        storage = tensor.untyped_storage()
        recipe = Recipe(device, storage.nbytes())
        attach(storage, recipe)
        return recipe

    def draw(self, op: Op) -> None:
        """Give ``op`` its place in its generator's stream, without running it."""
        with lock:
            generator = generator_of(op)
            self.generators.add(generator)
            places.record(op, generator)

    def write_fill(self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any], recipe: Recipe) -> torch.Tensor:
        """The short way for what nearly all initializers come down to: a deferred tensor filled from numbers alone."""
        target: torch.Tensor = args[0]
        ref = Ref.to(target, recipe)
        overwrites = target.is_contiguous() and target.numel() * target.itemsize == recipe.num_bytes
        alone = (recipe,)
        op = Op(traits.func, (ref, *args[1:]), kwargs, recipe.device, () if overwrites else alone, alone)
        op.overwrites = overwrites
        self._add_fill(op, recipe, is_random=traits.is_random)
        return target

    def write_whole(self, func: Callable[..., Any], target: torch.Tensor, *rest: Any, **kwargs: Any) -> torch.Tensor:
        """A Python function that fills all of ``target``, a deferred tensor, with random values."""
        recipe = recipe_of(target)
        assert recipe is not None
        ref = Ref.to(target, recipe)
        op = Op(func, (ref, *rest), kwargs, recipe.device, writes=(recipe,), overwrites=ref.covers_recipe)
        self._add_fill(op, recipe, is_random=True)
        return target

    def _add_fill(self, op: Op, recipe: Recipe, *, is_random: bool) -> None:
        if is_random:
            self.draw(op)
        recipe.ops.append(op)
        recipe.is_loaded &= not op.overwrites
        recipe.stale = recipe.real is not None

    def write_random(self, op: Op, out: torch.Tensor) -> None:
        """A new deferred tensor with random values."""
        recipe = self.new_recipe(out, op.device)
        _fix_dtype(op, out)
        op.outs, op.writes = (Ref.to(out, recipe),), (recipe,)
        self.draw(op)
        recipe.ops.append(op)

    def write_deferred(
        self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[torch.Tensor], out: Any
    ) -> None:
        """An operation on deferred tensors, which ran on meta and returned ``out``."""
        outs = as_list(out)
        fresh = fresh_in(out)
        if not written and not fresh:
            return
        op_args, op_kwargs, reads = template(args, kwargs, copy=True)
        assert reads is not None
        op = Op(traits.func, op_args, op_kwargs, recorded_device(args, kwargs), reads, is_load=reads_outside(args))
        if traits.is_random:
            self.draw(op)
        self._add(op, written, outs, fresh)
        if traits.func in _COPIES and fresh:
            _pass_label(args[0], fresh[0])

    def write_constant(self, tensor: torch.Tensor) -> None:
        """``torch.tensor([...])``: a small one is its own recipe.

        What comes with memory of others (an array of NumPy, a file) is none: it is from outside, and may still change.
        """
        if recipe_of(tensor) is not None or not tensor.untyped_storage().resizable():
            return
        if tensor.numel() * tensor.element_size() <= CONSTANT_BYTES:
            self._write_copy(tensor, is_load=False)

    def write_outside(self, tensor: torch.Tensor) -> None:
        """What the memory that ``tensor`` shows, which came from outside, holds by now."""
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self._write_copy(memory, is_load=True)

    def _write_copy(self, tensor: torch.Tensor, *, is_load: bool) -> None:
        op = Op(_copy_of, (tensor.detach().clone(),), {}, tensor.device, is_load=is_load)
        self._add(op, [], [tensor], [tensor])

    def run(self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run for real, and write it down as long as all it depends on is written down."""
        return self.run_whole(traits.func, args, kwargs, lambda: traits.func(*args, **kwargs))

    def run_whole(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[[], Any]
    ) -> Any:
        """Run ``func`` by ``call``, and write it down as one operation, an operator or a Python function."""
        op_args, op_kwargs, reads = template(args, kwargs)
        out = call()
        self._write_real(Op(func, op_args, op_kwargs, CPU), reads, args, kwargs, out)
        return out

    def run_constant(self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The short way for a factory of a new tensor from numbers alone, such as ``zeros``."""
        out = traits.func(*args, **kwargs)
        if not is_strided(out):
            return out
        recipe = self.new_recipe(out, out.device)
        op = Op(traits.func, args, kwargs, out.device, (), (recipe,), (Ref.to(out, recipe),), overwrites=True)
        _fix_dtype(op, out)
        recipe.ops.append(op)
        return out

    def run_random(
        self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device, *, is_kept: bool
    ) -> Any:
        """Run a random operation on real memory, with the numbers that are its due."""
        op_args, op_kwargs, reads = template(args, kwargs, copy=True)
        op = Op(traits.func, op_args, op_kwargs, device)
        generator = generator_of(op)
        with lock:
            self.generators.add(generator)
            out = places.run(op, generator, lambda: traits.func(*args, **kwargs))
        self._write_real(op, reads if is_kept else None, args, kwargs, out)
        return out

    def make_external(self, tensor: torch.Tensor) -> None:
        """The values of a real tensor can no longer be had again."""
        recipe = recipe_of(tensor)
        if recipe is None:
            return
        if recipe.real is not None:
            raise refusal("an in-place write", "it writes outside values into memory that a deferred parameter shares")
        recipe.external = True
        recipe.ops.clear()

    def _write_real(
        self, op: Op, reads: tuple[Recipe, ...] | None, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Write down what has run for real, if it can be run again (``reads`` is known)."""
        written, outs = written_by(traits_of(op.func), args, kwargs), as_list(out)
        if reads is None:
            for tensor in written:
                self.make_external(tensor)
            return
        inputs = {t.untyped_storage()._cdata for t in tensors_in(args, kwargs) if is_strided(t)}
        fresh = [t for t in outs if is_strided(t) and t.untyped_storage()._cdata not in inputs]
        if fresh and not inputs:
            _fix_dtype(op, fresh[0])
        if written or fresh:
            op.reads, op.device = reads, next((t.device for t in (*fresh, *written)), CPU)
            op.is_load = reads_outside(args)
            self._add(op, written, outs, fresh)

    def _add(self, op: Op, written: list[torch.Tensor], outs: list[Any], fresh: list[torch.Tensor]) -> None:
        """Add ``op`` to the recipes of what it wrote and made."""
        targets = [recipe for t in written if (recipe := recipe_of(t)) is not None]
        refs = [self._ref_to_fresh(out, op) if any(out is t for t in fresh) else None for out in outs]
        op.outs = tuple(refs)
        op.writes = tuple(dict.fromkeys((*targets, *(ref.recipe for ref in refs if ref is not None))))
        op.overwrites = (bool(fresh) and not targets) or _overwrites(op)  # batch norm makes some, and updates others
        if op.overwrites and written:
            op.reads = tuple(recipe for recipe in op.reads if recipe is not op.writes[0])
        for tensor in written:
            if (recipe := recipe_of(tensor)) is not None:
                recipe.num_bytes = max(recipe.num_bytes, tensor.untyped_storage().nbytes())
        is_load = op.is_load or any(recipe.is_loaded for recipe in op.reads)
        for recipe in op.writes:
            recipe.ops.append(op)
            recipe.is_loaded = is_load or (recipe.is_loaded and not op.overwrites)
            if recipe.real is not None and written and written[0].is_meta:
                recipe.stale = True

    def _ref_to_fresh(self, out: torch.Tensor, op: Op) -> Ref:
        return Ref.to(out, recipe_of(out) or self.new_recipe(out, indexed(op.device)))


def template(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, copy: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Recipe, ...] | None]:
    """Arguments with references in the place of tensors, and what they read; None if that is not reproducible."""
    reads: dict[Recipe, None] = {}
    sound = True

    def refer(arg: Any) -> Any:
        nonlocal sound
        if isinstance(arg, torch.Tensor):
            recipe = recipe_of(arg)
            if recipe is not None and not recipe.external:
                reads[recipe] = None
                return Ref.to(arg, recipe)
            if copy or (is_strided(arg) and arg.numel() * arg.element_size() <= CONSTANT_BYTES):
                with _disable_current_modes():
                    return arg.detach().clone()
            sound = False
            return arg
        if isinstance(arg, list | tuple):
            return alike(arg, [refer(item) for item in arg])
        return arg

    op_args = tuple(refer(arg) for arg in args)
    op_kwargs = {name: refer(arg) for name, arg in kwargs.items()}
    return op_args, op_kwargs, tuple(reads) if sound else None


def _fix_dtype(op: Op, out: torch.Tensor) -> None:
    """Write down the dtype that a factory took from the default, which may be another one at replay."""
    if op.kwargs.get("dtype") is None and traits_of(op.func).takes_dtype:
        op.kwargs = {**op.kwargs, "dtype": out.dtype}


def as_list(value: Any) -> list[Any]:
    """What an operation returned, one thing or several."""
    return list(value) if isinstance(value, tuple | list) else [value]


def fresh_in(out: Any) -> list[torch.Tensor]:
    """What an operation on meta has returned in memory of its own."""
    return [t for t in as_list(out) if is_strided(t) and recipe_of(t) is None]


def _overwrites(op: Op) -> bool:
    target = op.args[0] if op.args else None
    if not traits_of(op.func).is_fill or not isinstance(target, Ref) or not target.covers_recipe:
        return False
    return not any(isinstance(arg, Ref) and arg.recipe is target.recipe for arg in op.args[1:])


def _pass_label(source: torch.Tensor, made: torch.Tensor) -> None:
    """A copy of a parameter is most likely one: of a module that is copied or cast."""
    original, copied = recipe_of(source), recipe_of(made)
    if original is not None and copied is not None:
        copied.label = original.label


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()
