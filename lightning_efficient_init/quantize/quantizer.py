"""Quantizes models while they are built: replaces layers when the recording ends, before their weights get memory."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lightning_efficient_init.deferred import empty_init, is_deferred, layerwise_init, recording
from lightning_efficient_init.deferred.active import current
from lightning_efficient_init.deferred.recipe import recipe_of
from lightning_efficient_init.errors import QuantizationError, shorten
from lightning_efficient_init.quantize.choose import choose, is_conv1d, matches
from lightning_efficient_init.quantize.layers import QuantizedLayer
from lightning_efficient_init.quantize.modes import MODES, is_4bit


class Quantizer:
    """Quantizes the Linear layers of models in one way.

    Args:
        mode: One of `MODES`.
        skip: Patterns of module paths to leave alone, see `choose.matches`.
        compute_dtype: What 4-bit layers multiply in.

    Raises:
        ValueError: There is no such mode.
        ModuleNotFoundError: bitsandbytes is not installed.
    """

    def __init__(self, mode: str, skip: Sequence[str], compute_dtype: torch.dtype) -> None:
        if mode not in MODES:
            raise ValueError(f"quantize must be one of {', '.join(MODES)}, or None; found {mode!r}.")
        self.mode = mode
        self.skip = tuple(skip)
        self._found: set[str] = set()  # patterns that named a module when a model was built, whatever wraps it later
        self.compute_dtype = compute_dtype
        _library()

    @contextmanager
    def building(self, *, empty: bool) -> Iterator[None]:
        """Construct models here: their layers come out quantized, and no weight exists whole for more than a moment.

        Args:
            empty: Whether parameters get memory without values, for who loads a checkpoint next.
        """
        with empty_init() if empty else layerwise_init(), recording() as recorder:
            built = _Built()
            recorder.at_end.append(lambda model: self._replace_built(built, model))
            with built.watching():
                yield

    def convert(self, model: Module) -> None:
        """Replace the layers of a complete model. Weights that have values are quantized when the model is moved.

        A model that has quantized layers was built under ``init_module``; what was added to it since (adapters, a new
        head) stays as it is.

        Raises:
            QuantizationError: A pattern of ``skip`` names nothing, or there is nothing to quantize.
        """
        if not any(isinstance(module, QuantizedLayer) for module in model.modules()):
            self._replace(choose([model], self.skip))
            self._tell_peft([model])
        layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLayer)}
        self._check_skipped(model, layers)
        if not layers:
            raise nothing_to_quantize(model, self.mode)
        for layer in layers.values():
            if layer.weight.device.type != "cpu":
                layer.quantize()  # one that is on the CPU waits: the model is about to be moved

    def _check_skipped(self, model: Module, layers: dict[str, QuantizedLayer]) -> None:
        check_names(model, [pattern for pattern in self.skip if pattern not in self._found])
        for pattern in self.skip:
            if found := [path for path in layers if matches(path, pattern)]:
                raise QuantizationError(
                    f"skip_modules: {pattern!r} names {shorten(found)}, which was built and quantized as a part, under "
                    "another path. Build the whole model inside one init_module()."
                )

    def _replace_built(self, built: _Built, model: Module | None) -> None:
        modules, inside = built.modules(), None if model is None else set(model.modules())
        roots = built.roots(modules if model is None else [model])
        paths = [path for root in roots for path, _ in root.named_modules(remove_duplicate=False)]
        self._found |= {pattern for pattern in self.skip if any(matches(path, pattern) for path in paths)}
        chosen = [
            layer
            for layer in choose(roots, self.skip)
            if (inside is None or layer in inside) and (layer in modules or is_deferred(layer))
        ]
        self._replace(chosen)
        self._tell_peft(roots)
        for layer in chosen:
            if isinstance(layer, QuantizedLayer):
                layer.quantize()  # what has values already: it was loaded, or built for real

    def _replace(self, chosen: Iterable[Module]) -> None:
        replace = _library().replace
        for module in chosen:
            layer = replace(module, self.mode, self.compute_dtype, is_transposed=is_conv1d(module))
            if layer.packing is not None:
                weight: Tensor = layer._parameters["weight"]
                if (recipe := recipe_of(weight)) is not None and is_deferred(weight):
                    recipe.form = layer.packing
                else:
                    layer.is_waiting = True

    def _tell_peft(self, roots: Iterable[Module]) -> None:
        """Peft asks the model that it is given, whichever part of a larger one that is, for what its layers are."""
        if self.mode != "int8-training":
            flag = "is_loaded_in_4bit" if is_4bit(self.mode) else "is_loaded_in_8bit"
            for root in roots:
                for module in _above_quantized(root):
                    setattr(module, flag, True)


def _above_quantized(root: Module) -> set[Module]:
    """Modules that have a quantized layer somewhere below them."""
    found: set[Module] = set()
    for path, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            while path:
                path = path.rpartition(".")[0]  # noqa: PLW2901 (on the way up)
                found.add(root.get_submodule(path))
    return found


def _library() -> Any:
    """The one way to the modules that import bitsandbytes."""
    try:
        return importlib.import_module("lightning_efficient_init.quantize.linear")
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        raise ModuleNotFoundError(
            "Quantization needs bitsandbytes: pip install 'lightning_efficient_init[bitsandbytes]'.", name=error.name
        ) from None


class _Built:
    """The modules that are built in a context, and what they are parts of."""

    def __init__(self) -> None:
        self._modules: weakref.WeakSet[Module] = weakref.WeakSet()
        self._parents: weakref.WeakKeyDictionary[Module, weakref.WeakSet[Module]] = weakref.WeakKeyDictionary()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take note of what this thread registers."""
        recorder = current()

        def register_parameter(module: Module, name: str, param: Tensor | None) -> None:
            if current() is recorder:
                self._modules.add(module)

        def register_module(module: Module, name: str, child: Module | None) -> None:
            if current() is recorder and child is not None:
                self._modules.add(child)  # which is new to us if it is a deep copy
                self._parents.setdefault(child, weakref.WeakSet()).add(module)

        with ExitStack() as stack:
            stack.callback(register_module_parameter_registration_hook(register_parameter).remove)
            stack.callback(register_module_module_registration_hook(register_module).remove)
            yield

    def modules(self) -> set[Module]:
        """Those that were registered, or had a parameter registered with them."""
        return set(self._modules)

    def roots(self, modules: Iterable[Module]) -> list[Module]:
        """What ``modules`` are parts of, and nothing else contains."""
        roots: dict[Module, None] = {}
        seen: set[Module] = set()
        waiting = list(modules)
        while waiting:
            module = waiting.pop()
            if module in seen:
                continue
            seen.add(module)
            parents = [p for p in self._parents.get(module, ()) if any(c is module for c in p._modules.values())]
            if parents:
                waiting += parents
            else:
                roots[module] = None
        return list(roots)


def check_choice(precision: str | None, mode: str | None, skip: Sequence[str]) -> None:
    """Raise if weights of this precision cannot be quantized so, whatever the model; None stands for its own dtypes.

    Raises:
        QuantizationError: bitsandbytes quantizes 16 and 32 bits; there is nothing to skip without quantization; and a
            path is empty.
        TypeError: ``skip`` is no sequence of strings, or one string.
    """
    if isinstance(skip, str):
        raise TypeError(f"skip_modules must be a sequence of module paths, found the string {skip!r}.")
    if not isinstance(skip, Collection) or not all(isinstance(pattern, str) for pattern in skip):
        raise TypeError(f"skip_modules must be a sequence of module paths, found {skip!r}. Paths are strings.")
    if mode is None and skip:
        raise QuantizationError('skip_modules says what is not quantized; pass quantize="nf4", say, or leave it out.')
    if "" in skip:
        raise QuantizationError(
            "skip_modules: expected paths of modules, found '', which is the whole model. Leave '' out, or quantize."
        )
    if mode is not None and precision == "64-true":
        raise QuantizationError(
            f'quantize="{mode}" needs a precision of 32 or 16 bits; found "64-true", which bitsandbytes does not '
            'quantize. Use "32-true" or "bf16-true".'
        )


def check_names(model: Module, skip: Sequence[str]) -> None:
    """Raise if a pattern of ``skip`` names nothing in ``model``.

    Raises:
        QuantizationError: It does not.
    """
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)] if skip else []
    for pattern in skip:
        if not any(matches(path, pattern) for path in paths):
            names = {path: path.rpartition(".")[2].lower() for path in paths}
            closest = get_close_matches(pattern.rpartition(".")[2].lower(), set(names.values()), n=1)
            near = [path for path, name in names.items() if name in closest]
            hint = f" Did you mean {shorten(near)}?" if near else ""
            raise QuantizationError(
                f"skip_modules: {pattern!r} names no module of {type(model).__name__}; paths start at the model "
                f"that is set up, and * stands for one segment.{hint}"
            )


def nothing_to_quantize(model: Module, mode: str) -> QuantizationError:
    """The error for a model of which no layer is quantized."""
    return QuantizationError(
        f'quantize="{mode}": {type(model).__name__} has no layer to quantize: no torch.nn.Linear '
        "(or Conv1D of transformers) that uses Linear's own forward, shares its weight with nobody and is not "
        "named by skip_modules. Leave quantize out, or see the log at level debug for what was left alone."
    )
