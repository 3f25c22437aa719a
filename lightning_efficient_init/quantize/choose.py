"""Which modules of a model are quantized.

Those that multiply by a weight as ``torch.nn.Linear`` does, by Linear's own forward, whatever class and library they
are from; and the Conv1D of transformers. Left alone, with a line in the debug log, is what would break or change its
meaning: a weight that somebody else shares (an output head tied to an embedding), one that the parent module reads
by itself (``MultiheadAttention.out_proj``), and what peft has put beside a layer, to be trained.
"""

from __future__ import annotations

import dis
import inspect
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from lightning_efficient_init.quantize.layers import QuantizedLayer

log = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OWN_LOADING = ("_load_from_state_dict", "_save_to_state_dict", "_apply")
_HARMLESS = frozenset({"device", "requires_grad"})  # what may be asked of a quantized weight


def choose(roots: Iterable[Module], skip: Sequence[str] = ()) -> list[Module]:
    """Modules under ``roots`` that are to be quantized, each once.

    Args:
        roots: Whole models; paths start here.
        skip: Patterns of paths to leave alone, with everything below; see `matches`.
    """
    chosen: dict[Module, str] = {}
    for root in roots:
        tree = list(root.named_modules(remove_duplicate=False))
        shared = _shared_memory(root)
        left = {module for path, module in tree if any(matches(path, pattern) for pattern in skip)}
        read = {module: reader for path, parent in tree for reader, module in _read_by(path, parent)}
        added = {module for _, parent in tree for child in _added_by_peft(parent) for module in child.modules()}
        for path, module in tree:
            if not is_linear(module) or isinstance(module, QuantizedLayer) or module in chosen:
                continue
            if module in left:
                reason = "skip_modules names it"
            elif shared[_memory(module.weight)] > 1:
                reason = "something else shares its weight"
            elif module in added:
                reason = "peft has added it, to be trained"
            elif module in read:
                reason = f"{read[module]} reads its weight directly"
            else:
                chosen[module] = path
                continue
            log.debug("%s is not quantized: %s.", path or type(module).__name__, reason)
    return list(chosen)


def matches(path: str, pattern: str) -> bool:
    """Whether ``pattern`` names the module at ``path``, or one that it is in, segment by segment.

    Example:
        >>> matches("net.1.fc", "net.1"), matches("net.10", "net.1"), matches("h.3.attn", "h.*.attn")
        (True, False, True)
    """
    names, globs = path.split("."), pattern.split(".")
    return len(names) >= len(globs) and all(map(fnmatchcase, names, globs))


def is_linear(module: Module) -> bool:
    """Whether a module computes ``x @ weight.T + bias``, or as transformers' Conv1D ``x @ weight + bias``."""
    weight = module._parameters.get("weight")
    if weight is None or torch.nn.parameter.is_lazy(weight) or "forward" in vars(module):
        return False
    with torch._C.DisableTorchFunction():
        is_matrix = weight.dim() == 2 and weight.numel() > 0 and weight.dtype in _DTYPES
    return is_matrix and (_is_plain_linear(_class(module)) or is_conv1d(module))


def is_conv1d(module: Module) -> bool:
    """Whether it is transformers' Conv1D, whose weight is (input features, output features)."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module) is library.Conv1D


def _is_plain_linear(cls: Any) -> bool:
    """A subclass of Linear that loads, saves or moves its weight by code of its own is left to itself."""
    if not issubclass(cls, nn.Linear) or cls.forward is not nn.Linear.forward:
        return False
    return all(getattr(cls, name) is getattr(nn.Linear, name) for name in _OWN_LOADING)


def _class(module: Module) -> Any:
    return type(module)


def _memory(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


def _shared_memory(root: Module) -> dict[int, int]:
    """How many different places, of parameters and buffers of the tree, show each memory."""
    counts: dict[int, int] = {}
    for module in root.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and not torch.nn.parameter.is_lazy(tensor):
                counts[_memory(tensor)] = counts.get(_memory(tensor), 0) + 1
    return counts


def _added_by_peft(parent: Module) -> Iterator[Module]:
    """What ``parent`` has beside the layer or the module that it adapts, if it is peft's."""
    tuners, wrappers = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is not None and isinstance(parent, tuners.BaseTunerLayer):
        given = "base_layer"
    elif wrappers is not None and isinstance(parent, wrappers.ModulesToSaveWrapper):
        given = "original_module"
    else:
        return
    yield from (child for name, child in parent.named_children() if name != given)


def _read_by(path: str, parent: Module) -> Iterator[tuple[str, Module]]:
    """Children of ``parent`` whose weight its forward reads, each with a word for the parent."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        return  # it reads them on its fast path, which it does not take if they are of a class of their own
    cls = _class(parent)
    for name in _weights_read(cls, cls.forward):
        child = parent._modules.get(name)
        if child is not None:
            yield f"{path or 'the model'} ({type(parent).__name__})", child


@cache
def _weights_read(cls: Any, forward: Any) -> frozenset[str]:
    """Names of attributes whose ``.weight`` is read in ``forward``, which may be replaced, or in what it may call."""
    methods = _methods(cls)
    waiting, seen, read = ["forward"], set(), set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in methods:
            continue
        seen.add(name)
        for code in _codes(methods[name]):
            waiting += code.co_names
            read |= _weights_read_in(code)
    return frozenset(read)


def _methods(cls: type[Module]) -> dict[str, CodeType]:
    found: dict[str, CodeType] = {}
    for base in cls.__mro__[: cls.__mro__.index(Module)] if Module in cls.__mro__ else ():
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if isinstance(code, CodeType):
                found.setdefault(name, code)
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _weights_read_in(code: CodeType) -> set[str]:
    """Names ``x`` in ``self.x.weight``, unless all that is asked of it is harmless."""
    if "weight" not in code.co_names:
        return set()
    steps: list[Any] = [step for step in dis.get_instructions(code) if step.opname not in {"CACHE", "NOP"}]
    return {
        child.argval
        for child, weight, after in zip(steps, steps[1:], [*steps[2:], None], strict=False)
        if "ATTR" in child.opname
        and weight.opname == "LOAD_ATTR"
        and weight.argval == "weight"
        and not (after is not None and after.opname == "LOAD_ATTR" and after.argval in _HARMLESS)
    }
