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
from lightning_efficient_init.errors import UsageError


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
        return _of_callable(name, arguments)
    if os.path.isdir(name) or "/" in name:
        return _of_hugging_face(name)
    return _of_litgpt(name)


def _of_callable(name: str, arguments: Sequence[Any] | Mapping[str, Any]) -> Callable[[], Module]:
    module, _, attributes = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # an installed script does not see the current folder
    try:
        target: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            target = getattr(target, attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"model {name!r}: expected MODULE:CALLABLE that can be imported; {error}.") from error
    return partial(target, **arguments) if isinstance(arguments, Mapping) else partial(target, *arguments)


def _of_hugging_face(name: str) -> Callable[[], Module]:
    _require("transformers", name)
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name!r}: expected a configuration of transformers; {error}") from error
    return partial(AutoModelForCausalLM.from_config, config)


def _of_litgpt(name: str) -> Callable[[], Module]:
    choices = f"{', '.join(SIZES)}, many, TENSORSxELEMENTS, MODULE:CALLABLE, or a Hugging Face folder"
    _require("litgpt", name, f"It is none of {choices}. ")
    from litgpt import GPT, Config  # noqa: PLC0415
    from litgpt.config import name_to_config  # noqa: PLC0415

    if name not in name_to_config:
        raise UsageError(f"model {name!r}: expected {choices}, or the name of a litgpt configuration.")
    return partial(GPT, Config.from_name(name))


def _require(package: str, name: str, reason: str = "") -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"model {name!r}: {reason}Other names need {package}: pip install {package}.")
