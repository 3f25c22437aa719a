"""DeepSpeed's ZeRO-3: parameters that were flattened, padded at the end and divided evenly among the ranks.

A partitioned parameter shows no elements. Its shape is in ``ds_shape``, this rank's elements in ``ds_tensor``, whose
memory DeepSpeed may move (into one flat buffer, to the CPU) but keeps up to date. The optimizer trains master weights
of its own and writes them to the partitions, so it has to be told when those change.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

from lightning_efficient_init.rendezvous import exchange
from lightning_efficient_init.sharding.part import Stretch

PARTITION = "ds_tensor"  # of a parameter, while it is divided
_CAST = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # by DeepSpeed, to what it computes in


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO-3 has divided ``tensor`` among the ranks."""
    return getattr(tensor, PARTITION, None) is not None


def is_engine(module: Any) -> bool:
    """Whether ``module`` is what DeepSpeed wraps around a model, without importing it for nothing."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine)


def partition_of(tensor: Any) -> Stretch:
    """What this rank holds of ``tensor``.

    Raises:
        NotImplementedError: It is on a disk.
    """
    memory = tensor.ds_tensor
    if memory.final_location is not None:
        raise NotImplementedError("a parameter that DeepSpeed has swapped out to NVMe cannot be read or written")
    start = min(memory.ds_numel * tensor.ds_zero_partition_rank, tensor.ds_numel)
    numel = min(memory.ds_numel, tensor.ds_numel - start)
    is_whole = tensor.ds_zero_partition_world_size == 1
    return Stretch(tuple(tensor.ds_shape), start, memory.detach().narrow(0, 0, numel), is_whole)


def partition(param: Any, whole: torch.Tensor, engine: Any) -> None:
    """Keep this rank's part of ``whole``, which becomes the value of ``param``, and let the rest go.

    Args:
        param: A parameter that has not been partitioned.
        whole: Its value, in any memory layout, on the device that the parameter is used on.
        engine: A ``deepspeed.zero.Init``.
    """
    fresh = torch.nn.Parameter(_in_dtype(whole, engine).contiguous(), requires_grad=param.requires_grad)
    torch._C._swap_tensor_impl(param, fresh)
    engine._convert_to_deepspeed_param(param)
    param.partition()
    kept = partition_of(param).memory.numel()
    param.ds_tensor[kept:].zero_()


def partition_real(params: Iterable[Any], engine: Any) -> None:
    """Keep this rank's part of parameters that have values: those of rank 0, which DeepSpeed broadcasts.

    All ranks come here.

    Args:
        params: Parameters, of which those that have been partitioned stay as they are.
        engine: A ``deepspeed.zero.Init``.
    """
    real = [param for param in params if not is_partitioned(param)]
    for param in real:
        param.data = _in_dtype(param.data, engine)  # `deepspeed.initialize` casts what has not been partitioned
    exchange()
    engine._convert_to_zero_parameters(real)


def _in_dtype(value: torch.Tensor, engine: Any) -> torch.Tensor:
    """In the dtype that DeepSpeed computes in, if it is a float of a kind that it casts."""
    return value.to(engine.dtype) if value.dtype in _CAST else value


def refresh_engine(engine: Any) -> None:
    """After a model was written that an engine of stage 1 or 2 leaves whole: let its optimizer start from that.

    It trains a master copy, also in float32, and overwrites the model's parameters with it at each step.
    """
    refresh_masters = getattr(engine.optimizer, "refresh_fp32_params", None)
    if refresh_masters is not None and not any(map(is_partitioned, engine.parameters())):
        refresh_masters()


def refresh(params: Iterable[Any]) -> None:
    """After partitions were written: drop copies that were gathered from them, let optimizers start from them."""
    optimizers: dict[int, Any] = {}
    for param in params:
        if not is_partitioned(param):
            continue
        if param.numel() and param.ds_status.name == "AVAILABLE":
            param.partition(has_been_updated=False)
        optimizer = getattr(param, "_z3_optimizer", None)
        optimizers[id(optimizer)] = optimizer
    for optimizer in optimizers.values():
        if optimizer is not None:
            optimizer.refresh_fp32_params()
