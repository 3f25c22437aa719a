"""Deferred tensors as objects: what they allow once the recording has ended, and how they come by memory.

No mode is active then, so a deferred parameter guards itself: its class is exchanged for a subclass whose
``__torch_function__`` lets pass what needs no values, gives it memory when weights are loaded into it, and raises
`DeferredParameterError` for the rest, where plain meta tensors would go on without values.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lightning_efficient_init.deferred import recurrent
from lightning_efficient_init.deferred.active import current
from lightning_efficient_init.deferred.recipe import Op, Recipe, Ref, attach, living, recipe_of
from lightning_efficient_init.deferred.replay import evaluate
from lightning_efficient_init.deferred.trial import is_trial, stand_in
from lightning_efficient_init.deferred.wording import misuse, no_memory
from lightning_efficient_init.errors import DeferredParameterError, EfficientInitError
from lightning_efficient_init.garbage import collections_paused


def exchange(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Let the object ``tensor`` show the memory of ``data``; who refers to the object sees that.

    `torch.utils.swap_tensors` does the same, but not while there are weak references or views; neither matters here,
    as views are exchanged together with their base.
    """
    requires_grad = tensor.requires_grad
    _become(tensor, torch.Tensor._make_subclass(type(tensor), data, requires_grad and _differentiable(data)))


def _become(tensor: torch.Tensor, fresh: torch.Tensor) -> None:
    """Let the object ``tensor`` be what ``fresh`` is, but for the hooks on its gradient, which it keeps."""
    hooks, later = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    torch._C._swap_tensor_impl(tensor, fresh)
    if hooks:
        tensor._backward_hooks = hooks
    if later:
        tensor._post_accumulate_grad_hooks = later


with _disable_current_modes():  # its first use imports modules: 1 to 5 ms, which no model is to wait for
    pass


@contextmanager
def undisturbed() -> Iterator[None]:
    """Work of ours that no mode, nor autograd is to see; nor the garbage collector: many objects, no garbage."""
    with collections_paused(), torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
        yield


def give_memory(tensors: Iterable[torch.Tensor], storage: torch.UntypedStorage) -> None:
    """Put deferred tensors that share memory on the real ``storage``, or in their form if they have one.

    To be called `undisturbed`, as `show` is.
    """
    refs: dict[torch.Tensor, Ref] = {}
    for tensor in tensors:
        recipe = recipe_of(tensor)
        assert recipe is not None
        ref = Ref.to(tensor, recipe)
        if recipe.form is None:
            refs[tensor] = ref
        elif isinstance(tensor, torch.nn.Parameter):  # what else shared its memory stays deferred
            recipe.form.write(tensor, ref.on(storage))
    show(refs, storage)


def show(refs: Mapping[torch.Tensor, Ref], storage: torch.UntypedStorage) -> None:
    """Let deferred tensors show their windows of the real ``storage``. Views of others of them pass on gradients."""
    bases: dict[torch.Tensor, torch.Tensor] = {}
    if len(refs) > 1:
        views = [(tensor, tensor._base) for tensor in refs if tensor.grad_fn is not None]
        bases = {t: base for t, base in views if base is not None and base in refs and _is_view_of_kind(t, base)}
    for tensor, ref in refs.items():
        unguard(tensor)
        if tensor not in bases:
            exchange(tensor, ref.on(storage))
    for tensor, base in bases.items():
        ref = refs[tensor]
        with torch.enable_grad():
            _become(tensor, base.as_strided(ref.size, ref.stride, ref.offset))


def _is_view_of_kind(view: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether the elements of ``view`` are elements of ``base``, as they are there."""
    return view.dtype == base.dtype and view.is_conj() == base.is_conj() and view.is_neg() == base.is_neg()


def guard(tensor: torch.Tensor) -> None:
    """Let a deferred tensor refuse what needs its values."""
    if not isinstance(tensor, Guarded):
        tensor.__class__ = _guarded(type(tensor))


def unguard(tensor: torch.Tensor) -> None:
    """Give a tensor the class back that it was made with."""
    if isinstance(tensor, Guarded):
        tensor.__class__ = type(tensor)._bare  # type: ignore[assignment]


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class Guarded:
    """Mixed into the class of a deferred tensor."""

    _bare: type[torch.Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if current() is not None:
                return func(*args, **kwargs)  # being recorded
            try:
                return _guarded_call(func, args, kwargs)
            except _REFUSALS_OF_META as error:
                if not _is_about_meta(error):
                    raise
            return _refuse(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = _copy(self)  # type: ignore[arg-type]
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if is_trial():
            return stand_in()
        raise misuse(self, "saved or pickled")  # type: ignore[arg-type]


@cache
def _guarded(bare: type[torch.Tensor]) -> type[torch.Tensor]:
    members = {"_bare": bare, "__slots__": (), "__module__": __name__}
    return type(f"Deferred{bare.__name__}", (Guarded, bare), members)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A deep copy that is deferred too: its recipe is to copy what the original's recipe gives."""
    bare = type(tensor)._bare  # type: ignore[attr-defined]
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        data = _derived(tensor, torch.ops.aten.clone.default, torch.empty_like(tensor.detach()), {})
        made: torch.Tensor = torch.Tensor._make_subclass(bare, data, tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    original, copied = recipe_of(tensor), recipe_of(made)
    assert original is not None
    assert copied is not None
    copied.form = original.form
    guard(made)
    return made


def _derived(tensor: torch.Tensor, func: Any, data: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Give the meta tensor ``data`` the recipe to call ``func`` on what the recipe of ``tensor`` gives."""
    recipe = recipe_of(tensor)
    assert recipe is not None
    derived = Recipe(recipe.device, data.untyped_storage().nbytes(), label=recipe.label)
    attach(data.untyped_storage(), derived)
    op = Op(func, (Ref.to(tensor, recipe),), kwargs, recipe.device, reads=(recipe,), writes=(derived,))
    op.outs, op.overwrites = (Ref.to(data, derived),), True
    derived.ops.append(op)
    return data


def _guarded_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handler = _HANDLERS.get(func)
    if handler is not None:
        return handler(func, args, kwargs)
    name = getattr(func, "__name__", "")
    if name == "__get__" or name in _HARMLESS:
        out = func(*args, **kwargs)
        _guard_results(out)  # such as ``p.T``
        return out
    tensors = _flat(args, kwargs)
    deferred = next(t for t in tensors if isinstance(t, Guarded))
    in_place = name.endswith("_") and not name.endswith("__") and tensors[0] is deferred
    if in_place or name == "__setitem__" or any(not t.is_meta for t in tensors):
        raise misuse(deferred, f"used in {name or func}")
    out = func(*args, **kwargs)
    _guard_results(out)
    return out


def _guard_results(value: Any) -> None:
    if isinstance(value, torch.Tensor):
        if value.is_meta and recipe_of(value) is not None:
            guard(value)
        elif value.is_meta and type(value) is torch.Tensor:
            value.__class__ = _Unknown
    elif isinstance(value, tuple | list):
        for item in value:
            _guard_results(item)


class _Unknown(torch.Tensor):
    """What was computed from a deferred parameter, such as its norm: nobody can read it."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            try:
                if func not in _READS:
                    out = func(*args, **(kwargs or {}))
                    _guard_results(out)
                    return out
            except _REFUSALS_OF_META as error:
                if not _is_about_meta(error):
                    raise
        raise DeferredParameterError(
            f"{getattr(func, '__name__', func)}: this was computed from a deferred parameter, which has no "
            "values yet. Call `materialize(model)`, or load a checkpoint into the model, before."
        )


def _is_about_meta(error: Exception) -> bool:
    """Whether torch refuses something for no other reason than that a tensor is on the meta device."""
    return not isinstance(error, EfficientInitError) and re.search("meta(?!data)", str(error).lower()) is not None


def _get_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = func(*args, **kwargs)
    if isinstance(out, torch.Tensor):
        remember_alias(args[0], out)
        guard(out)
    return out


def _detach(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Another tensor that shows the same; but a parameter made of a parameter would not be one."""
    if isinstance(args[0], torch.nn.Parameter) and _caller().f_globals.get("__name__") == "torch.nn.parameter":
        raise misuse(args[0], "made into another parameter")
    return _get_data(func, args, kwargs)


def _get_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Meta; but ``DistributedDataParallel``, which asks before it reads values in C++, is told to wait."""
    if _caller().f_globals.get("__name__") == "torch.nn.parallel.distributed":
        raise misuse(args[0], "wrapped in DistributedDataParallel")
    return func(*args, **kwargs)


def _get_is_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True; but not for ``Module._load_from_state_dict``, which would warn that loading does nothing. Here it does."""
    return _caller().f_code is not torch.nn.Module._load_from_state_dict.__code__


def _caller() -> FrameType:
    """The frame that used a deferred tensor."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") == __name__ and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _load(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``p.copy_(weights)``: the parameter gets memory, and the weights."""
    target, source = args[0], args[1] if len(args) > 1 else kwargs["other"]
    if isinstance(source, Guarded):
        if target.is_meta and not isinstance(target, Guarded):
            return func(*args, **kwargs)
        raise misuse(source, "copied")  # type: ignore[arg-type]
    if source.is_meta:
        return func(*args, **kwargs)
    check_copy(target, source)
    if write_form(target, source):
        return target
    recipe = recipe_of(target)
    bind(target)
    out = func(*args, **kwargs)
    if recipe is not None and recipe.layer is not None and (layer := recipe.layer()) is not None:
        recurrent.flatten([layer])
    return out


def write_form(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Write values to a deferred parameter that keeps them in a form of its own, if it does."""
    recipe = recipe_of(target)
    if recipe is None or recipe.form is None:
        return False
    with undisturbed():
        recipe.form.write(target, source.detach().to(recipe.device))
    return True


def _empty_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Memory for something else; but not for the parameter itself, whose recipe would be lost without a word."""
    if _caller().f_globals.get("__name__") == "torch.nn.modules.module":
        raise misuse(args[0], "replaced by memory without values (`Module.to_empty`)")
    out = func(*args, **kwargs)
    _guard_results(out)
    return out


def _set_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``p.data = x``."""
    target, data = args
    if isinstance(target, Guarded) and not data.is_meta:
        check_data(target, data)  # type: ignore[arg-type]
        unguard(target)  # type: ignore[arg-type]
        with torch.no_grad():
            exchange(target, data)  # type: ignore[arg-type]
        return
    func(target, data)


def check_data(target: torch.Tensor, data: torch.Tensor) -> None:
    """Refuse ``p.data = x`` for an ``x`` of a class that stands for memory elsewhere, such as in a file."""
    if type(data).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise no_memory(target, data)


def cast(tensors: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Cast tensors that share memory and are of one dtype, keeping identity and sharing."""
    with undisturbed():
        refs = [Ref(Recipe(t.device, 0), dtype, tuple(t.shape), t.stride(), t.storage_offset()) for t in tensors]  # type: ignore[arg-type]
        storage = tensors[0].untyped_storage()
        numel = storage.nbytes() // tensors[0].element_size()
        flat = Ref(refs[0].recipe, tensors[0].dtype, (numel,), (1,), 0).on(storage).to(dtype)
        for tensor, ref in zip(tensors, refs, strict=True):
            exchange(tensor, ref.on(flat.untyped_storage()))


def remember_alias(tensor: torch.Tensor, alias: torch.Tensor) -> None:
    """Let ``alias`` get memory together with ``tensor``."""
    recipe = recipe_of(tensor)
    assert recipe is not None
    known = {id(t): t for t in (*living(recipe.aliases), tensor, alias)}
    recipe.aliases = [weakref.ref(t) for t in known.values()]


def bind(tensor: torch.Tensor) -> None:
    """Give ``tensor``, which is about to be overwritten, and its aliases memory."""
    recipe = recipe_of(tensor)
    assert recipe is not None
    aliases = [t for t in living(recipe.aliases) if recipe_of(t) is recipe]
    storage = memory_for(tensor, recipe, is_overwritten=True)
    with undisturbed():
        give_memory({id(t): t for t in (*aliases, tensor)}.values(), storage)


def memory_for(tensor: torch.Tensor, recipe: Recipe, *, is_overwritten: bool) -> torch.UntypedStorage:
    """Memory for ``recipe``: with its values, unless ``tensor`` is all of it and is about to be overwritten."""
    if is_overwritten and Ref.to(tensor, recipe).fills_recipe:
        return torch.UntypedStorage(recipe.num_bytes, device=recipe.device)
    return evaluate([recipe])[recipe]


def check_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Raise what ``target.copy_(source)`` would raise for shapes that do not fit."""
    if target.shape != source.shape:
        torch.empty(target.shape, device="meta").copy_(torch.empty(source.shape, device="meta"))


def _cast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``t.to(dtype)``, ``t.half()``: recorded. ``t.to(device)`` needs memory."""
    tensor = args[0]
    try:
        out = func(*args, **kwargs)
    except NotImplementedError:
        raise misuse(tensor, "moved to a device") from None
    if out is tensor or not out.is_meta:
        return out
    data = _derived(tensor, torch.ops.aten._to_copy.default, torch.empty_like(out), {"dtype": out.dtype})
    guard(data)
    return data


def _refuse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    deferred = next(t for t in _flat(args, kwargs) if isinstance(t, Guarded))
    raise misuse(deferred, f"used in {getattr(func, '__name__', func)}")


def _show(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    tensor = args[0]
    return f"Deferred {type(tensor)._bare.__name__}, size={tuple(tensor.shape)}, dtype={tensor.dtype}"


def _flat(args: Iterable[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _flat(value, {})
    return found


_T = torch.Tensor
_REFUSALS_OF_META = (RuntimeError, BufferError)
_HARMLESS = {
    "_has_compatible_shallow_copy_type",
    "requires_grad_",
    "retain_grad",
    "_backward_hooks",
    "__set__",
    "__hash__",
    "untyped_storage",
}
_READS = {_T.item, _T.tolist, _T.numpy, _T.__array__, _T.__bool__, _T.__int__, _T.__float__, _T.__complex__}
_READS |= {_T.__index__, _T.cpu, _T.cuda}
_HANDLERS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    _T.data.__get__: _get_data,  # type: ignore[attr-defined]
    _T.detach: _detach,
    _T.view: _get_data,
    _T.device.__get__: _get_device,
    _T.is_meta.__get__: _get_is_meta,  # type: ignore[attr-defined]
    _T.copy_: _load,
    torch.empty_like: _empty_like,
    _T.data.__set__: _set_data,  # type: ignore[attr-defined]
    _T.__repr__: _show,
    _T.__format__: _show,
    _T.data_ptr: _refuse,
    _T.to: _cast,
    _T.half: _cast,
    _T.float: _cast,
    _T.double: _cast,
    _T.bfloat16: _cast,
    _T.type: _cast,
}
_HANDLERS |= dict.fromkeys(
    (*_READS, torch.equal, _T.equal, torch.allclose, _T.allclose, torch.nonzero, _T.nonzero), _refuse
)
