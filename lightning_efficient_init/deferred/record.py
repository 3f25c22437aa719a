"""Recording construction: parameters become recipes, everything else is real.

How it works
    Two modes are active under `deferred_init`. The dispatch mode sees every operation that reaches a kernel. What
    makes memory without values (``torch.empty``) or with random values gives a *deferred* tensor: a meta tensor whose
    storage carries a `Recipe`. Operations on deferred tensors run on meta, for shapes and aliases, and are written
    down in the recipes of the storages that they write. Everything else (``arange``, ``zeros``, ``tensor`` and what is
    computed from them) runs for real at once, so ``.item()``, NumPy and control flow work as ever; it is written down
    too, since a ``Parameter`` may be made of it. ``Parameter(real)`` gives the memory up and keeps the recipe.
    When values of a deferred tensor are asked for (a branch on a random number) its recipe is run, then and there,
    on scratch memory, with exactly the numbers that eager construction would have drawn.
    The function mode is for what does not reach a kernel: ``p.device`` and ``p.is_meta`` answer as they would in
    eager construction, ``p.data = x``, ``p.numpy()``, loading of real weights, and `torch.nn.init` functions, which
    it runs itself so that no mode below (Lightning's ``_EmptyInit``) skips them.
    When the recording ends, deferred tensors that no parameter shares get their memory and values in place.

What it costs, and where exactness ends
    On the CPU the generator's place after ``uniform_`` and ``normal_`` is arithmetic. Other random operations
    (``trunc_normal_`` of torch 2.13 draws until all values fit) have to run on scratch when the recording ends, for
    the generator, and again when the parameter is materialized. On CUDA each kind of operation is measured once.
    A NumPy array given to ``torch.from_numpy`` is copied up to 1 MiB, so writing to the array later is not seen.
    A deep copy, a pickle or a sharded version of an *empty* parameter does not take its recipe along.

Decided against
    FakeTensorMode: five times the time per operation, and neither real buffers nor ``.item()``.
    Real tensors whose storage is freed: ``p.device`` is right, but a kernel that reads them crashes the process.
    Recording everything lazily: then every buffer, list and closure that holds a tensor needs an exchange at the end.
    Values of parameters by drawing at once and keeping the generator's state per parameter: construction would cost
    as much as eager construction. Positions in the stream are arithmetic instead (streams.py).
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_efficient_init.deferred import audit, parameter, recurrent
from lightning_efficient_init.deferred.recipe import Op, Recipe, Ref, attach, recipe_of
from lightning_efficient_init.deferred.replay import FILLS, evaluate
from lightning_efficient_init.deferred.streams import generator_of, lock, places
from lightning_efficient_init.errors import UnrecordableError

aten = torch.ops.aten
_local = threading.local()
_CPU = torch.device("cpu")
_NUMBERS = (int, float, bool)
_MOST_NUMBERS = 4
_META = torch.device("meta")
_CONSTANT_BYTES = 1 << 20  # a real tensor up to this size is copied into a recipe; a larger one stays what it is

_EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_permuted.default}
_RANDOM_FACTORIES = {aten.randn.default, aten.rand.default, aten.randn.generator, aten.rand.generator}
_LIKE: dict[Any, Any] = {
    aten.empty_like.default: None,
    aten.new_empty.default: None,
    aten.new_empty_strided.default: None,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    aten.full_like.default: "value",
    aten.new_full.default: "value",
    aten.rand_like.default: aten.uniform_.default,
    aten.randn_like.default: aten.normal_.default,
}
_LIFTS = {aten.lift_fresh.default, aten.lift.default}
_SET = {aten.set_.source_Tensor, aten.set_.source_Storage, aten.set_.source_Storage_storage_offset, aten.set_.default}
_SET |= {aten.set_.source_Tensor_storage_offset}
_UNDECLARED_WRITES = {aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default}
_UNDECLARED_WRITES |= {aten.batch_norm_update_stats.default, aten.batch_norm_gather_stats_with_counts.default}
_VALUES = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.allclose.default}


def current() -> Recorder | None:
    """The recorder of this thread, if one records."""
    return getattr(_local, "recorder", None)


@contextmanager
def deferred_init() -> Iterator[None]:
    """Record the construction of modules instead of running it.

    Parameters made inside are *deferred*: on the meta device, without memory, each with a recipe for its values.
    Buffers and other tensors are real. `materialize` gives parameters the values that eager construction would have
    given them, bit for bit; random numbers included, whatever is drawn in between. When the context ends the
    generators stand where eager construction would have left them.

    Contexts nest (an inner one adds to the outer one's recording), and each thread records for itself.

    Raises:
        UnrecordableError: From the operation that cannot be recorded; build that part under `eager`.

    Example:
        >>> with deferred_init():
        ...     model = torch.nn.Linear(4, 4)
        >>> is_deferred(model)
        True
        >>> materialize(model).weight.shape
        torch.Size([4, 4])
    """
    with recording():
        yield


@contextmanager
def recording() -> Iterator[Recorder]:
    """`deferred_init`, with the recorder."""
    recorder = current()
    if recorder is not None:
        with recorder.unpaused():
            yield recorder
        return
    recorder = Recorder()
    with recorder:
        yield recorder


@contextmanager
def empty_init() -> Iterator[None]:
    """`deferred_init`, after which parameters get memory, but no values: for who loads a checkpoint next.

    Their recipes stay at hand: `uninitialized_parameters` finds what nobody has written, `initialize` writes it. An
    exception leaves everything deferred; inside another recording the outer one decides.
    """
    nested = current() is not None
    with recording() as recorder:
        yield
    if not nested:
        recorder.allocate()


@contextmanager
def eager() -> Iterator[None]:
    """Run what is inside for real, parameters too, in the midst of `deferred_init`.

    The way out for what cannot be recorded, and for code that reads weights from files. Deferred tensors from outside
    stay deferred: what is done to them is still recorded. Without a recording this does nothing.
    """
    recorder = current()
    if recorder is None:
        yield
        return
    with recorder.pause():
        yield


class Recorder:
    """The recording of one thread."""

    def __init__(self) -> None:
        self.paused = False
        self.recurrent: list[weakref.ref[torch.nn.RNNBase]] = []
        self.parameters: list[weakref.ref[torch.Tensor]] = []
        self._tensors: dict[int, weakref.ref[torch.Tensor]] = {}
        self._generators: set[torch.Generator] = set()
        self._twinned: list[Recipe] = []
        self._modes = (_Dispatch(self), _Function(self))

    # -- entering and leaving

    def __enter__(self) -> Recorder:
        patches.enter()
        places.enter()
        _local.recorder = self
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        _local.recorder = None
        patches.leave()
        try:
            with parameter.undisturbed():
                if kind is None:
                    self._finish()
                else:
                    self._abandon()
        finally:
            places.leave(self._generators)
            self._tensors.clear()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let new tensors and parameters be real."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    @contextmanager
    def unpaused(self) -> Iterator[None]:
        """Record again, in a recording nested in `eager`."""
        before, self.paused = self.paused, False
        try:
            yield
        finally:
            self.paused = before

    def _finish(self) -> None:
        """Make real what has to be, and guard what stays deferred."""
        self._refresh_twins()
        shared = self._parameter_recipes()
        groups: dict[Recipe, list[torch.Tensor]] = {}
        for tensor in self._living():
            recipe = recipe_of(tensor) if tensor.is_meta else None
            if recipe is not None:
                groups.setdefault(recipe, []).append(tensor)
        lone = [r for r, tensors in groups.items() if r not in shared and not any(t.requires_grad for t in tensors)]
        for recipe, storage in evaluate(lone).items():
            parameter.give_memory(groups.pop(recipe), storage)
        for recipe, tensors in groups.items():
            if recipe not in shared or len(tensors) > 1:
                recipe.aliases = [weakref.ref(t) for t in tensors]
            for tensor in tensors:
                parameter.guard(tensor)

    def _abandon(self) -> None:
        """After an exception nothing is run; whoever kept a part of the model finds it deferred."""
        for tensor in self._living():
            if tensor.is_meta and recipe_of(tensor) is not None:
                parameter.guard(tensor)

    def _parameter_recipes(self) -> set[Recipe]:
        living = (ref() for ref in self.parameters)
        found = (recipe_of(p) for p in living if p is not None and p.is_meta)
        return {recipe for recipe in found if recipe is not None}

    def _living(self) -> list[torch.Tensor]:
        return [tensor for ref in self._tensors.values() if (tensor := ref()) is not None]

    def allocate(self) -> None:
        """Give memory to the parameters that were recorded here, are alive, and are deferred."""
        groups: dict[Recipe, list[torch.Tensor]] = {}
        with parameter.undisturbed():
            for param in {id(p): p for ref in self.parameters if (p := ref()) is not None}.values():
                recipe = recipe_of(param) if param.is_meta else None
                if recipe is not None:
                    groups[recipe] = [t for a in recipe.aliases if (t := a()) is not None] or [param]
            layers = recurrent.scattered(
                {id(layer): layer for r in self.recurrent if (layer := r()) is not None}.values()
            )
            audit.allocate(groups)
            recurrent.flatten(layers)

    # -- keeping track

    def track(self, value: Any) -> None:
        """Remember deferred tensors among ``value``, without keeping them alive."""
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                known = self._tensors.get(id(value))
                if known is None or known() is not value:
                    self._tensors[id(value)] = weakref.ref(value)
        elif isinstance(value, tuple | list):
            for item in value:
                self.track(item)

    def adopt(self, param: torch.Tensor) -> None:
        """Remember a parameter."""
        self.parameters.append(weakref.ref(param))
        self.track(param)

    def aliases(self, recipe: Recipe) -> list[torch.Tensor]:
        """Living tensors that share the memory of ``recipe``."""
        return [t for t in self._living() if t.is_meta and recipe_of(t) is recipe]

    # -- operations

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run or record one operation."""
        if func in FILLS and len(args) <= _MOST_NUMBERS and (recipe := self._filled(args)) is not None:
            return self._fill(func, args, kwargs, recipe)
        tensors = list(_tensors_in(args, kwargs))
        metas = [t for t in tensors if t.is_meta]
        if metas and any(recipe_of(t) is not None for t in metas):
            return self._deferred(func, args, kwargs, tensors)
        if metas or _asks_for_meta(kwargs):
            return func(*args, **kwargs)  # the user's own meta tensors
        if func in _SET:
            return func(*args, **kwargs)
        traits = traits_of(func)
        for tensor in tensors:
            self._refresh(tensor)
        if self.paused:
            return self._real_random(func, args, kwargs) if traits.random else func(*args, **kwargs)
        if not tensors and (func in _EMPTY or func in _RANDOM_FACTORIES) and not kwargs.get("pin_memory"):
            return self._factory(func, args, kwargs)
        if traits.random:
            return self._real_random(func, args, kwargs)
        return self._real(func, args, kwargs)

    def _factory(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """``empty``, ``randn`` and ``rand``: nothing to run yet."""
        generator = kwargs.get("generator")
        if func._overloadname == "generator":
            out = aten.empty.memory_format(args[0], **{**_without(kwargs, "generator"), "device": _META})
        else:
            out = func(*args, **{**kwargs, "device": _META, "pin_memory": False})
        device = _indexed(kwargs.get("device") or _CPU)
        if generator is not None and generator.device != device:
            return func(*args, **kwargs)  # type: ignore[no-any-return]  # raises, as in eager construction
        if not out.numel() or not (out.is_floating_point() or out.is_complex()):
            if func in _EMPTY:
                return func(*args, **kwargs)  # type: ignore[no-any-return]
            return self._real_random(func, args, kwargs)  # type: ignore[no-any-return]
        recipe = self._new_recipe(out, device)
        kwargs = {**kwargs, "device": device}
        op = Op(func, args, kwargs, device, outs=(Ref.to(out, recipe),), writes=(recipe,), overwrites=True)
        if func in _EMPTY:
            op.func, op.args, op.kwargs = aten.empty_strided.default, (), {}
        else:
            self._draw(op)
        recipe.ops.append(op)
        self.track(out)
        return out  # type: ignore[no-any-return]

    def _real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run for real, and write it down as long as all it depends on is written down."""
        if func in _LIFTS:
            return self._constant(func(*args, **kwargs))
        op_args, op_kwargs, reads = self._template(args, kwargs)
        out = func(*args, **kwargs)
        self._note(Op(func, op_args, op_kwargs, _CPU), reads, args, kwargs, out)
        return out

    def _note(
        self, op: Op, reads: tuple[Recipe, ...] | None, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Write down what has run for real, if it can be run again (``reads`` is known)."""
        written, outs = _written(op.func, args, kwargs), _list(out)
        if reads is None:
            for tensor in written:
                self._make_external(tensor)
            return
        inputs = {t.untyped_storage()._cdata for t in _tensors_in(args, kwargs)}
        fresh = [t for t in outs if _is_strided(t) and t.untyped_storage()._cdata not in inputs]
        if written or fresh:
            op.reads, op.device = reads, next((t.device for t in (*fresh, *written)), _CPU)
            op.is_load = _reads_outside(args)
            self._write_down(op, written, outs, fresh)

    def _constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """``torch.tensor(...)``: a small one is its own recipe."""
        if recipe_of(tensor) is None and tensor.numel() * tensor.element_size() <= _CONSTANT_BYTES:
            op = Op(_copy_of, (tensor.detach().clone(),), {}, tensor.device)
            self._write_down(op, [], [tensor], [tensor])
        return tensor

    def _write_down(self, op: Op, written: list[torch.Tensor], outs: list[Any], fresh: list[torch.Tensor]) -> None:
        """Add ``op`` to the recipes of what it wrote and made."""
        targets = [recipe for t in written if (recipe := recipe_of(t)) is not None]
        fresh_ids = {id(t) for t in fresh}
        refs: list[Ref | None] = []
        for out in outs:
            if id(out) not in fresh_ids:
                refs.append(None)
                continue
            recipe = recipe_of(out) or self._new_recipe(out, op.device)
            refs.append(Ref.to(out, recipe))
            targets.append(recipe)
        op.outs, op.writes = tuple(refs), tuple(dict.fromkeys(targets))
        op.overwrites = bool(fresh) or _overwrites(op)
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

    def _real_random(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a random operation on real memory, with the numbers that are its due."""
        op_args, op_kwargs, reads = self._template(args, kwargs, copy=True)
        op = Op(func, op_args, op_kwargs, _device_of(args, kwargs))
        generator = generator_of(op)
        with lock:
            self._generators.add(generator)
            out = places.run(op, generator, lambda: func(*args, **kwargs))
        self._note(op, None if self.paused else reads, args, kwargs, out)
        return out

    def _deferred(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
        """An operation on deferred tensors."""
        if func in _LIKE and _is_deferred(args[0]):
            return self._like(func, args, kwargs)
        if _asks_for_meta(kwargs):  # as accelerate's `init_empty_weights` does: no recipe is wanted
            return func(*_to_meta(args), **kwargs)
        traits = traits_of(func)
        if func in _SET:
            return self._set(func, args, kwargs)
        if func in _VALUES:
            return self._forced(func, args, kwargs)
        for tensor in tensors:
            self._refresh(tensor)
            if tensor.is_meta and tensor.numel() and recipe_of(tensor) is None:
                raise refusal(str(func), "it mixes deferred tensors with one on the meta device, which has no values")
        written = _written(func, args, kwargs)
        if any(not t.is_meta for t in written):
            return self._forced(func, args, kwargs)
        if traits.in_place:
            return self._in_place(func, args, kwargs, written)
        try:
            out = func(*_to_meta(args), **_to_meta(kwargs))
        except Exception:  # no meta kernel, or a shape that depends on values: the values decide, or it raises for real
            return self._forced(func, args, kwargs)
        return self._record(func, args, kwargs, written, out)

    def _filled(self, args: tuple[Any, ...]) -> Recipe | None:
        """The recipe of a deferred tensor that is filled from numbers alone."""
        if any(not isinstance(arg, _NUMBERS) for arg in args[1:]) or not args[0].is_meta:
            return None
        return recipe_of(args[0])

    def _fill(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], recipe: Recipe) -> torch.Tensor:
        """The short way for what nearly all initializers come down to."""
        target: torch.Tensor = args[0]
        ref = Ref.to(target, recipe)
        op = Op(func, (ref, *args[1:]), kwargs, recipe.device, writes=(recipe,))
        op.overwrites = ref.covers_recipe
        if not op.overwrites:
            op.reads = (recipe,)
        if traits_of(func).random:
            self._draw(op)
        recipe.ops.append(op)
        recipe.is_loaded &= not op.overwrites
        recipe.stale = recipe.real is not None
        return target

    def _in_place(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[torch.Tensor]
    ) -> torch.Tensor:
        if func not in FILLS:
            _check_on_meta(func, args, kwargs)
        elif func is aten.copy_.default:
            parameter.check_copy(args[0], args[1])
        return self._record(func, args, kwargs, written, args[0])  # type: ignore[no-any-return]

    def _record(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[torch.Tensor], out: Any
    ) -> Any:
        outs = _list(out)
        fresh = [t for t in outs if _is_strided(t) and recipe_of(t) is None]
        if written or fresh:
            op_args, op_kwargs, reads = self._template(args, kwargs, copy=True)
            assert reads is not None
            device = _recorded_device(args, kwargs)
            op = Op(func, op_args, op_kwargs, device, reads=reads, is_load=_reads_outside(args))
            if traits_of(func).random:
                self._draw(op)
            self._write_down(op, written, outs, fresh)
        self.track(out)
        return out

    def record_whole(self, func: Callable[..., Any], target: torch.Tensor, *rest: Any) -> torch.Tensor:
        """Record a Python function that fills all of ``target``, a deferred tensor, with random values."""
        recipe = recipe_of(target)
        assert recipe is not None
        op = Op(func, (Ref.to(target, recipe), *rest), {}, recipe.device, writes=(recipe,))
        op.overwrites = op.args[0].covers_recipe
        with parameter.undisturbed():
            self._draw(op)
        recipe.ops.append(op)
        recipe.is_loaded &= not op.overwrites
        recipe.stale = recipe.real is not None
        return target

    def _forced(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation for real on the values that deferred tensors would have."""
        if any(t.is_meta for t in _written(func, args, kwargs)):
            raise refusal(str(func), "it writes into a deferred tensor and into a real one at once")
        args, kwargs = self.values((args, kwargs))
        if traits_of(func).random:
            return self._real_random(func, args, kwargs)
        return self._real(func, args, kwargs)

    def values(self, value: Any) -> Any:
        """``value`` with real copies in the place of deferred tensors."""
        recipes = [r for t in _tensors_in((value,), {}) if t.is_meta and (r := recipe_of(t)) is not None]
        memory = evaluate(dict.fromkeys(recipes))

        def real(tensor: torch.Tensor) -> torch.Tensor:
            recipe = recipe_of(tensor) if tensor.is_meta else None
            if recipe is None:
                return tensor
            return Ref.to(tensor, recipe).on(memory[recipe]).requires_grad_(tensor.requires_grad)

        return _map_tensors(real, value)

    def _like(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """``zeros_like`` and its kin need the shape of a deferred tensor, not its values."""
        if _asks_for_meta(kwargs):
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        shape = func(*args, **{**_without(kwargs, "pin_memory"), "device": _META})
        device = _indexed(kwargs.get("device") or _recorded_device(args, kwargs))
        fill = _LIKE[func]
        geometry = (tuple(shape.shape), shape.stride())
        options = {"dtype": shape.dtype, "device": device}
        if fill is None or not isinstance(fill, int | str):
            out = self.dispatch(aten.empty_strided.default, geometry, options)
            return out if fill is None else self.dispatch(fill, (out,), {})  # type: ignore[no-any-return]
        with _disable_current_modes():
            out = torch.empty_strided(*geometry, dtype=shape.dtype, device=device)
        recipe = self._new_recipe(out, device)
        recipe.ops.append(Op(aten.empty_strided.default, (), {}, device, writes=(recipe,), overwrites=True))
        value = fill if isinstance(fill, int) else args[-1] if func is aten.new_full.default else args[1]
        return self._real(aten.fill_.Scalar, (out, value), {})  # type: ignore[no-any-return]

    def _set(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``p.set_(x)``: aliasing, which storages keep track of by themselves."""
        target, source = args[0], args[1] if len(args) > 1 else None
        if isinstance(source, torch.Tensor) and not source.is_meta:
            args = (target, self.defer(source), *args[2:])
        if (len(args) > 1 and args[1].device != _META) or not target.is_meta:
            raise refusal(str(func), "it exchanges the memory of a deferred tensor for a real one, or the reverse")
        return func(*args, **kwargs)

    def _draw(self, op: Op) -> None:
        with lock:
            generator = generator_of(op)
            self._generators.add(generator)
            places.record(op, generator)

    def _template(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, copy: bool = False
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
                if copy or arg.numel() * arg.element_size() <= _CONSTANT_BYTES:
                    with _disable_current_modes():
                        return arg.detach().clone()
                sound = False
                return arg
            if isinstance(arg, list | tuple):
                return type(arg)(refer(item) for item in arg)
            return arg

        op_args = tuple(refer(arg) for arg in args)
        op_kwargs = {name: refer(arg) for name, arg in kwargs.items()}
        return op_args, op_kwargs, tuple(reads) if sound else None

    def _new_recipe(self, tensor: torch.Tensor, device: torch.device) -> Recipe:
        storage = tensor.untyped_storage()
        recipe = Recipe(_indexed(device), storage.nbytes())
        attach(storage, recipe)
        return recipe

    # -- real memory that a parameter was made of

    def defer(self, data: torch.Tensor) -> torch.Tensor:
        """A deferred tensor in the place of the real ``data``, if its values can be had again; else ``data``."""
        with torch._C.DisableTorchFunction():
            recipe = None if data.is_meta else recipe_of(data)
        if recipe is None or recipe.external or not recipe.ops:
            return data
        with parameter.undisturbed():
            storage = torch.empty(recipe.num_bytes, dtype=torch.uint8, device=_META).untyped_storage()
            attach(storage, recipe)
            recipe.real = weakref.ref(data.untyped_storage())
            self._twinned.append(recipe)
            return Ref.to(data, recipe).on(storage)

    def _refresh(self, tensor: torch.Tensor) -> None:
        """Bring real memory up to date with what was written through the parameter made of it."""
        if tensor.is_meta:
            return
        recipe = recipe_of(tensor)
        if recipe is not None and recipe.stale:
            self._refresh_memory(recipe, tensor.untyped_storage())

    def _refresh_memory(self, recipe: Recipe, storage: torch.UntypedStorage) -> None:
        recipe.stale = False
        with parameter.undisturbed():
            storage.copy_(evaluate([recipe])[recipe], False)

    def _refresh_twins(self) -> None:
        for recipe in self._twinned:
            storage = recipe.real() if recipe.real is not None else None
            if storage is not None and recipe.stale:
                self._refresh_memory(recipe, storage)

    def expose(self, tensor: torch.Tensor) -> None:
        """The memory of a real tensor can now change without an operation (NumPy shares it)."""
        self._refresh(tensor)
        self._make_external(tensor)

    def bind(self, tensor: torch.Tensor, *, is_overwritten: bool) -> None:
        """Give a deferred tensor, and all that shares its memory, memory now, and values where those are needed."""
        recipe = recipe_of(tensor)
        assert recipe is not None
        parameter.give_memory(self.aliases(recipe), parameter.memory_for(tensor, recipe, is_overwritten=is_overwritten))

    def _make_external(self, tensor: torch.Tensor) -> None:
        recipe = recipe_of(tensor)
        if recipe is None:
            return
        if recipe.real is not None:
            raise refusal("an in-place write", "it writes outside values into memory that a deferred parameter shares")
        recipe.external = True
        recipe.ops.clear()


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What reaches a kernel."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports all of torch._dynamo

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self._recorder.dispatch(func, args, kwargs or {})


class _Function(TorchFunctionMode):
    """What does not reach a kernel, and what must not reach the function modes below."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None and args and _is_deferred_or(args, special):
            return special(self._recorder, func, args, kwargs)
        if kwargs and _is_deferred(kwargs.get("out")) and func in _device_constructors():
            return _into(self._recorder, func, args, kwargs)
        if getattr(func, "__module__", None) == "torch.nn.init":
            with torch._C.DisableTorchFunction():
                out = func(*args, **kwargs)
        else:
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **kwargs)
        self._recorder.track(out)
        return out


# -- what the function mode answers itself, for deferred tensors


def _device(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    recipe = recipe_of(args[0])
    assert recipe is not None
    return recipe.device


def _is_type(kind: str) -> Callable[..., bool]:
    def answer(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        recipe = recipe_of(args[0])
        assert recipe is not None
        return recipe.device.type == kind

    return answer


def _get_device(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    recipe = recipe_of(args[0])
    assert recipe is not None
    return recipe.device.index if recipe.device.index is not None else -1


def _on_values(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``tolist``, ``repr``: on a copy with the values."""
    with parameter.undisturbed():
        return func(*recorder.values(args), **kwargs)


def _looks_at_devices(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``lstm`` and its kin look at devices before any operation reaches a kernel: they get real values."""
    deferred = [t for t in _tensors_in(args, kwargs) if _is_deferred(t)]
    if not deferred:
        return func(*args, **kwargs)
    running = (*(args[i] for i in _RUNNING.get(func, ()) if i < len(args)), *map(kwargs.get, _RUNNING_NAMES))
    if any(map(_is_deferred, running)):
        raise refusal(func.__name__, "its running statistics are deferred; make them of `torch.zeros`")
    with parameter.undisturbed():
        values = [recorder.values(t) for t in deferred]
        versions = [value._version for value in values]
    by_id = {id(t): value for t, value in zip(deferred, values, strict=True)}
    args, kwargs = _map_tensors(lambda t: by_id.get(id(t), t), (args, kwargs))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        out = func(*args, **kwargs)
    for tensor, value, version in zip(deferred, values, versions, strict=True):
        if value._version != version:  # written in place
            tensor.copy_(value)
            out = tensor if out is value else out
    return out


def _chooses_by_device(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``dropout`` and others take other kernels, and random numbers, on CUDA; for meta tensors they take the CPU's."""
    recipes = [recipe_of(t) for t in _tensors_in(args, kwargs) if t.is_meta]
    if all(recipe is None or recipe.device.type == "cpu" for recipe in recipes):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        recorder.track(out)
        return out
    return _looks_at_devices(recorder, func, args, kwargs)


def _into(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.eye(n, out=t)``, to which a device context adds ``t``'s device. But ``t`` is on meta."""
    recipe = recipe_of(kwargs["out"])
    assert recipe is not None
    if kwargs.get("device") is not None and _indexed(kwargs["device"]) != recipe.device:
        return func(*args, **kwargs)  # raises, as in eager construction
    with torch._C.DisableTorchFunction():
        out = func(*args, **{**kwargs, "device": _META})
    recorder.track(out)
    return out


def _as_tensor(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.as_tensor(t)``, to which a device context adds ``t``'s own device, is ``t``."""
    recipe = recipe_of(args[0])
    assert recipe is not None
    contexts = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
    device = kwargs.get("device") or (contexts[-1].device if contexts else recipe.device)
    options = _without(kwargs, "device") if _indexed(device) == recipe.device else {**kwargs, "device": device}
    with torch._C.DisableTorchFunction():
        out = func(*args, **options)
    recorder.track(out)
    return out


def _numpy(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A NumPy view of memory that is not there: a copy which refuses to be written."""
    if not args[0].is_meta:
        recorder.expose(args[0])
        return func(*args, **kwargs)
    array = _on_values(recorder, func, args, kwargs)
    array.flags.writeable = False
    return array


def _address(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args[0].is_meta:
        raise refusal("data_ptr", "a deferred tensor has no memory")
    recorder.expose(args[0])
    return func(*args, **kwargs)


def _to(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``t.to(its own device)`` returns ``t``, as in eager construction."""
    recipe = recipe_of(args[0])
    assert recipe is not None
    options = _to_options(args[1:], kwargs)
    if options.get("device") is not None and _indexed(options["device"]) == recipe.device:
        del options["device"]
    with torch._C.DisableTorchFunction():
        out = args[0].to(**{"dtype": args[0].dtype, **options})
    recorder.track(out)
    return out


def _to_options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``Tensor.to`` by name."""
    options = {name: value for name, value in kwargs.items() if value is not None}
    flags = ["non_blocking", "copy"]
    for arg in (*args, options.pop("other", None)):
        if isinstance(arg, torch.Tensor):
            options |= {"device": _recorded_device((arg,), {}), "dtype": arg.dtype}
        elif isinstance(arg, torch.dtype):
            options["dtype"] = arg
        elif isinstance(arg, bool):
            options[flags.pop(0)] = arg
        elif arg is not None:
            options["device"] = arg
    return options


def _to_like(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.to(t)`` and ``x.type_as(t)``: to where ``t`` would be."""
    other = args[1] if len(args) > 1 else kwargs.get("other")
    if _is_deferred(args[0]) or _is_deferred(other):
        return _to(recorder, func, args, kwargs)
    return func(*args, **kwargs)


def _set_item(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``t[index] = 0``: the number as a real tensor, which else would be made (and lost) on the meta device."""
    target, index, value = args
    if isinstance(value, bool | int | float | complex):
        value = torch.tensor(value, dtype=target.dtype, device=_CPU)
    func(target, index, value)


def _new(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``t.new(2, 3)`` and ``t.new_tensor(data)``."""
    recipe = recipe_of(args[0])
    assert recipe is not None
    if func is torch.Tensor.new_tensor:
        return torch.tensor(*args[1:], **{"dtype": args[0].dtype, "device": recipe.device, **kwargs})
    if not all(isinstance(arg, int) for arg in args[1:]):
        raise refusal("Tensor.new with data", "it asks a deferred tensor for its type")
    return torch.empty(args[1:], dtype=args[0].dtype, device=recipe.device)


def _to_own_device(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``t.cpu()`` and ``t.cuda()``."""
    device = torch.device(func.__name__)
    if len(args) > 1 or kwargs.get("device") is not None:
        device = torch.device("cuda", torch.device(kwargs.get("device", *args[1:2])).index or 0)
    return _to(recorder, torch.Tensor.to, (args[0], device), {})


def _set_data(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``p.data = x`` where one of them is deferred and the other real."""
    target, data = args
    if target.is_meta and not data.is_meta and not recorder.paused:
        data = recorder.defer(data)
    if target.is_meta == data.is_meta:
        func(target, data)
    else:
        with parameter.undisturbed():
            parameter.exchange(target, data)
    recorder.track(target)


def _copy(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Weights that come from outside: the parameter gets its memory now."""
    target, source = args[0], args[1] if len(args) > 1 else kwargs["src"]
    if _is_deferred(target) and _is_external(source):
        with parameter.undisturbed():
            parameter.check_copy(target, source)
            recorder.bind(target, is_overwritten=True)
    out = func(*args, **kwargs)
    recorder.track(out)
    return out


def _deepcopy(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, memo = args
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


_T = torch.Tensor
_SPECIAL: dict[Any, Any] = {
    _T.device.__get__: _device,
    _T.is_meta.__get__: _is_type("meta"),  # type: ignore[attr-defined]
    _T.is_cpu.__get__: _is_type("cpu"),  # type: ignore[attr-defined]
    _T.is_cuda.__get__: _is_type("cuda"),  # type: ignore[attr-defined]
    _T.get_device: _get_device,
    _T.tolist: _on_values,
    _T.__repr__: _on_values,
    _T.__format__: _on_values,
    _T.numpy: _numpy,
    _T.__array__: _numpy,
    _T.data_ptr: _address,
    _T.__dlpack__: _address,
    _T.to: _to_like,
    _T.type_as: _to_like,
    _T.new: _new,
    _T.new_tensor: _new,
    _T.__setitem__: _set_item,
    _T.cpu: _to_own_device,
    _T.cuda: _to_own_device,
    _T.data.__set__: _set_data,  # type: ignore[attr-defined]
    _T.copy_: _copy,
    _T.__deepcopy__: _deepcopy,
}
_SPECIAL |= dict.fromkeys((torch.as_tensor, torch.asarray), _as_tensor)
_SPECIAL |= dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _looks_at_devices)
_SPECIAL[functional.multi_head_attention_forward] = _looks_at_devices
_CHOOSING: tuple[Any, ...] = (
    torch.dropout,
    torch.dropout_,
    torch.lstm_cell,
    torch.gru_cell,
    torch.batch_norm,
    torch.instance_norm,
)
_CHOOSING += (functional.dropout, functional.batch_norm, functional.instance_norm)
_CHOOSING += (torch.rms_norm, functional.rms_norm, functional.scaled_dot_product_attention)
_SPECIAL |= dict.fromkeys(_CHOOSING, _chooses_by_device)
_RUNNING: dict[Any, tuple[int, int]] = {torch.batch_norm: (3, 4), torch.instance_norm: (3, 4)}
_RUNNING |= {functional.batch_norm: (1, 2), functional.instance_norm: (1, 2)}
_RUNNING_NAMES = ("running_mean", "running_var")
_ON_REAL_TOO = {_looks_at_devices, _chooses_by_device, _set_data, _numpy, _address, _to_like}


def _is_deferred_or(args: tuple[Any, ...], special: Any) -> bool:
    return special in _ON_REAL_TOO or _is_deferred(args[0])


# -- patches: what no mode sees


class _Patches:
    """`torch.nn.Parameter`, ``trunc_normal_`` and pickling, patched while any thread records."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._undo: list[Callable[[], None]] = []

    def enter(self) -> None:
        """A recording starts."""
        with self._lock:
            self._count += 1
            if self._count == 1:
                self._patch(torch.nn.Parameter, "__new__", _new_parameter(torch.nn.Parameter.__new__))
                whole = _trunc_normal(torch.nn.init._no_grad_trunc_normal_)
                self._patch(torch.nn.init, "_no_grad_trunc_normal_", whole)
                self._patch(torch.Tensor, "__reduce_ex__", _reduce(torch.Tensor.__reduce_ex__))
                self._patch(torch.nn.RNNBase, "flatten_parameters", _flatten(torch.nn.RNNBase.flatten_parameters))
                hook = torch.nn.modules.module.register_module_parameter_registration_hook(_registered)
                self._undo.append(hook.remove)

    def leave(self) -> None:
        """A recording ends."""
        with self._lock:
            self._count -= 1
            if not self._count:
                while self._undo:
                    self._undo.pop()()

    def _patch(self, owner: Any, name: str, new: Any) -> None:
        old = owner.__dict__[name]
        setattr(owner, name, new)
        self._undo.append(lambda: setattr(owner, name, old))


patches = _Patches()


def _new_parameter(original: Callable[..., Any]) -> Callable[..., Any]:
    def __new__(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:  # noqa: N807
        recorder = current()
        if recorder is None or recorder.paused:
            return original(cls, data, requires_grad)
        if type(data) in (torch.Tensor, torch.nn.Parameter):
            data = recorder.defer(data)
        made = original(cls, data, requires_grad)
        if isinstance(made, torch.Tensor):
            with torch._C.DisableTorchFunction():
                recorder.adopt(made)
        return made

    return __new__


def _trunc_normal(original: Callable[..., Any]) -> Callable[..., Any]:
    """Since torch 2.13 it draws until all values are in range: a loop on values, recorded whole."""

    def _no_grad_trunc_normal_(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = current()
        with torch._C.DisableTorchFunction():
            deferred = _is_deferred(tensor)
        if recorder is None or not deferred:
            return original(tensor, *args, **kwargs)
        return recorder.record_whole(original, tensor, *args, *kwargs.values())

    return _no_grad_trunc_normal_


def _flatten(original: Callable[..., Any]) -> Callable[..., Any]:
    def flatten_parameters(self: torch.nn.RNNBase) -> None:
        recorder = current()
        if recorder is not None:
            recorder.recurrent.append(weakref.ref(self))
        recurrent.flatten_unless_deferred(original, self)

    return flatten_parameters


def _reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    def __reduce_ex__(self: torch.Tensor, protocol: Any) -> Any:  # noqa: N807
        with torch._C.DisableTorchFunction():
            if current() is not None and _is_deferred(self):
                raise parameter.misuse(self, "saved or pickled")
        return original(self, protocol)

    return __reduce_ex__


def _registered(module: torch.nn.Module, name: str, param: torch.Tensor | None) -> None:
    """Know a parameter by its place, for messages; and parameters that were made in unusual ways."""
    recorder = current()
    if recorder is None or param is None:
        return
    with torch._C.DisableTorchFunction():
        recipe = recipe_of(param) if param.is_meta else None
        if recipe is not None:
            recipe.label = recipe.label or f"{name} of {type(module).__name__}"
            recorder.adopt(param)


# -- facts about operations and arguments


@dataclass(frozen=True, slots=True)
class _Traits:
    """What the schema of an operation says: whether it draws, returns its first argument, and where it writes."""

    random: bool
    in_place: bool
    writes: tuple[tuple[int, str], ...]


@cache
def traits_of(func: Any) -> _Traits:
    """The traits of an ``OpOverload``."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return _Traits(False, False, ())
    writes = [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if func in _UNDECLARED_WRITES:
        writes = [(i, a.name) for i, a in enumerate(schema.arguments) if a.name in ("running_mean", "running_var")]
    in_place = bool(writes) and writes[0][0] == 0 and len(writes) == 1 and len(schema.returns) == 1
    in_place = in_place and not str(schema.arguments[0].type).startswith("List")
    return _Traits(torch.Tag.nondeterministic_seeded in func.tags, in_place, tuple(writes))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found = (args[i] if i < len(args) else kwargs.get(name) for i, name in traits_of(func).writes)
    return [tensor for value in found for tensor in _tensors_in((value,), {})]


def _overwrites(op: Op) -> bool:
    target = op.args[0] if op.args else None
    if op.func not in FILLS or not isinstance(target, Ref) or not target.covers_recipe:
        return False
    return not any(isinstance(arg, Ref) and arg.recipe is target.recipe for arg in op.args[1:])


def _tensors_in(args: Iterable[Any], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value, {})
        elif isinstance(value, dict):
            yield from _tensors_in(value.values(), {})


def _map_tensors(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(change, item) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(change, item) for key, item in value.items()}
    return value


def _to_meta(value: Any) -> Any:
    """The same arguments, for shapes only."""

    def meta(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)

    mapped = _map_tensors(meta, value)
    if isinstance(mapped, dict) and mapped.get("device") is not None:
        mapped["device"] = _META
    return mapped


def _check_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise what eager construction would raise for shapes and dtypes that do not fit."""
    try:
        func(*_to_meta(args), **_without(_to_meta(kwargs), "generator"))
    except NotImplementedError:
        return  # no meta kernel, or one that needs values: it is recorded as it is


def _is_deferred(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta and recipe_of(value) is not None


def _is_strided(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def _is_external(value: Any) -> bool:
    """Whether these are real values, and too many to keep a copy in a recipe."""
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return False
    recipe = recipe_of(value)
    return (recipe is None or recipe.external) and value.numel() * value.element_size() > _CONSTANT_BYTES


def _reads_outside(args: tuple[Any, ...]) -> bool:
    """Whether an operation takes tensors (other than single numbers) that the recording knows nothing about."""
    return any(t.dim() and not t.is_meta and recipe_of(t) is None for t in _tensors_in(args, {}))


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _without(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != name}


def _asks_for_meta(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _indexed(device: torch.device | str) -> torch.device:
    """``cuda`` as ``cuda:0``, so that devices compare."""
    device = torch.device(device)
    if device.type in ("cpu", "meta") or device.index is not None:
        return device
    return torch.device(device.type, getattr(torch, device.type).current_device())


def _recorded_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where the result of an operation would be."""
    if kwargs.get("device") is not None:
        return _indexed(kwargs["device"])
    recipes = (recipe_of(t) for t in _tensors_in(args, kwargs) if t.is_meta)
    return next((recipe.device for recipe in recipes if recipe is not None), _device_of(args, {}))


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    if kwargs.get("device") is not None:
        return _indexed(kwargs["device"])
    return next((t.device for t in _tensors_in(args, kwargs)), _CPU)


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def refusal(operation: str, reason: str) -> UnrecordableError:
    """The error for what cannot be recorded."""
    return UnrecordableError(
        f"{parameter.path_being_built()}: {operation} cannot be recorded: {reason}. "
        "Build this part for real with `with lightning_efficient_init.deferred.eager(): ...`."
    )
