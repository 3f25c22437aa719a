"""Which model a name on the command line stands for."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.nn import Module

from lightning_efficient_init.bench.llama import SIZES, build
from lightning_efficient_init.errors import EfficientInitError, UsageError


def constructor_of(name: str, arguments: Sequence[Any] | Mapping[str, Any] = ()) -> Callable[[], Module]:
    """What builds the model that ``name`` stands for; nothing is built yet.

    Args:
        name: ``"tiny"``, ``"1B"``, ``"7B"`` or another size of the benchmark's LLaMA; ``"many"`` or ``"1000x10000"``
            (tensors x elements); ``"package.module:callable"``; the name of a litgpt configuration; a Hugging Face
            folder with a ``config.json``, or a model's name on the hub (of which the configuration is downloaded).
        arguments: What ``callable`` is called with: positional, or by keyword.

    Raises:
        UsageError: The name stands for nothing, or what it needs is not installed.
    """
    if name in SIZES or name == "many" or re.fullmatch(r"\d+x\d+", name):
        return partial(build, name)
    if ":" in name:
        return partial(_called, name, callable_at(name, "model"), arguments)
    if is_hugging_face(name):
        return _of_hugging_face(name)
    return _of_litgpt(name)


def is_hugging_face(name: str) -> bool:
    """Whether the name is that of a Hugging Face folder, or of a model on the hub."""
    return os.path.isdir(name) or ("/" in name and ":" not in name)


def callable_at(name: str, asked_as: str) -> Callable[..., Any]:
    """What ``"package.module:callable"`` stands for; the current folder is looked at, too.

    Args:
        name: The name.
        asked_as: What the name was given as, for errors: "model", or an option of the command line.

    Raises:
        UsageError: It cannot be imported, or not be called.
    """
    module, _, attributes = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # an installed script does not see the current folder
    expected = f"{asked_as} {name!r}: expected MODULE:CALLABLE that can be imported"
    try:
        target: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            target = getattr(target, attribute)
    except (Exception, SystemExit) as error:  # other people's code, which may raise anything
        raise UsageError(f"{expected}; {type(error).__name__}: {error}.") from error
    if not callable(target):
        raise UsageError(f"{expected} and called, found {type(target).__name__}.")
    return target  # type: ignore[no-any-return]


def _called(name: str, target: Callable[..., Any], arguments: Sequence[Any] | Mapping[str, Any]) -> Module:
    """The model that ``target`` builds."""
    try:
        model = target(**arguments) if isinstance(arguments, Mapping) else target(*arguments)
    except EfficientInitError:
        raise
    except (Exception, SystemExit) as error:  # other people's code, which may raise anything
        raise _no_model(name, f"{type(error).__name__}: {error}") from error
    if not isinstance(model, Module):
        raise _no_model(name, type(model).__name__)
    return model


def _no_model(name: str, found: str) -> UsageError:
    return UsageError(
        f"model {name!r}: expected a torch.nn.Module from calling it, found {found}. Check it and its arguments."
    )


def _of_hugging_face(name: str) -> Callable[[], Module]:
    _require("transformers", name)
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name!r}: expected a configuration of transformers; {error}") from error
    config.dtype = None  # the precision decides, not what the model was saved in
    return partial(AutoModelForCausalLM.from_config, config)


def _of_litgpt(name: str) -> Callable[[], Module]:
    choices = f"expected {', '.join(SIZES)}, many, TENSORSxELEMENTS, MODULE:CALLABLE, or a Hugging Face folder"
    _require("litgpt", name, f"{choices}. ")
    from litgpt import GPT, Config  # noqa: PLC0415
    from litgpt.config import name_to_config  # noqa: PLC0415

    if name not in name_to_config:
        raise UsageError(f"model {name!r}: {choices}, or the name of a litgpt configuration.")
    return partial(GPT, Config.from_name(name))


def _require(package: str, name: str, reason: str = "") -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"model {name!r}: {reason}Other names need {package}: pip install {package}.")
