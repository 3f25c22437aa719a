"""``load_checkpoint``: index, plan, read, finish, report."""

from __future__ import annotations

import itertools
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import Module

from lightning_efficient_init.deferred import (
    allocate,
    eager,
    forget,
    has_recipe,
    have_recipes,
    hidden_parameters,
    initialize,
    undisturbed,
)
from lightning_efficient_init.errors import CheckpointError, DeferredParameterError, shorten
from lightning_efficient_init.garbage import collections_paused
from lightning_efficient_init.load.bind import Binding, named_state
from lightning_efficient_init.load.keys import KeyMap
from lightning_efficient_init.load.mapping import map_entries
from lightning_efficient_init.load.order import Writes, order_writes
from lightning_efficient_init.load.pipeline import Batch, Settings, Transfer
from lightning_efficient_init.load.plan import LoadPlan, plan_load
from lightning_efficient_init.load.postponed import must_wait, postpone
from lightning_efficient_init.load.replicas import Replicas, Round, agreed, replicas_of
from lightning_efficient_init.load.report import LoadReport, Meter
from lightning_efficient_init.quantize import QuantizedParameter, parts_of
from lightning_efficient_init.sharding import copies_of, is_engine, part_of, refresh, refresh_engine
from lightning_efficient_init.sinks import Sink, sinks_again, sinks_for

BATCH_BYTES = 48 << 20  # of scratch memory


@collections_paused()
def load_checkpoint(
    model: Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    key_map: KeyMap | None = None,
    ignore_mismatched: bool = False,
    weights_only: bool = True,
    host_buffer_bytes: int = 256 << 20,
    num_threads: int | None = None,
    progress: bool | None = None,
    mmap: bool = False,
) -> LoadReport:
    """Stream a checkpoint into a model, tensor by tensor, in place.

    The values, cast to the model's dtypes on its devices, are those that ``load_state_dict(torch.load(path))`` gives.
    Deferred and empty parameters get their memory and values here; what the checkpoint does not provide runs its own
    initializer. Before any parameter changes, the whole checkpoint has been matched to the model.

    Args:
        model: The model, on any device or deferred; plain, or wrapped by ``torch.compile``, DDP or Fabric.
        path: A torch file (zip or legacy), a safetensors file, a Lightning or Fabric checkpoint, or a folder of Hugging
            Face, ``torch.distributed.checkpoint`` or DeepSpeed; recognized by content.
        strict: Whether every tensor of the model must be in the checkpoint, and the other way round.
        key_map: Checkpoint key to the model's name, as a mapping (keys that it lacks keep their name) or a function;
            ``None`` drops the key. By default a prefix such as ``model.`` is added or removed if exactly one choice
            fits.
        ignore_mismatched: Whether tensors of another shape are left to their initializer instead of being an error.
        weights_only: Whether the checkpoint's pickle may only hold tensors and plain containers. ``False`` runs
            whatever code it brings along.
        host_buffer_bytes: Upper bound of the staging memory on the host, in bytes.
        num_threads: Threads that read; by default the cores available to the process, at most 12.
        progress: Whether to show a bar; by default on a terminal, if the load takes more than a moment.
        mmap: Whether parameters on the CPU become the file's private mapping: nothing is copied or read until it is
            used, and writing to a parameter never reaches the file.

    Returns:
        What was loaded, initialized, missing and unexpected, and what it took.

    Raises:
        StateDictMismatchError: The tensors do not fit; holds all names and shapes. The model is as it was.
        CheckpointReadError: Reading failed, or the file was replaced meanwhile; names what was already written.
        CheckpointError: The checkpoint cannot be read, see ``lightning_efficient_init.errors``.
        DeferredParameterError: A tensor of the model has no memory, and nothing says where it belongs.
        TypeError: An argument is of another kind, such as a state dict in place of ``path``.
        ValueError: ``host_buffer_bytes`` or ``num_threads`` is too small.

    Example:
        >>> report = load_checkpoint(model, "lit-llama.pth")  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    settings = Settings(host_buffer_bytes, num_threads)
    started = time.perf_counter()
    replicas = replicas_of(model)
    with eager(), agreed(replicas):
        plan = plan_load(
            model, path, strict=strict, key_map=key_map, ignore_mismatched=ignore_mismatched, weights_only=weights_only
        )
        report = run_plan(plan, settings, progress=progress, mmap=mmap, started=started, replicas=replicas)
    if is_engine(model):
        refresh_engine(model)
    return report


@collections_paused()
def run_plan(
    plan: LoadPlan,
    settings: Settings,
    *,
    progress: bool | None = None,
    mmap: bool = False,
    started: float | None = None,
    replicas: Replicas | None = None,
) -> LoadReport:
    """Carry out a plan; see ``load_checkpoint``. With ``replicas``, all of them carry out theirs together."""
    started = time.perf_counter() if started is None else started
    if must_wait(plan):
        return postpone(plan, settings, mmap=mmap)
    model = plan.binding.module
    devices = {tensor.device for tensor in plan.binding.tensors.values()}
    planned_bytes = plan.num_bytes
    is_recorded = have_recipes(plan.binding.tensors.values())
    with Meter(planned_bytes, devices, progress) as meter:
        loaded = _write(model, plan.binding, settings, meter, mmap=mmap, replicas=replicas)
        num_bytes = planned_bytes if replicas is None else replicas.num_bytes_read(planned_bytes)
        initialized = _initialize_rest(model, plan.binding) if is_recorded else ()
        tensors = plan.binding.tensors
        forget((tensors[name] for name in plan.binding.loaded_by_calls), tensors.values())
    _check_unchanged(plan, loaded)
    return LoadReport(
        loaded=loaded,
        initialized=initialized,
        missing=plan.missing,
        unexpected=plan.unexpected,
        mismatched=tuple(plan.mismatched),
        num_bytes=num_bytes,
        elapsed_s=time.perf_counter() - started,
        peak_host_bytes=meter.memory.host_bytes,
        peak_device_bytes=meter.memory.device_bytes,
        bytes_per_rank=(num_bytes,) if replicas is None else replicas.gather(num_bytes),
    )


def _check_unchanged(plan: LoadPlan, written: Sequence[str]) -> None:
    """Raise if what has been read need not be what the headers said, as the files are others now."""
    try:
        plan.seal.check_all()
    except CheckpointError as error:
        error.add_written(list(written))
        raise


def _write(
    model: Module, binding: Binding, settings: Settings, meter: Meter, *, mmap: bool, replicas: Replicas | None
) -> tuple[str, ...]:
    """Give every bound tensor its value, and return their names."""
    names = [*binding.entries, *binding.values, *binding.loaded_by_calls]
    with undisturbed():
        tensors = _with_memory(model, binding, names)
        writes = order_writes(tensors, binding)
        read = writes.names()
        if mmap:
            map_entries(model, {name: (tensors[name], binding.entries[name]) for name in read})
        sharing = None if mmap or replicas is None else replicas.confirm([_work(writes), settings])
    written: list[str] = []
    for wave in writes.waves:
        if not mmap:
            with undisturbed():
                _stream_wave(writes, writes.read_in(wave), settings, meter, sharing, written)
        _copy_values(writes, wave, written)
    with undisturbed():
        _note_writes([tensors[name] for name in read])
        refresh(tensors[name] for name in read if name in writes.parts)
    try:
        for call in binding.calls:
            call()
    except CheckpointError as error:
        error.add_written(names)
        raise
    forget((tensors[name] for name in (*binding.entries, *binding.values)), tensors.values())
    return tuple(names)


def _stream_wave(
    writes: Writes,
    wave: Sequence[str],
    settings: Settings,
    meter: Meter,
    sharing: Replicas | None,
    written: list[str],
) -> None:
    """Fill tensors that have no memory in common, and add their names to ``written``."""
    tensors = writes.tensors
    others = [name for name in wave if name not in writes.direct]
    sharded = dict.fromkeys(writes.sharded(others))
    whole = [name for name in wave if name not in sharded] if sharded else wave
    copies = sharing and _copies([tensors[name] for name in sharded], sharing)
    with agreed(copies):
        stream(_sinks(writes, sharded), settings, meter, copies, written)
    stream(_sinks(writes, whole), settings, meter, sharing, written)
    quantized = [(name, param) for name in others if isinstance(param := tensors[name], QuantizedParameter)]
    again = [sink for name, param in quantized for sink in sinks_again(name, param, writes.entries[name])]
    stream(again, settings, meter, sharing, written)


def _copies(tensors: Sequence[torch.Tensor], replicas: Replicas) -> Replicas | None:
    """The ranks with the same parts as this one of all of some tensors, where a mesh repeats them along one axis."""
    groups = {id(group): group for group in map(copies_of, tensors)}
    group = next(iter(groups.values())) if len(groups) == 1 else None
    return None if group is None else Replicas(group, replicas)


@torch.inference_mode()  # which may write to inference tensors as well as to others
def _copy_values(writes: Writes, wave: Sequence[str], written: list[str]) -> None:
    """Copy what is in memory to tensors that have no memory in common, and add their names to ``written``."""
    for name in [name for name in wave if name in writes.values] if writes.values else ():
        _copy_value(writes.tensors[name], writes.values[name])
        written.append(name)


def _copy_value(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a value from memory to a tensor, or to this rank's part of it."""
    part = part_of(tensor)
    if part is None:
        tensor.copy_(value)
    else:
        part.memory.copy_(part.take(value.view(part.shape)))


def _note_writes(tensors: Sequence[torch.Tensor]) -> None:
    """Count a write, as ``copy_`` does, so that a backward pass that needs the old values says so."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def _with_memory(model: Module, binding: Binding, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
    """The tensors to write, after deferred ones among them got memory."""
    deferred = _on_meta(binding.tensors, names)
    if not deferred:
        return binding.tensors
    if bare := [name for name in deferred if not has_recipe(binding.tensors[name])]:
        raise DeferredParameterError(
            f"{shorten(bare)}: on the meta device, without a recipe that says where it belongs, so there is no memory "
            "to load into. Build the model under deferred_init() instead of torch.device('meta'), or call "
            "model.to_empty(device=...) first."
        )
    allocate(model, tensors=[binding.tensors[name] for name in deferred])
    return {**binding.tensors, **named_state(model), **parts_of(model)}


def _on_meta(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> list[str]:
    """The truth, also while construction is recorded and deferred tensors answer for the device they will be on."""
    with torch._C.DisableTorchFunction():
        return [name for name in names if tensors[name].is_meta]


def _sinks(writes: Writes, names: Iterable[str]) -> list[Sink]:
    sinks: list[Sink] = []
    for name in names:
        segment = writes.direct.get(name)
        if segment is not None:  # as nearly always
            sinks.append(segment)
        else:
            sinks += sinks_for(name, writes.tensors[name], writes.entries[name], writes.parts.get(name))
    return sinks


def _work(writes: Writes) -> list[object]:
    """What loading is about to do, to be compared between ranks, whose devices have other numbers."""
    numbers: dict[torch.device, int] = {}
    return [[_work_of(name, writes, numbers) for name in writes.read_in(wave)] for wave in writes.waves]


def _work_of(name: str, writes: Writes, numbers: dict[torch.device, int]) -> tuple[object, ...]:
    tensor = writes.tensors[name]
    device_number = numbers.setdefault(tensor.device, len(numbers))
    is_direct = tensor.layout is torch.strided and tensor.is_contiguous()
    return name, tensor.dtype, tensor.device.type, device_number, is_direct, writes.entries[name]


def stream(
    sinks: Sequence[Sink],
    settings: Settings,
    meter: Meter,
    replicas: Replicas | None = None,
    written: list[str] | None = None,
) -> None:
    """Fill each sink. What needs scratch memory goes in batches; one is worked on while the next ones are read.

    Args:
        sinks: What to fill.
        settings: Host memory and threads.
        meter: Told of the progress.
        replicas: Other ranks that fill the same sinks with the same settings, and share the reading.
        written: Names of what the same load has written before; it gets those of the sinks.
    """
    by_device: dict[torch.device, list[Sink]] = defaultdict(list)
    for sink in sinks:
        by_device[sink.device].append(sink)
    done = 0
    written = [] if written is None else written
    for device, group in by_device.items():
        done += _stream_to(device, group, settings, partial(_tick, meter, done), written, replicas)


def _stream_to(
    device: torch.device,
    sinks: Sequence[Sink],
    settings: Settings,
    on_tick: Callable[[int], None],
    written: list[str],
    replicas: Replicas | None,
) -> int:
    """Fill sinks on one device; adds their names to ``written``, and returns the number of bytes read."""
    in_flight: deque[_InFlight] = deque()
    try:
        with Transfer(device, settings, on_tick) as transfer:
            for batch, is_direct in _batches(sinks, min(settings.host_buffer_bytes, BATCH_BYTES)):
                for round, filled in _rounds(batch, is_direct, replicas):
                    in_flight.append(_InFlight(filled, round, is_direct, transfer.submit(round.reads)))
                    if len(in_flight) == max_batches(device.type):
                        written += _complete(transfer, in_flight, replicas)
            while in_flight:
                written += _complete(transfer, in_flight, replicas)
        on_tick(transfer.num_bytes)
    except CheckpointError as error:
        touched = [name for item in in_flight if item.is_direct for name in item.names_touched(replicas)]
        error.add_written(list(dict.fromkeys([*written, *touched])))  # of the others only scratch was touched
        raise
    return transfer.num_bytes


@dataclass(frozen=True, slots=True)
class _InFlight:
    """What is being read, and the sinks that have everything once it is."""

    sinks: Sequence[Sink]
    round: Round
    is_direct: bool
    batch: Batch

    def names_touched(self, replicas: Replicas | None) -> list[str]:
        """What may have been written, on any rank: all of a node say the same, and none knows how far others are."""
        return self.batch.names_touched() if replicas is None else self.round.names()


def max_batches(device_type: str) -> int:
    """How many are in flight: on a GPU three keep a dozen threads busy while one is worked on, elsewhere one does."""
    return 4 if device_type == "cuda" else 2


def _rounds(
    sinks: Sequence[Sink], is_direct: bool, replicas: Replicas | None
) -> Iterator[tuple[Round, Sequence[Sink]]]:
    """What to read for some sinks, step by step, and which of them have everything after each."""
    segments = [segment for sink in sinks for segment in sink.segments()]
    rounds = [Round(segments)] if replicas is None else replicas.rounds(segments, is_divisible=is_direct)
    for round in rounds:
        yield round, sinks if round is rounds[-1] else ()


def _complete(transfer: Transfer, in_flight: deque[_InFlight], replicas: Replicas | None) -> list[str]:
    """Wait for what was submitted first, share it, and finish its sinks; returns the names of what was written.

    On CUDA, waiting makes the current stream follow the copies of the threads, and NCCL follows the current stream,
    which in turn follows NCCL before a sink or whoever comes next is given the memory. The copies follow the current
    stream only as far as it was when the latest batch was submitted: what they write meanwhile is other memory.
    """
    with agreed(replicas):
        transfer.wait(in_flight[0].batch)
    if replicas is not None:
        replicas.share(in_flight[0].round)
    item = in_flight.popleft()
    for sink in item.sinks:
        sink.finish()
    return item.round.names()


def _tick(meter: Meter, done_before: int, done: int) -> None:
    meter.tick(done_before + done)


def _batches(sinks: Sequence[Sink], max_scratch: int) -> Iterator[tuple[list[Sink], bool]]:
    """All that needs no scratch first (True), then as many of the others at a time as fit, at least one (False)."""
    direct = [sink for sink in sinks if not sink.scratch_bytes]
    yield direct, True
    if len(direct) == len(sinks):
        return
    batch: list[Sink] = []
    scratch = 0
    for sink in sinks:
        need = sink.scratch_bytes
        if not need:
            continue
        if batch and scratch + need > max_scratch:
            yield batch, False
            batch, scratch = [], 0
        batch.append(sink)
        scratch += need
    if batch:
        yield batch, False


def _initialize_rest(model: Module, binding: Binding) -> tuple[str, ...]:
    """Run the initializers of parameters that nobody has written by now, also of those that a load hook forgave."""
    written = binding.entries.keys() | binding.values.keys()
    waiting = (tensor for name, tensor in binding.tensors.items() if name not in written)
    hidden = (tensor for _, tensor in hidden_parameters(model))
    if not have_recipes(itertools.chain(waiting, hidden)):
        return ()
    return tuple(initialize(model))
