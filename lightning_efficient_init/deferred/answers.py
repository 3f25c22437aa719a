"""The function mode: what does not reach a kernel, and what must not reach the function modes below.

For deferred tensors it answers itself what would give them away (``p.device``, ``p.is_meta``), what is not an operation
(``p.data = x``, ``p.numpy()``), and what looks at devices before any operation runs.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import cache
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, resolve_name
from torch.utils._device import DeviceContext, _device_constructors

from lightning_efficient_init.deferred.arguments import (
    CPU,
    META,
    asks_for_meta,
    indexed,
    is_deferred,
    is_external,
    map_tensors,
    recorded_device,
    tensors_in,
    without,
)
from lightning_efficient_init.deferred.dispatch import record_empty, record_fill, values_of
from lightning_efficient_init.deferred.initializers import FILLS
from lightning_efficient_init.deferred.parameter import (
    Guarded,
    check_copy,
    check_data,
    exchange,
    undisturbed,
    write_form,
)
from lightning_efficient_init.deferred.recipe import recipe_of
from lightning_efficient_init.deferred.wording import refusal
from lightning_efficient_init.errors import EfficientInitError

if TYPE_CHECKING:
    from lightning_efficient_init.deferred.record import Recorder


_MAY_HOLD_TENSORS = (torch.Tensor, tuple, list)
_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_COMPILED = frozenset({BuiltinFunctionType, MethodDescriptorType, MethodWrapperType})
_CONSTRUCTORS = _device_constructors()


class Answers(TorchFunctionMode):
    """What does not reach a kernel, and what must not reach the function modes below."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recorder = self._recorder
        if types and not _PLAIN_TYPES.issuperset(types) and _is_to_be_asked(types):
            return self._ask(func, types, args, kwargs)
        recorder.autocast = _autocast_devices()
        outer, recorder.call = recorder.call, (args, kwargs)
        try:
            return self._answer(func, args, kwargs)
        finally:
            recorder.call = outer

    def _ask(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leave it to classes of others, which have a say as in eager construction; what they call comes here again."""
        with self:
            for kind in itertools.filterfalse(_is_ours, types):
                out = kind.__torch_function__(func, types, args, kwargs)
                if out is not NotImplemented:
                    break
            else:
                raise TypeError(f"no implementation of {_name(func)} for {', '.join(map(str, types))}")
        return _tracked(self._recorder, out)

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        answer = _ANSWERS.get(func)
        if answer is not None or "out" in kwargs:
            answer = _applicable(answer, func, args, kwargs)
            if answer is not None:
                return answer(self._recorder, func, args, kwargs)
        is_last, kwargs = _below(func, kwargs)
        if is_last and func is torch.empty and (made := record_empty(self._recorder, args, kwargs)) is not None:
            return made
        try:
            with torch._C.DisableTorchFunction() if is_last else torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **kwargs)
        except RuntimeError as error:
            if self._recorder.paused or not _lacks_memory(error, args, kwargs):
                raise
        else:
            return _tracked(self._recorder, out) if isinstance(out, _MAY_HOLD_TENSORS) else out
        with self._recorder.pausing(True):  # for want of memory, or of values; else it raises as in eager construction
            return _looks_at_devices(self._recorder, func, args, kwargs)


def _lacks_memory(error: RuntimeError, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call may have failed because tensors have none: its arguments, or what it makes along the way."""
    if isinstance(error, EfficientInitError):
        return False
    with torch._C.DisableTorchFunction():
        return "data is not allocated yet" in str(error) or any(map(is_deferred, tensors_in(args, kwargs)))


def _is_to_be_asked(types: Any) -> bool:
    """Whether there are classes of others among ``types``, and nobody has switched them off."""
    return torch._C._is_torch_function_enabled() and not all(map(_is_ours, types))


def _is_ours(kind: type) -> bool:
    """Whether this is a class of tensors that does nothing of its own about functions, or does it here."""
    if kind is torch.Tensor or issubclass(kind, Guarded):
        return True
    return kind.__torch_function__ is torch._C._disabled_torch_function_impl  # type: ignore[attr-defined]


def _applicable(answer: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``answer``, or that for ``out=``, if the call is about a deferred tensor."""
    with torch._C.DisableTorchFunction():
        target = args[0] if args else kwargs.get("tensor")
        if answer is not None and target is not None and (answer in _ON_REAL_TOO or is_deferred(target)):
            return answer
        return _into if is_deferred(kwargs.get("out")) and func in _CONSTRUCTORS else None


def _autocast_devices() -> tuple[str, ...]:
    """For which devices autocast is on; where operations reach kernels nobody can tell any more."""
    if not torch._C._is_any_autocast_enabled():
        return ()
    return tuple(device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device))


_known_modes: set[type[TorchFunctionMode]] = {DeviceContext, Answers}  # the latter of the same recording


def _below(func: Any, kwargs: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether what has no answer here may pass over all function modes below, and with which arguments.

    Functions of `torch.nn.init` do, so that no mode skips them. So do compiled functions where all that a mode does
    about them is to add a device, which is done here: that saves a twentieth of the time.
    """
    kind = type(func)
    if kind not in _COMPILED:
        return kind is FunctionType and func.__module__ == "torch.nn.init", kwargs
    device = None
    for i in reversed(range(torch._C._len_torch_function_stack())):
        mode = torch._C._get_function_stack_at(i)
        if type(mode) not in _known_modes:
            return False, kwargs
        if device is None and type(mode) is DeviceContext:
            device = mode.device
    if device is not None and kind is BuiltinFunctionType and kwargs.get("device") is None and func in _CONSTRUCTORS:
        kwargs = {**kwargs, "device": device}
    return True, kwargs


def know_mode(mode: type[TorchFunctionMode]) -> None:
    """Say that a function mode does nothing about compiled functions, so that it need not be asked about them."""
    _known_modes.add(mode)


# -- the answers


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
    with undisturbed():
        return func(*values_of(args), **kwargs)


def _looks_at_devices(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``lstm`` and its kin look at devices, or into memory, before any operation reaches a kernel: they get values."""
    deferred = [t for t in tensors_in(args, kwargs) if is_deferred(t)]
    if not deferred:
        return func(*args, **kwargs)
    running = (*(args[i] for i in _RUNNING.get(func, ()) if i < len(args)), *map(kwargs.get, _RUNNING_NAMES))
    if any(map(is_deferred, running)):
        raise refusal(func.__name__, "its running statistics are deferred; make them of `torch.zeros`")
    with undisturbed():
        values = [values_of(t) for t in deferred]
        versions = [value._version for value in values]
    by_id = {id(t): value for t, value in zip(deferred, values, strict=True)}
    args, kwargs = map_tensors(lambda t: by_id.get(id(t), t), (args, kwargs))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        out = func(*args, **kwargs)
    for tensor, value, version in zip(deferred, values, versions, strict=True):
        if value._version != version:  # written in place
            tensor.copy_(value)
            out = tensor if out is value else out
    return out


def _whole(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functions that do something else for what is not an ordinary tensor, or while a dispatch mode is active.

    They get real values, run unseen, and are written down as one operation.
    """
    _, kwargs = _below(func, kwargs)
    is_plain = func in _NORMS and (args[1] if len(args) > 1 else kwargs.get(_NORMS[func])) not in (2, -2, "nuc")
    with undisturbed():
        tensors = list(tensors_in(args, kwargs))
        has_meta = asks_for_meta(kwargs) or any(t.is_meta and recipe_of(t) is None for t in tensors)
        has_grad = any(t.requires_grad and not t.is_meta for t in tensors)  # which is to be passed on
        if not (is_plain or has_meta or has_grad or recorder.paused or kwargs.get("out") is not None):
            real_args, real_kwargs = values_of((args, kwargs))
            return recorder.tape.run_whole(func, args, kwargs, lambda: func(*real_args, **real_kwargs))
    return _as_it_is(recorder, func, args, kwargs)


def _matmul(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of two batches, one of which is broadcast, `torch.matmul` makes one matrix while a dispatch mode is active."""
    with torch._C.DisableTorchFunction():
        shapes = [tensor.shape for tensor in tensors_in(args, kwargs)]
        is_broadcast = [len(shape) for shape in shapes] == [3, 3] and shapes[0][0] != shapes[1][0]
    return (_whole if is_broadcast else _as_it_is)(recorder, func, args, kwargs)


def _tracked(recorder: Recorder, out: Any) -> Any:
    """``out``, remembered as what it is: a nested recording, or the class of a lazy parameter, would deny it."""
    with torch._C.DisableTorchFunction():
        recorder.track(out)
    return out


def _as_it_is(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        out = func(*args, **kwargs)
    return _tracked(recorder, out)


def _by_element(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``t.apply_(f)`` and ``t.map_(other, f)``, which call a Python function for each number."""
    target = args[0]
    if not _has_no_memory(target):
        recorder.expose(target)
        return func(*values_of(args), **kwargs)
    with undisturbed():
        value = func(*values_of(args), **kwargs)
    with torch.no_grad():
        return target.copy_(value)


def _chooses_by_device(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``dropout`` and others take other kernels, and random numbers, on CUDA; for meta tensors they take the CPU's."""
    recipes = [recipe_of(t) for t in tensors_in(args, kwargs) if t.is_meta]
    if all(recipe is None or recipe.device.type == "cpu" for recipe in recipes):
        return _as_it_is(recorder, func, args, kwargs)
    return _looks_at_devices(recorder, func, args, kwargs)


def _into(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.eye(n, out=t)``, to which a device context adds ``t``'s device. But ``t`` is on meta."""
    recipe = recipe_of(kwargs["out"])
    assert recipe is not None
    if kwargs.get("device") is not None and indexed(kwargs["device"]) != recipe.device:
        return func(*args, **kwargs)  # raises, as in eager construction
    with torch._C.DisableTorchFunction():
        out = func(*args, **{**kwargs, "device": META})
    return _tracked(recorder, out)


def _as_tensor(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.as_tensor(t)``, to which a device context adds ``t``'s own device, is ``t``."""
    recipe = recipe_of(args[0])
    assert recipe is not None
    contexts = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
    device = kwargs.get("device") or (contexts[-1].device if contexts else recipe.device)
    options = without(kwargs, "device") if indexed(device) == recipe.device else {**kwargs, "device": device}
    with torch._C.DisableTorchFunction():
        out = func(*args, **options)
    return _tracked(recorder, out)


def _numpy(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A NumPy view of memory that is not there: a copy which refuses to be written."""
    if not _has_no_memory(args[0]):
        recorder.expose(args[0])
        return func(*args, **kwargs)
    array = _on_values(recorder, func, args, kwargs)
    array.flags.writeable = False
    return array


def _has_no_memory(tensor: torch.Tensor) -> bool:
    """What ``tensor.is_meta`` is, also in a nested recording, where the next of these modes would deny it."""
    with torch._C.DisableTorchFunction():
        return tensor.is_meta


def _address(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _has_no_memory(args[0]):
        raise refusal(_name(func), "a deferred tensor has no memory")
    recorder.expose(args[0])
    return func(*args, **kwargs)


def _to(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``t.to(its own device)`` returns ``t``, as in eager construction; ``t.to("meta")`` something without a recipe."""
    recipe = recipe_of(args[0])
    assert recipe is not None
    options = _to_options(args[1:], kwargs)
    if asks_for_meta(options):
        options["copy"] = True
    if options.get("device") is not None and indexed(options["device"]) == recipe.device:
        del options["device"]
    with torch._C.DisableTorchFunction():
        out = args[0].to(**{"dtype": args[0].dtype, **options})
    return _tracked(recorder, out)


def _may_share_object(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """What ``module.to`` asks: whether ``p.data = x`` will do. Not if ``x`` is on the meta device for good."""
    with torch._C.DisableTorchFunction():
        return func(*args, **kwargs) and (is_deferred(args[1]) or not args[1].is_meta)


def _to_options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``Tensor.to`` by name."""
    options = {name: value for name, value in kwargs.items() if value is not None}
    flags = ["non_blocking", "copy"]
    for arg in (*args, options.pop("other", None)):
        if isinstance(arg, torch.Tensor):
            options |= {"device": recorded_device((arg,), {}), "dtype": arg.dtype}
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
    if is_deferred(args[0]) or is_deferred(other):
        return _to(recorder, func, args, kwargs)
    return func(*args, **kwargs)


def _get_item(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``t[[0, 2]]``: lists as real tensors, which else would be made (and lost) on the meta device."""
    target, index = args
    index = _real_index(index)
    with torch._C.DisableTorchFunction():
        out = func(target, index)
    return _tracked(recorder, out)


def _set_item(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``t[index] = 0``: numbers and lists as real tensors, which else would be made (and lost) on the meta device."""
    target, index, value = args
    if isinstance(value, bool | int | float | complex):
        value = torch.tensor(value, dtype=target.dtype, device=CPU)
    func(target, _real_index(index), value)


def _real_index(index: Any) -> Any:
    """An index with real tensors in the place of lists of numbers."""
    if _is_nested(index) and _are_lists_tuples():
        index = tuple(index)
    return tuple(map(_with_real_lists, index)) if isinstance(index, tuple) else _with_real_lists(index)


def _with_real_lists(index: Any) -> Any:
    if not isinstance(index, list | tuple | range) or any(True for _ in tensors_in(index)):
        return index
    try:
        numbers = torch.tensor(list(index), device=CPU)
    except (RuntimeError, TypeError, ValueError):
        return index  # whatever it is
    if not numbers.numel():
        return numbers.long()
    return index if numbers.is_floating_point() else numbers


def _is_nested(index: Any) -> bool:
    """Whether a list holds more than numbers; a long one is never looked at like that."""
    others = (slice, type(None), type(...))
    is_short = isinstance(index, list) and len(index) < 32
    return is_short and any(isinstance(item, others) or hasattr(item, "__len__") for item in index)


@cache
def _are_lists_tuples() -> bool:
    """Whether this version of torch takes ``t[[a, b]]`` with lists ``a`` and ``b`` for ``t[a, b]``."""
    with undisturbed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.zeros(2, 2)[[[0, 1], [0, 1]]].dim() == 1


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
        with undisturbed():
            check_data(target, data)
            exchange(target, data)
    _tracked(recorder, target)


def _backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunction():
        has_deferred = any(map(is_deferred, tensors_in(args, kwargs)))
    if has_deferred and args[-1] is not None:  # as what `zero_grad` sets
        raise refusal(_name(func), "gradients of deferred tensors would have no memory")
    return func(*args, **kwargs)


def _name(func: Any) -> str:
    return resolve_name(func) or f"{func.__module__}.{func.__qualname__}"


def _type(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``t.type()``, the name of a type, and ``t.type(dtype)``."""
    recipe = recipe_of(args[0])
    assert recipe is not None
    if len(args) > 1 or kwargs:
        return _tracked(recorder, func(*args, **kwargs))
    with undisturbed():
        return torch.empty(0, dtype=args[0].dtype, device=recipe.device).type()


def _copy(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Weights that come from outside: the parameter gets its memory now."""
    target, source = args[0], args[1] if len(args) > 1 else kwargs["other"]
    if is_deferred(target) and is_external(source):
        with undisturbed():
            check_copy(target, source)
            if write_form(target, source):
                return target
            recorder.bind(target, is_overwritten=True)
    out = func(*args, **kwargs)
    return _tracked(recorder, out)


def _initialize(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What comes down to one operation is written down without the way to it."""
    with torch._C.DisableTorchFunction():
        if not args and (filled := record_fill(recorder, func, kwargs)) is not None:
            return filled
        return func(*args, **kwargs)


def _deepcopy(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, memo = args
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


_T = torch.Tensor
_ANSWERS: dict[Any, Any] = {
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
    _T.share_memory_: _address,
    _T.to: _to_like,
    _T.type_as: _to_like,
    torch._has_compatible_shallow_copy_type: _may_share_object,
    _T.new: _new,
    _T.new_tensor: _new,
    _T.__getitem__: _get_item,
    _T.__setitem__: _set_item,
    _T.cpu: _to_own_device,
    _T.cuda: _to_own_device,
    _T.data.__set__: _set_data,  # type: ignore[attr-defined]
    _T.backward: _backward,
    _T.grad.__set__: _backward,  # type: ignore[union-attr]
    torch.autograd.grad: _backward,
    _T.type: _type,
    _T.copy_: _copy,
    _T.__deepcopy__: _deepcopy,
}
_ANSWERS |= dict.fromkeys(FILLS, _initialize)
_ANSWERS |= dict.fromkeys((torch.as_tensor, torch.asarray), _as_tensor)
_ANSWERS |= dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _looks_at_devices)
_ANSWERS[functional.multi_head_attention_forward] = _looks_at_devices
_ANSWERS[functional.scaled_dot_product_attention] = _looks_at_devices
_ANSWERS |= dict.fromkeys((torch.matmul, torch.linalg.matmul, _T.matmul, _T.__matmul__, _T.__rmatmul__), _matmul)
_CHOOSING: tuple[Any, ...] = (
    torch.dropout,
    torch.dropout_,
    torch.lstm_cell,
    torch.gru_cell,
    torch.batch_norm,
    torch.instance_norm,
)
_CHOOSING += (functional.dropout, functional.batch_norm, functional.instance_norm)
_CHOOSING += (torch.rms_norm, functional.rms_norm)
_ANSWERS |= dict.fromkeys(_CHOOSING, _chooses_by_device)
_SPECTRAL = ("cond", "eig", "eigvalsh", "lstsq", "matrix_norm", "matrix_rank", "multi_dot", "norm", "svdvals")
_PARTICULAR = (
    *("embedding_bag", "nanquantile", "nuclear_norm", "quantile", "take_along_dim"),
    *("quantize_per_channel", "quantize_per_tensor", "quantize_per_tensor_dynamic"),
    *("sparse_compressed_tensor", "sparse_coo_tensor", "sparse_csr_tensor", "to_sparse", "to_sparse_csr"),
)
_NORMS: dict[Any, str] = {torch.linalg.norm: "ord", torch.norm: "p", _T.norm: "p"}
_ANSWERS |= {getattr(torch.linalg, name): _whole for name in _SPECTRAL} | dict.fromkeys(_NORMS, _whole)
_ANSWERS |= {getattr(owner, n): _whole for owner in (torch, torch.Tensor) for n in _PARTICULAR if hasattr(owner, n)}
_ANSWERS |= dict.fromkeys((functional.embedding_bag, torch.fft.rfft2), _whole)
_ANSWERS |= dict.fromkeys((torch.group_norm, functional.group_norm), _whole)
_ANSWERS |= dict.fromkeys((_T.apply_, _T.map_, _T.map2_), _by_element)
_RUNNING: dict[Any, tuple[int, int]] = {torch.batch_norm: (3, 4), torch.instance_norm: (3, 4)}
_RUNNING |= {functional.batch_norm: (1, 2), functional.instance_norm: (1, 2)}
_RUNNING_NAMES = ("running_mean", "running_var")
_ON_REAL_TOO = {_looks_at_devices, _chooses_by_device, _set_data, _numpy, _address, _to_like}
_ON_REAL_TOO |= {_whole, _matmul, _by_element, _backward}
