"""``load_checkpoint``: index, plan, read, finish, report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch.nn import Module

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.deferred import allocate, eager, forget, has_recipe, initialize, is_deferred
from lightning_efficient_init.errors import DeferredParameterError, shorten
from lightning_efficient_init.load.bind import Binding, named_state
from lightning_efficient_init.load.keys import KeyMap
from lightning_efficient_init.load.mapping import map_entries
from lightning_efficient_init.load.pipeline import Settings, transfer
from lightning_efficient_init.load.plan import LoadPlan, plan_load, unwrap
from lightning_efficient_init.load.report import LoadReport, Meter
from lightning_efficient_init.sinks import PlainSink, Segment, Sink


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
        num_threads: Threads that read; by default the cores available to the process, at most 16.
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
        return run_plan(model, plan, settings, progress=progress, mmap=mmap, started=started)


def run_plan(
    model: Module,
    plan: LoadPlan,
    settings: Settings,
    *,
    progress: bool | None = None,
    mmap: bool = False,
    started: float | None = None,
) -> LoadReport:
    """Carry out a plan; see ``load_checkpoint``."""
    started = time.perf_counter() if started is None else started
    model = unwrap(model)
    devices = {tensor.device for tensor in plan.binding.tensors.values()}
    with Meter(plan.num_bytes, devices, progress) as meter:
        loaded = _write(model, plan.binding, settings, meter, mmap=mmap)
        initialized = _initialize_rest(model, plan)
    return LoadReport(
        loaded=loaded,
        initialized=initialized,
        missing=plan.missing,
        unexpected=plan.unexpected,
        mismatched=tuple(plan.mismatched),
        num_bytes=plan.num_bytes,
        elapsed_s=time.perf_counter() - started,
        peak_host_bytes=meter.memory.host_bytes,
        peak_device_bytes=meter.memory.device_bytes,
    )


def _write(model: Module, binding: Binding, settings: Settings, meter: Meter, *, mmap: bool) -> tuple[str, ...]:
    """Give every bound tensor its value, and return their names."""
    names = [*binding.entries, *binding.values]
    tensors = _with_memory(model, binding, names)
    pairs = _last_per_tensor(tensors, binding.entries)
    if mmap:
        map_entries(pairs)
    else:
        stream([(PlainSink(name, tensor), entry) for name, tensor, entry in pairs], settings, meter)
    with torch.no_grad():
        for name, value in binding.values.items():
            tensors[name].copy_(value)
    for call in binding.calls:
        call()
    forget(model, _parameters_among(model, names))
    return tuple(names)


def _with_memory(model: Module, binding: Binding, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors to write, after deferred ones among them got memory."""
    deferred = [name for name in names if is_deferred(binding.tensors[name])]
    if bare := [name for name in names if binding.tensors[name].is_meta and name not in deferred]:
        raise DeferredParameterError(
            f"{shorten(bare)}: on the meta device, without a recipe that says where it belongs, so there is no memory "
            "to load into. Build the model under deferred_init() instead of torch.device('meta'), or call "
            "model.to_empty(device=...) first."
        )
    allocate(model, names=deferred)
    return {**binding.tensors, **named_state(model)} if deferred else binding.tensors


def _parameters_among(model: Module, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are parameters; only these are ever deferred or empty."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [name for name in names if name in parameters]


def _last_per_tensor(
    tensors: Mapping[str, torch.Tensor], entries: Mapping[str, Entry]
) -> list[tuple[str, torch.Tensor, Entry]]:
    """One entry for each tensor; of several for tied names the last one counts, as in ``load_state_dict``."""
    by_tensor = {id(tensors[name]): (name, tensors[name], entry) for name, entry in entries.items()}
    return list(by_tensor.values())


def stream(pairs: Sequence[tuple[Sink, Entry]], settings: Settings, meter: Meter) -> None:
    """Fill each sink from its entry. What needs scratch memory goes in batches that the host buffer could hold."""
    done = 0
    for batch in _batches(pairs, settings.host_buffer_bytes):
        segments: list[Segment] = [segment for sink, entry in batch for segment in sink.segments(entry)]
        done += transfer(segments, settings, partial(_tick, meter, done))
        for sink, _ in batch:
            sink.finish()


def _tick(meter: Meter, done_before: int, done: int) -> None:
    meter.tick(done_before + done)


def _batches(pairs: Sequence[tuple[Sink, Entry]], max_scratch: int) -> Iterator[list[tuple[Sink, Entry]]]:
    """All that needs no scratch first, then as many of the others at a time as fit, at least one."""
    yield [(sink, entry) for sink, entry in pairs if not sink.scratch_bytes(entry)]
    batch: list[tuple[Sink, Entry]] = []
    scratch = 0
    for sink, entry in pairs:
        if need := sink.scratch_bytes(entry):
            if batch and scratch + need > max_scratch:
                yield batch
                batch, scratch = [], 0
            batch.append((sink, entry))
            scratch += need
    if batch:
        yield batch


def _initialize_rest(model: Module, plan: LoadPlan) -> tuple[str, ...]:
    """Run the initializers of parameters that the checkpoint has no value for, where they have not run yet."""
    rest = (*plan.missing, *plan.mismatched)
    pending = [name for name in rest if name in plan.binding.tensors and has_recipe(plan.binding.tensors[name])]
    return tuple(initialize(model, pending)) if pending else ()
