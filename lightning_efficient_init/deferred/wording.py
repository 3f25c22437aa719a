"""How an error of deferred construction reads: which parameter or module, which operation, why, what to do next."""

from __future__ import annotations

import sys
from itertools import pairwise

import torch

from lightning_efficient_init.deferred.recipe import Recipe, recipe_of
from lightning_efficient_init.errors import DeferredParameterError, UnrecordableError


def refusal(operation: str, reason: str) -> UnrecordableError:
    """The error for what cannot be recorded."""
    return UnrecordableError(
        f"{_path_being_built()}: {operation} cannot be recorded: {reason}. "
        "Build this part for real with `with lightning_efficient_init.eager(): ...`."
    )


def misuse(tensor: torch.Tensor, what: str) -> DeferredParameterError:
    """The error for a use that needs values."""
    return DeferredParameterError(
        f"{_describe(tensor)} is deferred: it has no memory yet and cannot be {what}. "
        "Call `materialize(model)` to initialize it, or load a checkpoint into the model, before."
    )


def empty_misuse(tensor: torch.Tensor, recipe: Recipe) -> DeferredParameterError:
    """The error for pickling memory that nobody has written: what reads the pickle could not tell."""
    return DeferredParameterError(
        f"{_name(tensor, recipe)} is empty: nobody has written it, at least not all of it, and it cannot be saved or "
        "pickled. Load a checkpoint into the model, or call `materialize(model)` to initialize it, before."
    )


def no_memory(tensor: torch.Tensor, data: torch.Tensor) -> DeferredParameterError:
    """The error for ``p.data = x`` where ``x`` has no memory that a parameter could show."""
    return DeferredParameterError(
        f"{_describe(tensor)}: expected memory for .data, found a {type(data).__name__}, which has none of its own, as "
        "a tensor of a checkpoint is not read before it is used. Set it to a copy, p.data = x.clone(), or make a "
        "parameter of it."
    )


def _describe(tensor: torch.Tensor) -> str:
    return _name(tensor, recipe_of(tensor))


def _name(tensor: torch.Tensor, recipe: Recipe | None) -> str:
    if recipe is None or recipe.label is None:
        return "A tensor"
    return f"The parameter {recipe.label!r} of shape {tuple(tensor.shape)}"


def _path_being_built() -> str:
    """The modules whose construction is under way, from the outermost in: ``Net.layers.3 > Linear``."""
    modules: list[torch.nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None  # ``self``, however it is called
        if isinstance(owner, torch.nn.Module) and (not modules or modules[-1] is not owner):
            modules.append(owner)
        frame = frame.f_back  # type: ignore[assignment]
    modules.reverse()
    names = [type(module).__name__ for module in modules[:1]]
    for parent, child in pairwise(modules):
        name = next((n for n, m in parent.__dict__.get("_modules", {}).items() if m is child), None)
        names.append(f".{name}" if name is not None else f" > {type(child).__name__}")
    return "".join(names) or "outside of any module"
