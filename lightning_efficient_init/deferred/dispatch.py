"""The dispatch mode: each operation that reaches a kernel is run, or recorded, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_efficient_init.deferred import parameter
from lightning_efficient_init.deferred.arguments import (
    CPU,
    META,
    asks_for_meta,
    check_on_meta,
    device_of,
    indexed,
    is_deferred,
    is_strided,
    map_tensors,
    recorded_device,
    tensors_in,
    to_meta,
    without,
    written_by,
)
from lightning_efficient_init.deferred.initializers import FILLS
from lightning_efficient_init.deferred.operators import LIKE, Traits, traits_of
from lightning_efficient_init.deferred.recipe import Op, Recipe, Ref, recipe_of
from lightning_efficient_init.deferred.replay import evaluate
from lightning_efficient_init.deferred.tape import as_list, fresh_in
from lightning_efficient_init.deferred.wording import refusal

if TYPE_CHECKING:
    from lightning_efficient_init.deferred.record import Recorder

aten = torch.ops.aten
_NUMBERS = (int, float, bool)
_MOST_NUMBERS = 4
_PROBED_BYTES = 1 << 24
_known_geometries: dict[Any, bool] = {}
_KIND_OPTIONS = frozenset({"dtype", "device"})
_PLAIN_OPTIONS = _KIND_OPTIONS | {"pin_memory"}
_NEVER_CAST = {aten.clone.default, aten._to_copy.default}


class Dispatch(TorchDispatchMode):
    """What reaches a kernel."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder
        self._tape = recorder.tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports all of torch._dynamo

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self._dispatch(traits_of(func), args, kwargs or {})

    def _dispatch(self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run or record one operation."""
        if traits.is_fill and len(args) <= _MOST_NUMBERS and (recipe := _filled(args)) is not None:
            return self._tape.write_fill(traits, args, kwargs, recipe)
        if asks_for_meta(kwargs) and (device := self._device_of_call()) is not None:
            kwargs = {**kwargs, "device": device}
        tensors = list(tensors_in(args, kwargs))
        metas = [t for t in tensors if t.is_meta]
        if metas and any(recipe_of(t) is not None for t in metas):
            return self._deferred(traits, args, kwargs, tensors)
        if metas or traits.is_set or asks_for_meta(kwargs):
            return traits.func(*args, **kwargs)  # the user's own meta tensors
        for tensor in tensors:
            self._recorder.refresh(tensor)
        return self._real(traits, args, kwargs, is_constant=not tensors)

    def _device_of_call(self) -> torch.device | None:
        """The device for what a function makes beside its arguments on the one that they seem to be on.

        Returns:
            None if somebody wants to have it on the meta device.
        """
        args, kwargs = self._recorder.call
        metas = [t for t in tensors_in(args, kwargs) if t.is_meta]
        is_wished = any(map(_names_meta, (*args, *kwargs.values(), _device.CURRENT_DEVICE)))
        if is_wished or not metas or any(recipe_of(t) is None for t in metas):
            return None
        return recorded_device(tuple(metas), {})

    # -- on real tensors

    def _real(self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_constant: bool) -> Any:
        if not self._recorder.paused and traits.is_factory and not kwargs.get("pin_memory"):
            return self._factory(traits, args, kwargs)
        if traits.is_random:
            return self._real_random(traits, args, kwargs)
        if self._recorder.paused:
            return traits.func(*args, **kwargs)
        if traits.is_lift:
            out = traits.func(*args, **kwargs)
            self._tape.write_constant(out)
            return out
        if is_constant and traits.is_constant:
            return self._tape.run_constant(traits, args, kwargs)
        return self._tape.run(traits, args, kwargs)

    def _real_random(self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = device_of(args, kwargs)
        return self._tape.run_random(traits, args, kwargs, device, is_kept=not self._recorder.paused)

    def _factory(self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """``empty``, ``randn`` and ``rand``: nothing to run yet."""
        generator = kwargs.get("generator")
        device = indexed(kwargs.get("device") or CPU)
        if generator is not None and indexed(generator.device) != device:
            return traits.func(*args, **kwargs)  # type: ignore[no-any-return]  # raises, as in eager construction
        out = _shape_of(traits, args, kwargs)
        if not _may_wait(out):
            run = traits.func if traits.is_empty else lambda *a, **k: self._real_random(traits, a, k)
            return run(*args, **kwargs)  # type: ignore[no-any-return]
        if traits.is_random:
            self._tape.write_random(Op(traits.func, args, {**kwargs, "device": device}, device, overwrites=True), out)
        else:
            self._tape.new_recipe(out, device)
        self._recorder.track(out)
        return out

    # -- on deferred tensors

    def _deferred(
        self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]
    ) -> Any:
        if traits.is_like and is_deferred(args[0]):
            return self._like(traits, args, kwargs)
        if asks_for_meta(kwargs):  # as accelerate's `init_empty_weights` does: no recipe is wanted
            return traits.func(*to_meta(args), **kwargs)
        if traits.is_set:
            return self._set(traits, args, kwargs)
        if traits.wants_values:
            return self._forced(traits, args, kwargs)
        self._check_recipes(traits, tensors)
        written = written_by(traits, args, kwargs)
        if any(not t.is_meta for t in written):
            return self._forced(traits, args, kwargs)
        try:
            out = _run_on_meta(traits, args, kwargs)
        except Exception:  # no meta kernel, or a shape that depends on values: the values decide, or it raises for real
            if traits.is_in_place:
                raise
            return self._forced(traits, args, kwargs)
        if self._recorder.autocast and not written and self._may_cast(traits, args, kwargs, out):
            raise refusal(str(traits.func), "autocast is on, and casts nothing that has no memory yet")
        if not written and not _is_as_in_memory(traits, args, kwargs, tensors, out):
            return self._forced(traits, args, kwargs)
        self._tape.write_deferred(traits, args, kwargs, written, out)
        self._recorder.track(out)
        return out

    def _may_cast(self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
        """Whether autocast might cast for an operation, which made ``out``, if it ran for real."""
        if traits.func in _NEVER_CAST or recorded_device(args, kwargs).type not in self._recorder.autocast:
            return False
        return any(t.is_floating_point() for t in fresh_in(out))

    def _check_recipes(self, traits: Traits, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            self._recorder.refresh(tensor)
            if tensor.is_meta and tensor.numel() and recipe_of(tensor) is None:
                reason = "it mixes deferred tensors with one on the meta device, which has no values"
                raise refusal(str(traits.func), reason)

    def _forced(self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation for real on the values that deferred tensors would have."""
        if any(t.is_meta for t in written_by(traits, args, kwargs)):
            raise refusal(str(traits.func), "it writes into a deferred tensor and into a real one at once")
        args, kwargs = values_of((args, kwargs))
        if traits.is_random:
            return self._real_random(traits, args, kwargs)
        return self._tape.run(traits, args, kwargs)

    def _like(self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """``zeros_like`` and its kin need the shape of a deferred tensor, not its values."""
        if asks_for_meta(kwargs):
            return traits.func(*args, **kwargs)  # type: ignore[no-any-return]
        shape = traits.func(*args, **{**without(kwargs, "pin_memory"), "device": META})
        options = {"dtype": shape.dtype, "device": indexed(kwargs.get("device") or recorded_device(args, kwargs))}
        geometry = (tuple(shape.shape), shape.stride())
        fill = LIKE[traits.func]
        if isinstance(fill, int):
            return self._filled_like(geometry, options, fill)
        if fill == "value":
            return self._filled_like(geometry, options, args[-1] if traits.func is aten.new_full.default else args[1])
        out = self._dispatch(traits_of(aten.empty_strided.default), geometry, options)
        return out if fill is None else self._dispatch(traits_of(fill), (out,), {})  # type: ignore[no-any-return]

    def _filled_like(self, geometry: tuple[Any, ...], options: dict[str, Any], value: Any) -> torch.Tensor:
        with _disable_current_modes():
            out = torch.empty_strided(*geometry, **options)
        recipe = self._tape.new_recipe(out, options["device"])
        recipe.ops.append(Op(aten.empty_strided.default, (), {}, recipe.device, writes=(recipe,), overwrites=True))
        return self._tape.run(traits_of(aten.fill_.Scalar), (out, value), {})  # type: ignore[no-any-return]

    def _set(self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``p.set_(x)``: aliasing, which storages keep track of by themselves."""
        target, source = args[0], args[1] if len(args) > 1 else None
        if isinstance(source, torch.Tensor) and not source.is_meta:
            args = (target, self._recorder.defer(source), *args[2:])
        if (len(args) > 1 and args[1].device != META) or not target.is_meta:
            reason = "it exchanges the memory of a deferred tensor for a real one, or the reverse"
            raise refusal(str(traits.func), reason)
        return traits.func(*args, **kwargs)


def record_empty(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What `Dispatch` makes of `torch.empty`, without the way there, which is most of the time.

    Returns:
        None if that way has to be gone: somebody else would see the operation there, or it is not to be recorded.
    """
    if recorder.paused or not kwargs.keys() <= _KIND_OPTIONS or not _is_alone():
        return None
    device = kwargs.get("device")  # 0 is one
    device = indexed(torch._C._get_default_device() if device is None else device)
    if device.type == "meta":
        return None
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        out = torch.empty(*args, dtype=kwargs.get("dtype"), device=META)
        if not _may_wait(out):
            return None
        recorder.remember(out, recorder.tape.new_recipe(out, device))
    return out


def record_fill(recorder: Recorder, func: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What `Dispatch` makes of ``func``, one of `FILLS`, with these arguments.

    Returns:
        None in the same cases as `record_empty`.
    """
    tensor = kwargs["tensor"]
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not _is_alone():
        return None
    op, numbers_of = FILLS[func]
    if (numbers := numbers_of(kwargs)) is None or (recipe := _filled((tensor, *numbers))) is None:
        return None
    generator = {"generator": kwargs.get("generator")}
    return recorder.tape.write_fill(traits_of(op), (tensor, *numbers), generator, recipe)


def _names_meta(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("meta")


def _may_wait(out: torch.Tensor) -> bool:
    """Whether what a factory makes can be deferred: parameters are of floating-point or complex numbers."""
    return out.numel() > 0 and (out.is_floating_point() or out.is_complex())


def _is_alone() -> bool:
    """Whether no other dispatch mode than ours is active."""
    return torch._C._len_torch_dispatch_stack() == 1


def values_of(value: Any) -> Any:
    """``value`` with real copies in the place of deferred tensors."""
    recipes = [r for t in tensors_in((value,)) if t.is_meta and (r := recipe_of(t)) is not None]
    memory = evaluate(dict.fromkeys(recipes))

    def real(tensor: torch.Tensor) -> torch.Tensor:
        recipe = recipe_of(tensor) if tensor.is_meta else None
        if recipe is None:
            return tensor
        return Ref.to(tensor, recipe).on(memory[recipe]).requires_grad_(tensor.requires_grad)

    return map_tensors(real, value)


def _filled(args: tuple[Any, ...]) -> Recipe | None:
    """The recipe of a deferred tensor that is filled from numbers alone."""
    if not args[0].is_meta:
        return None
    for arg in args[1:]:
        if not isinstance(arg, _NUMBERS):
            return None
    return recipe_of(args[0])


def _shape_of(traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What a factory makes, on meta."""
    if traits.func is aten.empty.memory_format and kwargs.keys() <= _PLAIN_OPTIONS:
        return torch.empty(args[0], dtype=kwargs.get("dtype"), device=META)  # half the time of the operator
    if "generator" in kwargs:
        return aten.empty.memory_format(args[0], **{**without(kwargs, "generator"), "device": META})  # type: ignore[no-any-return]
    return traits.func(*args, **{**kwargs, "device": META, "pin_memory": False})  # type: ignore[no-any-return]


def _is_as_in_memory(
    traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor], out: Any
) -> bool:
    """Whether ``out``, made on meta of arguments with these ``tensors``, has the strides and dtypes that it should.

    Kernels add up in the order of strides, so other strides end in other values. Of contiguous tensors nearly all
    operators make contiguous ones, wherever they run, and pointwise ones decide in the same way everywhere. For the
    rest the device's kernel is asked, once for each geometry, with zeros. What is too large for that is taken for
    right, unless the operator is known to differ.
    """
    fresh = fresh_in(out)
    if not fresh or traits.is_random or traits.is_pointwise or traits.func in _NEVER_CAST:
        return True
    shown = [*filter(is_strided, tensors), *fresh]
    if not traits.is_unlike_meta and all(t.is_contiguous() for t in shown):
        return True
    if sum(_span(t) * t.element_size() for t in shown) > _PROBED_BYTES:
        return not traits.is_unlike_meta
    key = traits.func, repr(map_tensors(_geometry, (args, kwargs)))
    if key not in _known_geometries:
        _known_geometries[key] = _is_as_with_zeros(traits, args, kwargs, out)
    return _known_geometries[key]


def _is_as_with_zeros(traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
    try:
        with torch._C._DisableTorchDispatch():
            found = traits.func(*map_tensors(_zeros, args), **map_tensors(_zeros, kwargs))
    except Exception as error:
        # without a kernel (torch 2.6 raises a RuntimeError) whoever wants its values is told, and perhaps nobody does;
        # anything else wants other values than zeros
        return isinstance(error, NotImplementedError) or "not implemented for" in str(error)
    return _kinds(found) == _kinds(out)


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, recorded_device((tensor,), {}), tuple(tensor.shape), tensor.stride()


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros in the place of a deferred tensor."""
    recipe = recipe_of(tensor) if tensor.is_meta else None
    if recipe is None:
        return tensor
    ref = Ref.to(tensor, recipe)
    ref.offset = 0
    return ref.on(torch.zeros(_span(tensor), dtype=tensor.dtype, device=recipe.device).untyped_storage())


def _span(tensor: torch.Tensor) -> int:
    """How many elements of memory a tensor reaches over."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * step for size, step in steps) if tensor.numel() else 0


def _kinds(out: Any) -> list[tuple[Any, ...]]:
    return [(t.dtype, t.shape, t.stride()) for t in as_list(out) if is_strided(t)]


def _run_on_meta(traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Shapes and aliases of the result; an in-place operation is only checked."""
    if not traits.is_in_place:
        return traits.func(*to_meta(args), **to_meta(kwargs))
    if traits.func is aten.copy_.default:
        parameter.check_copy(args[0], args[1])
    elif not traits.is_fill:
        check_on_meta(traits.func, args, kwargs)
    return args[0]
