"""``load_checkpoint``: index, plan, read, finish, report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch.nn import Module, Parameter

from lightning_efficient_init.deferred import allocate, eager, forget, has_recipe, initialize, undisturbed
from lightning_efficient_init.errors import CheckpointError, DeferredParameterError, shorten
from lightning_efficient_init.load.bind import Binding, named_state
from lightning_efficient_init.load.keys import KeyMap
from lightning_efficient_init.load.mapping import map_entries
from lightning_efficient_init.load.order import order_writes
from lightning_efficient_init.load.pipeline import Settings, transfer
from lightning_efficient_init.load.plan import LoadPlan, plan_load
from lightning_efficient_init.load.report import LoadReport, Meter
from lightning_efficient_init.sinks import Segment, Sink, sink_for


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
        path: A torch file (zip or legacy), a safetensors file, a Lightning or Fabric checkpoint, or a Hugging Face
            folder; recognized by content.
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
        CheckpointReadError: Reading failed; names what was already written.
        CheckpointError: The checkpoint cannot be read, see ``lightning_efficient_init.errors``.

    Example:
        >>> report = load_checkpoint(model, "lit-llama.pth")  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    settings = Settings(host_buffer_bytes, num_threads)
    started = time.perf_counter()
    with eager():
        plan = plan_load(
            model, path, strict=strict, key_map=key_map, ignore_mismatched=ignore_mismatched, weights_only=weights_only
        )
        return run_plan(plan, settings, progress=progress, mmap=mmap, started=started)


def run_plan(
    plan: LoadPlan,
    settings: Settings,
    *,
    progress: bool | None = None,
    mmap: bool = False,
    started: float | None = None,
) -> LoadReport:
    """Carry out a plan; see ``load_checkpoint``."""
    started = time.perf_counter() if started is None else started
    model = plan.binding.module
    devices = {tensor.device for tensor in plan.binding.tensors.values()}
    num_bytes = plan.num_bytes
    with Meter(num_bytes, devices, progress) as meter:
        loaded = _write(model, plan.binding, settings, meter, mmap=mmap)
        initialized = _initialize_rest(model, plan.binding)
        forget(plan.binding.tensors[name] for name in plan.binding.loaded_by_calls)
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
    )


def _write(model: Module, binding: Binding, settings: Settings, meter: Meter, *, mmap: bool) -> tuple[str, ...]:
    """Give every bound tensor its value, and return their names."""
    names = [*binding.entries, *binding.values, *binding.loaded_by_calls]
    with undisturbed():
        tensors = _with_memory(model, binding, names)
        writes = order_writes(tensors, binding)
        pairs = [pair for wave in writes.waves for pair in wave]
        if mmap:
            map_entries(pairs)
        else:
            for wave in writes.waves:
                stream([sink_for(*pair) for pair in wave], settings, meter)
        _note_writes([tensor for _, tensor, _ in pairs])
    with torch.inference_mode():  # which may write to inference tensors as well as to others
        for tensor, value in writes.values:
            tensor.copy_(value)
    try:
        for call in binding.calls:
            call()
    except CheckpointError as error:
        error.add_written(names)
        raise
    forget(tensors[name] for name in (*binding.entries, *binding.values))
    return tuple(names)


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
    allocate(
        model, tensors=[binding.tensors[name] for name in deferred if isinstance(binding.tensors[name], Parameter)]
    )
    if _on_meta(binding.tensors, deferred):
        allocate(model)  # buffers that are views of parameters get their memory from those
    return {**binding.tensors, **named_state(model)}


def _on_meta(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> list[str]:
    """The truth, also while construction is recorded and deferred tensors answer for the device they will be on."""
    with torch._C.DisableTorchFunction():
        return [name for name in names if tensors[name].is_meta]


def stream(sinks: Sequence[Sink], settings: Settings, meter: Meter) -> None:
    """Fill each sink. What needs scratch memory goes in batches that the host buffer could hold."""
    done = 0
    written: list[str] = []
    for batch, is_direct in _batches(sinks, settings.host_buffer_bytes):
        segments: list[Segment] = [segment for sink in batch for segment in sink.segments()]
        try:
            done += transfer(segments, settings, partial(_tick, meter, done))
        except CheckpointError as error:
            error.add_written([*written, *(error.written if is_direct else ())])  # else only scratch was touched
            raise
        for sink in batch:
            sink.finish()
        written += dict.fromkeys(segment.name for segment in segments)


def _tick(meter: Meter, done_before: int, done: int) -> None:
    meter.tick(done_before + done)


def _batches(sinks: Sequence[Sink], max_scratch: int) -> Iterator[tuple[list[Sink], bool]]:
    """All that needs no scratch first (True), then as many of the others at a time as fit, at least one (False)."""
    yield [sink for sink in sinks if not sink.scratch_bytes], True
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
    if not any(has_recipe(tensor) for name, tensor in binding.tensors.items() if name not in written):
        return ()
    return tuple(initialize(model))
