"""All rows: which ones can run, their files, rounds of fresh processes."""

from __future__ import annotations

import multiprocessing
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning as L
import torch

from lightning_efficient_init.bench import cache, limits
from lightning_efficient_init.bench.files import all_files, check_space, form_of, safetensors_files, write_files
from lightning_efficient_init.bench.results import Results
from lightning_efficient_init.bench.row import Row, measure
from lightning_efficient_init.bench.task import DTYPES, Task
from lightning_efficient_init.bench.ways import GROUPS, WAYS, Way
from lightning_efficient_init.cores import available_cores
from lightning_efficient_init.deferred import deferred_init
from lightning_efficient_init.errors import UsageError
from lightning_efficient_init.load.bind import named_state
from lightning_efficient_init.memory import available_bytes
from lightning_efficient_init.model_names import constructor_of

_T = TypeVar("_T")
_FILE_CACHED = 0.98
_PRELOADED = ["lightning_efficient_init.bench.row"]


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure.

    Attributes:
        model: The model's name, see `constructor_of`.
        checkpoint: An existing file or folder to load; None writes random weights, and deletes them afterwards.
        ways: Names of rows or of groups of them ("all", "lightning", "ours", "others").
        rounds: How often each row runs.
        precision: "bf16-true", "16-true" or "32-true".
        accelerator: "cpu", "cuda", or "auto".
        folder: Where the files go; None for the system's folder of temporary files.
        cold: Whether rows also run with files that are not in the page cache.
    """

    model: str = "tiny"
    checkpoint: str | None = None
    ways: Sequence[str] = ("all",)
    rounds: int = 3
    precision: str = "bf16-true"
    accelerator: str = "auto"
    folder: str | None = None
    cold: bool = True


def run_bench(options: Options, on_step: Callable[[str, int, int], None] | None = None) -> Results:
    """Measure all rows that can run here.

    Args:
        options: What to measure.
        on_step: Called before each step with what it is, its number, and how many there will be.

    Raises:
        UsageError: A name is unknown, or there is no room for the files.
    """
    chosen = _chosen(options.ways)
    task = _task(options)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="efficient-init-bench-") as folder:
        results = Results(_machine(task), task, options.rounds)
        runnable = {}
        forms = {way.form for way in chosen.values()} if options.checkpoint is None else set(task.paths)
        intended = _with_paths(task, dict.fromkeys(forms, "")) if options.checkpoint is None else task
        for name, way in chosen.items():
            if (reason := way.obstacle(intended, available_bytes())) is None:
                runnable[name] = way
            else:
                results.not_run[name] = reason
        return _Rounds(results, runnable, options, on_step).run(folder)


def _chosen(names: Sequence[str]) -> dict[str, Way]:
    chosen: dict[str, Way] = {}
    for name in names:
        if name not in GROUPS and name not in WAYS:
            raise UsageError(f"way {name!r}: expected some of {', '.join([*GROUPS, *WAYS])}.")
        chosen |= GROUPS.get(name) or {name: WAYS[name]}
    return {name: way for name, way in WAYS.items() if name in chosen}


def _task(options: Options) -> Task:
    if options.precision not in DTYPES:
        raise UsageError(f"precision {options.precision!r}: expected one of {', '.join(DTYPES)}.")
    if options.rounds < 1:
        raise UsageError(f"rounds: expected at least 1, found {options.rounds}.")
    accelerator = options.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    paths = {} if options.checkpoint is None else {form_of(options.checkpoint): os.path.abspath(options.checkpoint)}
    with deferred_init():
        model = constructor_of(options.model)()
    numel = sum({id(tensor): tensor.numel() for tensor in named_state(model).values()}.values())
    num_bytes = numel * DTYPES[options.precision].itemsize
    return Task(options.model, paths, options.precision, accelerator, num_bytes)


def _with_paths(task: Task, paths: Mapping[str, str]) -> Task:
    return Task(task.model, paths, task.precision, task.accelerator, task.num_bytes)


def _machine(task: Task) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if task.accelerator == "cuda" else platform.processor() or "CPU",
        "cores": available_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": L.__version__,
    }


def in_fresh_process(function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    """Run a function in a process that has done nothing but import this package.

    Such processes are forked from a server that has the libraries imported and has not touched a device.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not initialize CUDA there
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


class _Rounds:
    """The rows of one benchmark, round by round.

    Args:
        results: Where measurements go.
        ways: What can run.
        options: What was asked for.
        on_step: See `run_bench`.
    """

    def __init__(
        self,
        results: Results,
        ways: dict[str, Way],
        options: Options,
        on_step: Callable[[str, int, int], None] | None,
    ) -> None:
        self._results = results
        self._ways = ways
        self._options = options
        self._on_step = on_step
        self._step = 0

    def run(self, folder: str) -> Results:
        if not self._ways:
            return self._results
        self._prepare(folder)
        caches = ["warm", "cold"] if self._options.cold and self._can_evict() else ["warm"]
        total = 1 + self._options.rounds * len(caches) * (1 + len(self._ways))
        for i in range(self._options.rounds):
            for state in caches:
                self._measure_limits(state, total)
                for name in [*self._ways]:
                    self._note(f"{name}, {state}, round {i + 1} of {self._options.rounds}", total)
                    self._set_cache(state)
                    self._run_row(name, state, check=i == 0)
        return self._results

    def _prepare(self, folder: str) -> None:
        task = self._results.task
        if not task.paths:
            forms = {way.form for way in self._ways.values()}
            check_space(folder, task.num_bytes, forms)
            self._note(f"writing {task.num_bytes * len(forms) / 1e9:.2f} GB of random weights", 1)
            task = _with_paths(task, in_fresh_process(write_files, task, folder, forms))
        self._results.task = task
        self._files = all_files(task)
        cache.warm(self._files)

    def _can_evict(self) -> bool:
        cache.evict(self._files)
        share = cache.cached_share(self._files)
        if share is not None and share <= 1 - _FILE_CACHED:
            return True
        self._results.notes.append("cold: not run, the file system keeps the files in the page cache")
        return False

    def _set_cache(self, state: str) -> None:
        if state == "cold":
            cache.evict(self._files)
        elif (cache.cached_share(self._files) or 0) < _FILE_CACHED:
            cache.warm(self._files)
            share = cache.cached_share(self._files)
            note = "the page cache does not hold all the files: warm rows read from the disk, too"
            if share is not None and share < _FILE_CACHED and note not in self._results.notes:
                self._results.notes.append(note)

    def _measure_limits(self, state: str, total: int) -> None:
        self._note(f"the machine's limits, {state}", total)
        self._set_cache(state)
        task = self._results.task
        form, path = next(iter(task.paths.items()))
        files = safetensors_files(path) if form == "safetensors" else [path]
        if state == "cold":
            self._add_limit("disk", limits.read_rate, files)
            return
        self._add_limit("page cache", limits.read_rate, files)
        if task.accelerator == "cpu":
            self._add_limit("page cache to new memory", limits.fill_rate, files)
        else:
            self._add_limit("host to device", limits.device_rate, task)
            self._add_limit("page cache to device", limits.ring_rate, files, task)

    def _add_limit(self, name: str, function: Callable[..., float], *args: Any) -> None:
        self._results.limits.setdefault(name, []).append(in_fresh_process(function, *args))

    def _run_row(self, name: str, state: str, *, check: bool) -> None:
        try:
            row: Row = in_fresh_process(measure, name, self._results.task, state, check=check)
        except BrokenProcessPool:
            self._drop(name, "its process was killed; most likely the host's memory did not suffice")
        except Exception as error:  # other people's code, which may raise anything
            self._drop(name, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        else:
            self._results.rows.append(row)

    def _drop(self, name: str, reason: str) -> None:
        del self._ways[name]
        self._results.not_run[name] = reason

    def _note(self, what: str, total: int) -> None:
        self._step += 1
        if self._on_step is not None:
            self._on_step(what, self._step, total)
