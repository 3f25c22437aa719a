"""What Fabric's and the Trainer's DeepSpeed strategies share: ZeRO-3 partitions made from recipes, and precision.

Construction is recorded, as for every strategy that shards; so code that touches weights afterwards, ``apply(init_fn)``
for one, is recorded along with it. At setup one parameter after the other runs its recipe, is handed to
``deepspeed.zero.Init``, which keeps this rank's part, and is gone: no rank ever has more than one parameter whole.
Inside ``deepspeed.zero.Init`` as a context, which is how it is meant, modules see partitions of zero elements.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from torch.nn import Module

from lightning_efficient_init.checkpoint.deepspeed import num_ranks
from lightning_efficient_init.deferred import initialize_required, move_whole, prepare, share_buffers
from lightning_efficient_init.deferred.audit import keep
from lightning_efficient_init.deferred.materialize import materialize_deferred
from lightning_efficient_init.deferred.recipe import Ref
from lightning_efficient_init.deferred.sharded import evaluate_each
from lightning_efficient_init.load.load import run_plan
from lightning_efficient_init.load.postponed import has_waiting, take_waiting
from lightning_efficient_init.load.replicas import agreed
from lightning_efficient_init.patching import ScopedPatch, patching
from lightning_efficient_init.precision import EfficientInit, cast_module
from lightning_efficient_init.sharding import partition, partition_real
from lightning_efficient_init.strategies.sharded import ShardsModules


def make_partitions(module: Module, engine: Any, device: torch.device, *, is_empty: bool) -> Module:
    """Give a deferred module's parameters values, one at a time, of which each rank keeps its part.

    Args:
        module: The module; what is real in it is partitioned as rank 0 has it.
        engine: A ``deepspeed.zero.Init``.
        device: Where parameters are used.
        is_empty: Whether parameters are left without values, their recipes at hand.
    """
    refs = prepare(module, device)
    wanted = []
    for param, ref in _unique(refs):
        is_left = (is_empty or ref.recipe.is_optional) and not ref.recipe.is_loaded
        if is_left and ref.dtype.is_floating_point:
            partition(param, torch.empty(ref.size, dtype=ref.dtype, device=device), engine)
            keep(param, ref)
        else:
            wanted.append((ref, partial(partition, param, engine=engine)))
    evaluate_each(wanted, device)
    materialize_deferred(module, device)  # buffers and attributes that share a parameter's memory, for instance
    partition_real(module.parameters(), engine)
    move_whole(module, device)
    share_buffers(module)
    return module


def _unique(refs: dict[tuple[Module, str], Ref]) -> Iterator[tuple[Any, Ref]]:
    """Parameters, tied ones once, with their recipes."""
    seen: set[int] = set()
    for (child, name), ref in refs.items():
        param = child._parameters.get(name)
        if param is not None and id(param) not in seen:
            seen.add(id(param))
            yield param, ref


class PartitionsModules(ShardsModules):
    """A strategy that partitions deferred modules by ZeRO-3, and runs on the CPU as well.

    Attributes:
        stock: Lightning's DeepSpeed strategy, of Fabric or of the Trainer, that it is mixed into.
        precision_class: What `EfficientInit` becomes, since DeepSpeed's engine has to do its work.
    """

    stock: type
    precision_class: Callable[..., Any]
    config: Any
    remote_device: str | None
    parallel_devices: Any
    _config_initialized: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"stage": _STAGE, **kwargs})
        _check_stage(self.config)

    def adapt_precision(self, plugin: Any) -> Any:
        """`EfficientInit` in the form that DeepSpeed needs, which must not quantize; others as they are."""
        if not isinstance(plugin, EfficientInit):
            return plugin
        return self.precision_class(super().adapt_precision(plugin).precision)

    def setup_environment(self) -> None:
        """Start the processes' communication, on the CPU too."""
        if self.root_device.type == "cpu":
            use_cpu()
        super(self.stock, self).setup_environment()  # type: ignore[arg-type]  # past it: it refuses the CPU

    def make_partitions(self, module: Module) -> Module:
        """Partition a module, and read the checkpoints that were loaded into it before."""
        import deepspeed  # noqa: PLC0415 (an optional dependency, slow to import)

        engine = deepspeed.zero.Init(remote_device=self.remote_device, config_dict_or_path=self.config)
        replicas = self.replicas()
        with agreed(replicas):
            make_partitions(module, engine, self.root_device, is_empty=has_waiting(module))
            for plan, settings in take_waiting(module):
                run_plan(plan, settings, replicas=replicas)
            initialize_required(module)
        return module


def use_cpu() -> None:
    """Let DeepSpeed compute on the CPU, whatever else there is, and without compiling its own way of communicating."""
    from deepspeed.accelerator import set_accelerator  # noqa: PLC0415 (an optional dependency)
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator  # noqa: PLC0415

    class _CPU(CPU_Accelerator):  # type: ignore[misc]
        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

    set_accelerator(_CPU())


def initializing() -> AbstractContextManager[None]:
    """While Lightning calls ``deepspeed.initialize``."""
    return patching(_patches())


@cache
def _patches() -> tuple[ScopedPatch, ...]:
    import deepspeed  # noqa: PLC0415 (an optional dependency, slow to import)

    return (
        ScopedPatch(deepspeed, "initialize", _initialize),
        ScopedPatch(deepspeed.DeepSpeedEngine, "register_compile_pass", _register_compile_pass),
    )


def _initialize(original: Callable[..., Any], *, args: Any, **kwargs: Any) -> Any:
    """What it takes for the index of a GPU may be None on the CPU."""
    args.device_rank = args.device_rank or 0
    return original(args=args, **kwargs)


def _register_compile_pass(original: Callable[..., None], engine: Any, *args: Any, **kwargs: Any) -> None:
    """To register a pass imports torch's compiler, one to three seconds; only what DeepCompile builds looks for it."""
    if engine.is_deepcompile_enabled():
        original(engine, *args, **kwargs)


def _check_stage(config: dict[str, Any]) -> None:
    """Refuse the stages that leave each rank with all parameters."""
    stage = config.get("zero_optimization", {}).get("stage")
    if stage != _STAGE:
        raise ValueError(
            f"EfficientDeepSpeedStrategy partitions parameters, which is stage 3 of ZeRO; found stage {stage}. Set "
            "stage=3, or choose strategy='efficient_init_ddp', or Lightning's 'deepspeed' for the other stages."
        )


def is_resumable(path: Any, world_size: int) -> bool:
    """Whether DeepSpeed's own engine, with as many ranks, has saved ``path``: optimizer states of no other fit."""
    return os.path.isdir(path) and num_ranks(os.fspath(path)) == world_size


_STAGE = 3


class BuildsInDtype:
    """`EfficientInit` as DeepSpeed has it: its engine casts and scales, and keeps master weights in float32.

    To be mixed into Lightning's ``DeepSpeedPrecision``, before it.
    """

    precision: Any
    _desired_dtype: torch.dtype

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Tensors are created in the dtype that DeepSpeed computes in, also where it is called mixed."""
        return _DtypeContextManager(self._desired_dtype)

    def convert_module(self, module: Module) -> Module:
        """Cast parameters, and buffers that have no dtype of their own."""
        cast_module(module, self._desired_dtype)
        return module
