"""What a model will take on each device, before anything is allocated: to load it, and to train it.

How it is counted. What stays is counted tensor by tensor: parameters (quantized ones in the layout of bitsandbytes),
buffers, gradients, and the optimizer's state, which is found by letting the optimizer step on parameters of the model's
shapes with long dims cut short: a tensor of the state is taken to grow with the dims that it shares with its parameter.
What a load takes beside that follows from the pipeline: its ring on the host, and on the device one slot for each
thread that casts, and the scratch of tensors that are quantized, or cannot be filled directly. A sharded rank has its
share of all that, and beside it one block while loading; in a training step, two gathered blocks with their gradients,
and what belongs to none.

Activations are not in it: they depend on the batch. Nor are the CUDA context and what an allocator keeps in reserve.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.deferred import has_recipe
from lightning_efficient_init.errors import QuantizationError, UsageError
from lightning_efficient_init.load.keys import KeyMap
from lightning_efficient_init.load.load import BATCH_BYTES, max_batches
from lightning_efficient_init.load.pipeline import SLOTS_PER_THREAD, Settings, divide
from lightning_efficient_init.load.plan import LoadPlan, plan_load, unwrap
from lightning_efficient_init.quantize import QuantizedLayer
from lightning_efficient_init.quantize.choose import choose
from lightning_efficient_init.quantize.quantizer import check_choice, check_names, nothing_to_quantize
from lightning_efficient_init.quantize.state import weight_of
from lightning_efficient_init.sinks import sink_for
from lightning_efficient_init.sinks.bitsandbytes import PART_BYTES
from lightning_efficient_init.strategies.fsdp2 import repeated_blocks

MakeOptimizer = Callable[[list[Parameter]], Optimizer]

_DTYPES: Final = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
}
_REPLICATED: Final = ("efficient_init", "efficient_init_ddp")
_SHARDED: Final = ("efficient_init_fsdp", "efficient_init_fsdp2", "efficient_init_deepspeed_stage_3")
_OFFLOADED: Final = ("efficient_init_deepspeed_stage_3_offload",)
# These take a single device as a reason to leave parameters as they are; FSDP2 does not.
_WHOLE_ON_ONE: Final = ("efficient_init_fsdp", "efficient_init_deepspeed_stage_3")
STRATEGIES: Final = (*_REPLICATED, *_SHARDED, *_OFFLOADED)
QUANTIZATIONS: Final = ("int8", "int8-training", "nf4", "nf4-dq", "fp4", "fp4-dq")
PRECISIONS: Final = tuple(_DTYPES)

_ALLOCATION_BYTES: Final = 512  # to a multiple of which CUDA's caching allocator rounds up
# Beside the ring: kernels loaded at first use, 20 to 120 MB as the model wants them (an H100 machine with torch 2.11).
_CUDA_HOST_BYTES: Final = 64 << 20
_QUANTIZING_HOST_BYTES: Final = 64 << 20  # more of them, and bitsandbytes' own: up to 60 MB on that machine
_ENTRY_BYTES: Final = 1800  # of an index and a plan, for each tensor
_BUCKET_NUMEL: Final = 200_000_000  # ``reduce_bucket_size`` of Lightning's DeepSpeedStrategy
_MAX_DEVICES: Final = 1024
_SHORT_DIM: Final = 16  # what an optimizer is tried on keeps dims of this size: kernels of convolutions, say
_QUANTIZED_BLOCK, _NESTED_BLOCK = 64, 256  # elements that share a scale in bitsandbytes' 4-bit layout


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a model takes on each rank. All numbers are bytes.

    Attributes:
        strategy: Name of the strategy in Lightning's registries.
        num_devices: Ranks, taken to be on one node.
        precision: The precision, or None for the model's own dtypes.
        quantize: The quantization, or None.
        device_type: "cuda" or "cpu".
        bytes_read: Read from files; ranks of a node that hold the same read an even share each, and hand it on.
        device: What is on the device after loading, and in training: "parameters", "buffers", "gradients", "optimizer
            state"; and "communication", the buckets that DDP has from the moment it wraps a model, and ZeRO-3 when it
            takes over an optimizer.
        loading: What the device needs beside parameters and buffers, while loading.
        training: What the device needs beside all of ``device``, in a training step; activations not included.
        host: Growth of the host's anonymous memory while loading, at its highest. On a CPU, ``device`` is on the host,
            and not in this number.
        host_stays: What is on the host afterwards (offloaded parameters, gradients and optimizer state).
    """

    strategy: str
    num_devices: int
    precision: str | None
    quantize: str | None
    device_type: str
    bytes_read: int
    device: Mapping[str, int]
    loading: int
    training: int
    host: int
    host_stays: int = 0

    @property
    def final_bytes(self) -> int:
        """What the loaded model takes on the device."""
        return self.device["parameters"] + self.device["buffers"]

    @property
    def load_peak_bytes(self) -> int:
        """Most memory on the device while loading."""
        return self.final_bytes + self.device["communication"] + self.loading

    @property
    def device_peak_bytes(self) -> int:
        """Most memory on the device, loading and training."""
        return max(self.load_peak_bytes, sum(self.device.values()) + self.training)

    @property
    def host_peak_bytes(self) -> int:
        """Most anonymous memory on the host, the model itself included where that is its device."""
        on_host = self.device_peak_bytes if self.device_type == "cpu" else 0
        return self.host + self.host_stays + on_host

    def fits(self, device_bytes: int) -> bool:
        """Whether a device with that much free memory has room, activations not counted."""
        return (self.host_peak_bytes if self.device_type == "cpu" else self.device_peak_bytes) <= device_bytes


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of `plan_memory`; see there."""

    strategy: str = "efficient_init"
    num_devices: int = 1
    precision: str | None = None
    quantize: str | None = None
    skip_modules: Sequence[str] = ()
    optimizer: MakeOptimizer | None = None
    device_type: str = "cuda"
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("strategy", self.strategy, STRATEGIES),
            ("precision", self.precision, (None, *PRECISIONS)),
            ("quantize", self.quantize, (None, *QUANTIZATIONS)),
            ("device_type", self.device_type, ("cuda", "cpu")),
        ):
            if value not in choices:
                raise UsageError(f"{name} {value!r}: expected one of {', '.join(map(repr, choices))}.")
        check_choice(self.precision, self.quantize, self.skip_modules)
        if not isinstance(self.num_devices, int):
            raise TypeError(f"num_devices: expected an int, found {self.num_devices!r}. Pass how many there are.")
        if self.quantize is not None and self.strategy not in _REPLICATED:
            raise UsageError(
                f"quantize={self.quantize!r} does not go with {self.strategy!r}, which shards parameters. Choose "
                f"{' or '.join(map(repr, _REPLICATED))}, or leave quantize out."
            )
        if self.num_devices < 1 or (self.strategy == "efficient_init" and self.num_devices > 1):
            raise UsageError(
                f"{self.num_devices} devices: expected at least one, and exactly one for 'efficient_init'. Choose "
                "another strategy for several devices."
            )


def plan_memory(
    model: Module,
    checkpoint: LoadPlan | str | os.PathLike[str] | None = None,
    *,
    strategy: str = "efficient_init",
    num_devices: int = 1,
    precision: str | None = None,
    quantize: str | None = None,
    skip_modules: Sequence[str] = (),
    optimizer: MakeOptimizer | None = None,
    device_type: str = "cuda",
    key_map: KeyMap | None = None,
    host_buffer_bytes: int = 256 << 20,
    num_threads: int | None = None,
) -> MemoryPlan:
    """Say what a model takes on each device, without allocating any of it.

    Args:
        model: The model; deferred, on the meta device, or real.
        checkpoint: What is loaded into it: a path, or a plan that `plan_load` has made. None for a model that runs its
            initializers.
        strategy: Name of one of this package's strategies.
        num_devices: How many devices the model is on, or sharded over.
        precision: As for `EfficientInit`; None counts the model's own dtypes.
        quantize: As for `EfficientInit`.
        skip_modules: As for `EfficientInit`.
        optimizer: Makes the optimizer from a list of parameters, ``torch.optim.AdamW`` say; None for inference.
        device_type: "cuda" or "cpu".
        key_map: See `load_checkpoint`.
        host_buffer_bytes: See `load_checkpoint`.
        num_threads: See `load_checkpoint`; the default depends on the machine.

    Raises:
        TypeError: An argument is of another kind.
        UsageError: A name is unknown, they do not go together, or the optimizer cannot step.
        QuantizationError: The model cannot be quantized so, as `EfficientInit` would say.
        StateDictMismatchError: The checkpoint does not fit the model.
        CheckpointError: The checkpoint cannot be read.

    Example:
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(1024, 1024, bias=False)
        >>> plan_memory(model, precision="bf16-true").final_bytes
        2097152
    """
    if not isinstance(model, Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, found {type(model).__name__}. The checkpoint comes second."
        )
    if not isinstance(checkpoint, (LoadPlan, str, os.PathLike, type(None))):
        raise TypeError(
            f"checkpoint: expected a path or a plan, found {type(checkpoint).__name__}. Pass plan_load's, say."
        )
    settings = Settings(host_buffer_bytes, num_threads)
    asked = Question(strategy, num_devices, precision, quantize, skip_modules, optimizer, device_type, settings)
    plan = plan_load(model, checkpoint, key_map=key_map) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
    return answer(unwrap(model), plan, asked)


def answer(model: Module, plan: LoadPlan | None, asked: Question) -> MemoryPlan:
    """See `plan_memory`."""
    sizes = _Sizes(model, asked)
    share = 1 if asked.strategy in _REPLICATED else asked.num_devices
    is_offloaded = asked.strategy in _OFFLOADED
    stays = {
        "parameters": _part_of(sizes.parameters, share),
        "gradients": _part_of(sizes.gradients, share),
        "optimizer state": _part_of(sizes.optimizer_state, share),
    }
    return MemoryPlan(
        strategy=asked.strategy,
        num_devices=asked.num_devices,
        precision=asked.precision,
        quantize=asked.quantize,
        device_type=asked.device_type,
        bytes_read=0 if plan is None else _part_of(plan.num_bytes, asked.num_devices),
        device={
            **(dict.fromkeys(stays, 0) if is_offloaded else stays),
            "buffers": sizes.buffers,
            "communication": sizes.trainable if asked.strategy == "efficient_init_ddp" else _bucket(sizes, asked),
        },
        loading=_scratch(sizes, plan, asked) + (sizes.largest_block if asked.strategy not in _REPLICATED else 0),
        training=0 if asked.optimizer is None else _in_training(sizes, asked, share),
        host=_host(plan, asked),
        host_stays=sum(stays.values()) if is_offloaded else 0,
    )


def remedies(model: Module, plan: LoadPlan | None, asked: Question, device_bytes: int) -> list[MemoryPlan]:
    """What would fit where ``asked`` does not: the fewest changes, and the least of each kind.

    Args:
        model: The model.
        plan: What is loaded into it.
        asked: What does not fit.
        device_bytes: Free memory of each device.

    Returns:
        A change of precision, one of quantization, one of sharding, as far as each is enough; if none is, pairs.
    """
    kinds = [list(_other_precisions(asked)), list(_other_quantizations(asked)), list(_other_shardings(asked))]
    found = [first for kind in kinds if (first := _first_fit(model, plan, asked, kind, device_bytes))]
    if found:
        return found
    precisions, *others = kinds  # quantization and sharding do not go together
    pairs = [[{**a, **b} for b in second for a in precisions] for second in others]
    return [first for pair in pairs if (first := _first_fit(model, plan, asked, pair, device_bytes))]


def _first_fit(
    model: Module, plan: LoadPlan | None, asked: Question, changes: Sequence[dict[str, Any]], device_bytes: int
) -> MemoryPlan | None:
    for change in changes:
        with suppress(QuantizationError):  # a model may have nothing to quantize
            candidate = answer(model, plan, replace(asked, **change))
            if candidate.fits(device_bytes):
                return candidate
    return None


def _other_precisions(asked: Question) -> Iterator[dict[str, Any]]:
    if asked.precision is None or _DTYPES[asked.precision].itemsize > 2:
        yield {"precision": "bf16-true"}


def _other_quantizations(asked: Question) -> Iterator[dict[str, Any]]:
    """In the order of their sizes. They are for inference: what is quantized has no gradients."""
    if asked.optimizer is None and asked.strategy in _REPLICATED:
        order = [None, "int8", "nf4", "nf4-dq"]
        start = order.index(asked.quantize) + 1 if asked.quantize in order else len(order)
        yield from ({"quantize": name} for name in order[start:])


def _other_shardings(asked: Question) -> Iterator[dict[str, Any]]:
    if asked.device_type == "cpu" or asked.quantize is not None:
        return
    strategy = "efficient_init_fsdp2" if asked.strategy in _REPLICATED else asked.strategy
    num_devices = max(2, asked.num_devices)
    while num_devices <= _MAX_DEVICES:
        yield {"strategy": strategy, "num_devices": num_devices}
        num_devices *= 2


def _quantized_layers(model: Module, asked: Question) -> list[Module]:
    """What setup would quantize of ``model``, or the error that it would raise."""
    if asked.quantize is None:
        return []
    check_names(model, asked.skip_modules)
    if _is_quantized(model):
        return []  # what is still in full was added later, or left alone
    layers = choose([model], asked.skip_modules)
    if not layers:
        raise nothing_to_quantize(model, asked.quantize)
    return layers


def _is_quantized(model: Module) -> bool:
    """Whether there are quantized weights in it: in layers, or as a checkpoint of a quantized model names them."""
    is_layer = any(isinstance(module, QuantizedLayer) for module in model.modules())
    return is_layer or any(weight_of(name) is not None for name, _ in model.named_parameters())


class _Sizes:
    """Bytes of a whole model, by kind."""

    def __init__(self, model: Module, asked: Question) -> None:
        self._asked = asked
        self._dtype = None if asked.precision is None else _DTYPES[asked.precision]
        quantized = {id(m.weight) for m in _quantized_layers(model, asked)}
        parameters = {id(p): p for p in model.parameters()}
        self.quantized_from = [self._plain(parameters[key]) for key in quantized]
        self.of_parameter = {
            key: self._quantized(p) if key in quantized else self._plain(p) for key, p in parameters.items()
        }
        self.parameters = sum(self.of_parameter.values())
        self.buffers = sum(self._rounded(b.nbytes) for b in {id(b): b for b in model.buffers()}.values())
        trainable = [p for key, p in parameters.items() if p.requires_grad and key not in quantized]
        self.trainable = sum(map(self._plain, trainable))
        self.gradients = self.trainable if asked.optimizer else 0
        self.itemsize = max((self._dtype_of(parameter).itemsize for parameter in trainable), default=0)
        self.optimizer_state, self.step = self._optimizer_bytes(trainable)
        self.largest_block, self.rest = self._blocks(model)

    def _plain(self, parameter: Parameter) -> int:
        return self._rounded(parameter.numel() * self._dtype_of(parameter).itemsize)

    def _dtype_of(self, parameter: Parameter) -> torch.dtype:
        return self._dtype if self._dtype is not None and parameter.is_floating_point() else parameter.dtype

    def _quantized(self, weight: Parameter) -> int:
        kind = str(self._asked.quantize)
        if kind == "int8-training":  # quantized anew in each forward
            return self._plain(weight)
        if kind == "int8":
            return self._rounded(weight.numel()) + self._rounded(4 * weight.shape[0])
        blocks = math.ceil(weight.numel() / _QUANTIZED_BLOCK)
        scales = [4 * blocks]
        if kind.endswith("-dq"):
            scales = [blocks, 4 * math.ceil(blocks / _NESTED_BLOCK), 4 * 256, 4]
        return sum(map(self._rounded, [math.ceil(weight.numel() / 2), 4 * 16, *scales]))

    def _rounded(self, num_bytes: int) -> int:
        if self._asked.device_type == "cpu":
            return num_bytes
        return -(-num_bytes // _ALLOCATION_BYTES) * _ALLOCATION_BYTES

    def _optimizer_bytes(self, trainable: Sequence[Parameter]) -> tuple[int, int]:
        """Of the state, and of what a step computes: on CUDA for all parameters at once, elsewhere for one by one.

        DeepSpeed trains a copy of the values in float32, whatever they are, and flattens it.
        """
        asked = self._asked
        is_deepspeed = "deepspeed" in asked.strategy
        is_flat = is_deepspeed or (asked.strategy == "efficient_init_fsdp" and asked.num_devices > 1)
        counts: Counter[tuple[torch.Size, torch.dtype]] = Counter()
        for parameter in trainable:
            shape = torch.Size([parameter.numel()]) if is_flat else parameter.shape
            counts[shape, torch.float32 if is_deepspeed else self._dtype_of(parameter)] += 1
        if asked.optimizer is None or not counts:
            return 0, 0
        costs = _costs_of(asked.optimizer, list(counts), asked.device_type)
        times = list(zip(counts.values(), costs, strict=True))
        copies = sum(4 * parameter.numel() for parameter in trainable) if is_deepspeed else 0
        at_once = sum(n * cost.temporary for n, cost in times) if asked.device_type == "cuda" else 0
        return copies + sum(n * cost.state for n, cost in times), max(at_once, *(cost.temporary for cost in costs))

    def _blocks(self, model: Module) -> tuple[int, int]:
        """Bytes of the largest of the repeated blocks, and of all parameters that are in none."""
        blocks = list(repeated_blocks(model))
        inside = {id(p) for block in blocks for p in block.parameters()}
        largest = max((sum(self.of_parameter[id(p)] for p in block.parameters()) for block in blocks), default=0)
        rest = [num_bytes for key, num_bytes in self.of_parameter.items() if key not in inside]
        return max([largest, *rest]), sum(rest)


@dataclass(frozen=True, slots=True)
class _OptimizerCost:
    """Bytes for one parameter: what an optimizer keeps, and what it needs for a moment in a step."""

    state: int
    temporary: int


def _costs_of(
    make: MakeOptimizer, parameters: Sequence[tuple[torch.Size, torch.dtype]], device_type: str
) -> list[_OptimizerCost]:
    """What one optimizer costs for parameters of these shapes and dtypes."""
    try:
        return _measured_costs(make, parameters, device_type)
    except Exception as error:  # other people's code, which may raise anything
        dtypes = ", ".join(dict.fromkeys(str(dtype) for _, dtype in parameters))
        raise UsageError(
            f"optimizer: expected one that steps on dense parameters of the model's shapes and of {dtypes} without a "
            f"closure, found {type(error).__name__}: {error}. Choose another optimizer, other arguments for it, or a "
            "precision."
        ) from error


def _measured_costs(
    make: MakeOptimizer, parameters: Sequence[tuple[torch.Size, torch.dtype]], device_type: str
) -> list[_OptimizerCost]:
    """Found by letting the optimizer step: the first step makes its state, one for each parameter its temporaries."""
    cuts = [_cut(shape) for shape, _ in parameters]
    small = [
        Parameter(torch.zeros([cut[dim] for dim in shape], dtype=dtype, device="cpu"))
        for (shape, dtype), cut in zip(parameters, cuts, strict=True)
    ]
    optimizer = make([*small])
    for group in optimizer.param_groups:
        if group.get("foreach", True) is None:
            group["foreach"] = device_type == "cuda"  # as torch itself chooses
    for parameter in small:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    costs = []
    for parameter, (shape, _), cut in zip(small, parameters, cuts, strict=True):
        state = _whole_bytes(pytree.tree_leaves(dict(optimizer.state[parameter])), shape, cut)
        optimizer.zero_grad()
        parameter.grad = torch.zeros_like(parameter)
        with _Temporaries() as temporaries:
            optimizer.step()
        costs.append(_OptimizerCost(state, temporaries.peak_bytes * shape.numel() // max(1, parameter.numel())))
    return costs


def _cut(shape: torch.Size) -> dict[int, int]:
    """Each dim of a shape to a shorter one, no two to the same; dims that are short already stay."""
    most = 2 ** (1 + 13 // max(1, sum(dim > _SHORT_DIM for dim in shape)))
    long = sorted({dim for dim in shape if dim > most})
    return {dim: dim for dim in shape} | {dim: most * (3 + i) // 2 for i, dim in enumerate(long)}


def _whole_bytes(state: Sequence[Any], shape: torch.Size, cut: Mapping[int, int]) -> int:
    """Bytes of a state that was made for a parameter whose dims were cut, as they are for the whole one."""
    whole = {math.prod(cut[dim] for dim in shape): shape.numel()} | {short: dim for dim, short in cut.items()}
    tensors = [value for value in state if isinstance(value, torch.Tensor) and value.dim()]
    return sum(tensor.itemsize * math.prod(whole.get(dim, dim) for dim in tensor.shape) for tensor in tensors)


class _Temporaries(TorchDispatchMode):
    """Bytes of new tensors that are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > 1 and not func._schema.is_mutable:
                self._alive[id(tensor)] = tensor.nbytes
                weakref.finalize(tensor, self._alive.pop, id(tensor), None)
        self.peak_bytes = max(self.peak_bytes, sum(self._alive.values()))
        return result


def _scratch(sizes: _Sizes, plan: LoadPlan | None, asked: Question) -> int:
    """What the device needs while bytes arrive, beside the tensors that they are for."""
    if plan is None:  # layers are initialized, and quantized, one after the other
        return max(sizes.quantized_from, default=0)
    tensors = plan.binding.tensors
    needs = [sink_for(name, _in_place(tensors[name]), entry).scratch_bytes for name, entry in plan.entries.items()]
    total = sum(needs) + sum(sizes.quantized_from)
    largest = max([*needs, *(min(PART_BYTES, num_bytes) for num_bytes in sizes.quantized_from), 0])
    batch_bytes = max(min(BATCH_BYTES, asked.settings.host_buffer_bytes), largest)
    batches = min(total, max_batches(asked.device_type) * batch_bytes)
    casting = 0
    if asked.device_type == "cuda" and _is_cast(plan, asked):
        threads, slot_bytes = divide(asked.settings)
        casting = min(threads * slot_bytes, plan.num_bytes)
    return batches + casting


def _in_place(tensor: torch.Tensor) -> torch.Tensor:
    """What a deferred tensor will be once it has memory."""
    if not has_recipe(tensor):
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _is_cast(plan: LoadPlan, asked: Question) -> bool:
    """Whether any value has to change its dtype on the way."""
    tensors = plan.binding.tensors
    return any(_dtypes_differ(tensors[name], entry, asked) for name, entry in plan.entries.items())


def _dtypes_differ(tensor: torch.Tensor, entry: Entry, asked: Question) -> bool:
    if asked.precision is not None and tensor.is_floating_point() and isinstance(tensor, Parameter):
        return _DTYPES[asked.precision] != entry.dtype
    return tensor.dtype != entry.dtype


def _host(plan: LoadPlan | None, asked: Question) -> int:
    """The ring, as far as it is used, and what an index takes."""
    if plan is None:
        return 0
    index = _ENTRY_BYTES * len(plan.entries)
    if asked.device_type == "cpu" and not _is_cast(plan, asked):
        return index  # bytes go straight to the parameters
    threads, slot_bytes = divide(asked.settings)
    ring = min(plan.num_bytes, threads * SLOTS_PER_THREAD * slot_bytes)
    if asked.device_type != "cuda":
        return index + ring
    return index + ring + _CUDA_HOST_BYTES + (_QUANTIZING_HOST_BYTES if asked.quantize else 0)


def _bucket(sizes: _Sizes, asked: Question) -> int:
    """What ZeRO-3 collects gradients in; on a CPU, memory that is never touched takes none."""
    if asked.optimizer is None or "deepspeed" not in asked.strategy:
        return 0
    num_bytes = _BUCKET_NUMEL * sizes.itemsize
    return num_bytes if asked.device_type == "cuda" else min(num_bytes, sizes.gradients)


def _in_training(sizes: _Sizes, asked: Question, share: int) -> int:
    """Beside weights, gradients and state: gathered blocks, or what an optimizer's step computes.

    In a backward pass the block at hand and the next one are whole, and so are the gradients of the one at hand and of
    the one that is being reduced; what is in no block stays whole throughout, its gradients too.
    """
    step = _part_of(sizes.step, share) if asked.device_type == "cuda" else sizes.step
    is_whole = asked.strategy in _REPLICATED or (asked.strategy in _WHOLE_ON_ONE and asked.num_devices == 1)
    gathered = 0 if is_whole else 4 * sizes.largest_block + 2 * sizes.rest
    reduced = min(_bucket(sizes, asked), sizes.gradients) if asked.num_devices > 1 else 0  # a copy for the other ranks
    return max(gathered, step, reduced)


def _part_of(num_bytes: int, share: int) -> int:
    return -(-num_bytes // share)
