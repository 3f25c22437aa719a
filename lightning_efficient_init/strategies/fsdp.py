"""What Fabric's and the Trainer's FSDP strategies share: wrapping deferred modules, and precision.

FSDP wants a unit's parameters whole, flattens them and keeps its shard. It asks for them module by module through its
hook for parameters on the meta device, so at any time one unit is whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, get_args

import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Module

from lightning_efficient_init.deferred import fill_own, keep_recipes
from lightning_efficient_init.deferred.sharded import windows
from lightning_efficient_init.load.postponed import has_waiting
from lightning_efficient_init.patching import ScopedPatch, patching
from lightning_efficient_init.precision import EfficientInit, PrecisionName, cast_module
from lightning_efficient_init.sharding import mark_parts
from lightning_efficient_init.strategies.fsdp2 import repeated_blocks
from lightning_efficient_init.strategies.sharded import ShardsModules

_ROOT = "_efficient_init_root"
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


class WrapsModules(ShardsModules):
    """A strategy that has FSDP wrap deferred modules.

    Attributes:
        precision_class: What `EfficientInit` becomes, since FSDP has to do its work.
    """

    precision_class: Callable[..., Any]
    cpu_offload: Any
    mixed_precision_config: Any
    sharding_strategy: Any
    _activation_checkpointing_kwargs: dict[str, Any]

    def adapt_precision(self, plugin: Any) -> Any:
        """`EfficientInit` in the form that FSDP needs, which must not quantize; others as they are."""
        if not isinstance(plugin, EfficientInit):
            return plugin
        return self.precision_class(super().adapt_precision(plugin).precision, lambda: self.root_device.type)

    def wrap(self, module: Module, options: dict[str, Any]) -> Module:
        """Wrap a module as the strategy was told to; ``options`` are the user's for ``FullyShardedDataParallel``."""
        own = {
            "cpu_offload": self.cpu_offload,
            "mixed_precision": self.mixed_precision_config,
            "sharding_strategy": self.sharding_strategy,
        }
        wrapped = wrap(module, self.root_device, {**own, **options})
        _setup_activation_checkpointing(wrapped, self._activation_checkpointing_kwargs)
        return wrapped


def wrap(module: Module, device: torch.device, options: dict[str, Any]) -> Module:
    """Wrap a module, deferred or not, by FSDP; a deferred one's parameters get memory one unit after the other.

    Args:
        module: The module.
        device: This rank's device.
        options: Arguments for ``FullyShardedDataParallel``. Without an ``auto_wrap_policy`` the repeated blocks become
            units, and the rest is one. A ``param_init_fn`` of the user's takes the place of recipes.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415 (slow to import)

    refs = windows(module)
    left: list[torch.Tensor] = []
    is_empty, can_wait = has_waiting(module), bool(options.get("use_orig_params"))

    def fill(submodule: Module) -> None:
        left.extend(fill_own(submodule, device, is_empty=is_empty, can_wait=can_wait))

    blocks = {id(block) for block in repeated_blocks(module)}
    options = {"param_init_fn": fill, "auto_wrap_policy": partial(_is_block, blocks), **options}
    with warnings.catch_warnings(), _letting_go()():
        if _is_one_part(options, device):
            options = _unsharded(options)
            warnings.filterwarnings("ignore", "The `NO_SHARD`", FutureWarning)  # advice to whom has not asked for it
        wrapped = FullyShardedDataParallel(module, device_id=device, **options)
    mark_parts(wrapped)
    keep_recipes(wrapped, refs, device, left)
    return wrapped


@cache
def _letting_go() -> ScopedPatch:
    """While FSDP wraps a module: a unit's own parameters are gone before it is cut.

    FSDP itself keeps them beside the flat copy until it has the shard as well: two units and a half, where two do.
    """
    from torch.distributed.fsdp._flat_param import FlatParamHandle  # noqa: PLC0415 (slow to import)

    return ScopedPatch(FlatParamHandle, "shard", _shard)


def _shard(original: Callable[[Any], None], handle: Any) -> None:
    if handle._use_orig_params:
        handle._use_unsharded_views(as_params=True)
    original(handle)


def _is_one_part(options: dict[str, Any], device: torch.device) -> bool:
    """Whether hybrid sharding is asked for, with groups of one rank each."""
    if "HYBRID" not in options["sharding_strategy"].name:
        return False
    mesh, groups = options.get("device_mesh"), options.get("process_group")
    if mesh is not None:
        return mesh.ndim == 2 and mesh.size(1) == 1  # type: ignore[no-any-return]
    if groups is not None:
        return isinstance(groups, tuple) and groups[0].size() == 1
    return torch.get_device_module(device).device_count() == 1  # type: ignore[no-any-return]


def _unsharded(options: dict[str, Any]) -> dict[str, Any]:
    """What repeats parameters without cutting them, among the ranks that would have equal parts.

    FSDP itself takes hybrid sharding in groups of one rank for a single process, and leaves gradients as they are on
    each: replicas drift apart (torch 2.6 to 2.13, https://github.com/pytorch/pytorch/issues/154888).
    """
    from torch.distributed.fsdp import ShardingStrategy  # noqa: PLC0415 (slow to import)

    mesh, groups = options.get("device_mesh"), options.get("process_group")
    copies = mesh.get_group(0) if mesh is not None else groups and groups[1]
    given = {name: value for name, value in options.items() if name != "device_mesh"}
    return {**given, "process_group": copies, "sharding_strategy": ShardingStrategy.NO_SHARD}


def is_wrapped(module: Module) -> bool:
    """Whether somebody has wrapped the module, or a part of it, already."""
    return any("_fsdp_wrapped_module" in child._modules for child in module.modules())


@dataclass(frozen=True, slots=True, eq=False)
class _Root:
    """The unit around a module, which has the parameters that are in none of those below."""

    unit: Module

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # around a copy or a pickle of the module there is none


def keep_root(root: Module) -> None:
    """Let the module inside ``root`` know it, and keep it: for whoever is given no more than the module later on."""
    if (module := root._modules.get("_fsdp_wrapped_module")) is not None:
        vars(module)[_ROOT] = _Root(root)


def root_of(module: Module) -> Module | None:
    """The unit around ``module``, if `keep_root` was told of it."""
    root: _Root | None = vars(module).get(_ROOT)
    return None if root is None else root.unit


def _is_block(blocks: set[int], module: Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """An ``auto_wrap_policy``."""
    return recurse or id(module) in blocks


@contextmanager
def making_mesh(options: dict[str, Any], device_type: Callable[[], str]) -> Iterator[None]:
    """While processes are started: make the mesh of whose sizes ``options`` have a tuple for devices of this type.

    Lightning's own strategies make it for CUDA, whichever accelerator they run on (2.5 and 2.6).
    """
    sizes = options.get("device_mesh")
    if not isinstance(sizes, tuple):
        yield
        return
    options["device_mesh"] = None
    try:
        yield
        sizes = init_device_mesh(device_type(), sizes)
    finally:
        options["device_mesh"] = sizes


def gathering() -> AbstractContextManager[None]:
    """Let FSDP gather full state dicts on a CPU as well.

    What is on the CPU already, its copy to the CPU shares: unsharded parameters, which FSDP then frees, and the buffer
    in which it gathers one state of the optimizer after the other (torch 2.6 to 2.13).
    """
    return patching(_cpu_patches())


@cache
def _cpu_patches() -> tuple[ScopedPatch, ...]:
    from torch.distributed.fsdp import _optim_utils  # noqa: PLC0415 (slow to import)
    from torch.distributed.fsdp._flat_param import FlatParamHandle  # noqa: PLC0415

    return (
        ScopedPatch(FlatParamHandle, "to_cpu", _to_cpu),
        ScopedPatch(_optim_utils, "_unflatten_orig_param_states", _unflatten),
    )


def _to_cpu(original: Callable[[Any], AbstractContextManager[None]], handle: Any) -> AbstractContextManager[None]:
    return nullcontext() if handle.flat_param.device.type == "cpu" else original(handle)


def _unflatten(
    original: Callable[..., None],
    info: Any,
    states: Any,
    name: str,
    shard_state: bool,
    to_save: bool,
    cpu_offload: bool,
) -> None:
    is_on_cpu = info.handle.flat_param.device.type == "cpu"
    original(info, states, name, shard_state, to_save, cpu_offload and not is_on_cpu)


class KeepsDeclaredDtypes:
    """`EfficientInit` as FSDP has it: FSDP itself casts for computing, and shards what is in the plugin's dtype.

    To be mixed into Lightning's ``FSDPPrecision``, before it.

    Args:
        precision: As for `EfficientInit`.
        device_type: Says where autocast is to work, once that is known.
    """

    def __init__(self, precision: str, device_type: Callable[[], str]) -> None:
        if precision not in get_args(PrecisionName):
            raise ValueError(f"precision must be one of {', '.join(get_args(PrecisionName))}; found {precision!r}.")
        super().__init__("32-true" if precision == "64-true" else precision)  # type: ignore[call-arg]
        self.precision: Any = precision
        self._computes_in = _DTYPES[precision.split("-", maxsplit=1)[0]]
        self._desired_input_dtype = torch.float32 if precision.endswith("mixed") else self._computes_in
        self._device_type = device_type

    def convert_module(self, module: Module) -> Module:
        """Cast parameters, and buffers that have no dtype of their own."""
        if self.precision.endswith("true") and self.precision != "32-true":
            cast_module(module, self._desired_input_dtype)
        return module

    @property
    def mixed_precision_config(self) -> Any:
        """What FSDP casts for computing: parameters and gradients; buffers keep their dtype."""
        from torch.distributed.fsdp import MixedPrecision  # noqa: PLC0415 (slow to import)

        return MixedPrecision(param_dtype=self._computes_in, reduce_dtype=self._computes_in)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Tensors are created in the dtype that is sharded, which Lightning 2.5 takes for the one that computes."""
        return _DtypeContextManager(self._desired_input_dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """See ``tensor_init_context``."""
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast on the device that there is."""
        if self.precision.endswith("mixed"):
            return torch.autocast(self._device_type(), dtype=self._computes_in)
        return _DtypeContextManager(self._desired_input_dtype)
