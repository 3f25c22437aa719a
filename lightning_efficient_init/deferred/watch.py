"""The look at a model when it is first used: what nobody has written by then is initialized, and named."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch

from lightning_efficient_init.deferred import audit, kept
from lightning_efficient_init.deferred.materialize import fill_empty, initialize
from lightning_efficient_init.deferred.reach import named_parameters
from lightning_efficient_init.errors import shorten

_MOST_NAMES = 10
_lock = threading.RLock()


class UninitializedParameterWarning(UserWarning):
    """Parameters that nothing had written were initialized by their recipes at first use."""


def watch(model: torch.nn.Module) -> None:
    """At first use (a forward, or saving) initialize what nobody has written by then, with one warning.

    The hooks remove themselves. Loading between now and the first use is normal, and silent. A model in which every
    parameter has been written for sure is left alone. A deep copy is watched on its own account; but what is still
    empty in it when the model is initialized gets the same values.
    """
    if not audit.is_pending(model):
        return
    hook = _Watch(model)
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # has no hooks, and has had values since it was scripted
            continue
        module.register_forward_pre_hook(hook, prepend=True)  # before FSDP's
        handle = module.register_state_dict_pre_hook(hook)
        module._state_dict_pre_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]  # before FSDP's


def look(model: torch.nn.Module) -> None:
    """Take the first use of a watched model to be now, where nobody else may run its hooks."""
    for hook in [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _Watch)]:
        hook(model)


class _Watch:
    """The hook of all modules of a watched model.

    Args:
        root: The model; None, where only a part of a watched model was copied, for whichever module is used.
    """

    def __init__(self, root: torch.nn.Module | None = None) -> None:
        self._root = root
        self._is_done = False

    def __call__(self, module: torch.nn.Module, *_: Any) -> None:
        if self._is_done:
            return
        if torch.compiler.is_compiling():  # hooks are traced
            self._look_untraced(module)
        else:
            self._look(module)

    @torch._disable_dynamo  # type: ignore[attr-defined]  # the public name for this imports all of torch._dynamo
    def _look_untraced(self, module: torch.nn.Module) -> None:
        self._look(module)

    def _look(self, module: torch.nn.Module) -> None:
        root = module if self._root is None else self._root
        with _lock:
            if self._is_done:
                return  # another thread has looked meanwhile
            own, is_lent = _own_parameters(root)
            if is_lent and not own:
                return
            whole, part = ([name for name in names if name in own] for names in audit.unwritten(root))
            audit.check_recipes(root, whole)
            _initialize(root, whole)
            if not is_lent:
                self._is_done = self._root is not None
                self._remove(root, module)
        _warn(whole, part)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        if id(self) not in memo:
            memo[id(self)] = made = _Watch(memo.get(id(self._root)))
            made._is_done = self._is_done
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce__(self) -> Any:
        return _Watch, ()  # without the model, of which perhaps a part is pickled

    def _remove(self, root: torch.nn.Module, used: torch.nn.Module) -> None:
        for module in root.modules():
            _drop(module._forward_pre_hooks, self)
            hooks = module._state_dict_pre_hooks
            # torch iterates over the hooks of the module that is being saved: one in the middle stays, and does nothing
            if module is not used or (hooks and hooks[next(reversed(hooks))] is self):
                _drop(hooks, self)


def _drop(hooks: dict[int, Any], hook: _Watch) -> None:
    for key in [key for key, value in hooks.items() if value is hook]:
        del hooks[key]


def _own_parameters(model: torch.nn.Module) -> tuple[set[str], bool]:
    """Names of the model's parameters, and whether other tensors stand in for some, as in `functional_call`."""
    named = dict(named_parameters(model))
    own = {name for name, tensor in named.items() if isinstance(tensor, torch.nn.Parameter)}
    return own, len(own) < len(named)


def _initialize(model: torch.nn.Module, names: list[str]) -> None:
    """Initialize what nobody has written."""
    params = [param for _, param in named_parameters(model)]
    copies = audit.empty_copies(params)
    initialize(model, names)
    fill_empty(copies)
    for param in params:
        kept.forget(param)


def _warn(whole: list[str], part: list[str]) -> None:
    """Tell of parameters that were initialized, and of those that somebody has written in part."""
    messages = []
    if whole:
        messages.append(
            f"{len(whole)} parameters had not been written by a checkpoint or by you at first use, as far as their "
            f"memory shows, and were initialized as their modules do it: {shorten(whole, _MOST_NAMES)}."
        )
    if part:
        messages.append(
            f"{len(part)} parameters have been written in part only, or are parts of what nobody had written, and the "
            f"rest of their memory has undefined values: {shorten(part, _MOST_NAMES)}. Write all of it, or call "
            "`materialize(model)` before you write, or before you take parts."
        )
    if messages:
        warnings.warn(" ".join(messages), UninitializedParameterWarning, stacklevel=4)
