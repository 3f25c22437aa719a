"""All rows: which ones can run, their files, rounds of fresh processes."""

from __future__ import annotations

import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning as L
import torch

from lightning_efficient_init.bench import cache, limits
from lightning_efficient_init.bench.files import all_files, check_space, form_of, safetensors_files, write_files
from lightning_efficient_init.bench.processes import FreshProcesses, ProcessDiedError, StartMethod, StoppedError
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

_FILE_CACHED = 0.98
_MIN_COLD_BYTES = 100 << 20  # a disk that has less to read has not begun to stream


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
        cold: Whether rows also run with files that are not in the page cache; None for files of more than 100 MiB.
        only: A regular expression; of those rows, the ones in whose name or title it is found.
        stock_rounds: How often the ways that are not ours run, which take long; None for as often as ours.
        limit_minutes: After how long it stops, with what it has until then. A row that took longer than what is left
            is not run again.
    """

    model: str = "tiny"
    checkpoint: str | None = None
    ways: Sequence[str] = ("all",)
    rounds: int = 3
    precision: str = "bf16-true"
    accelerator: str = "auto"
    folder: str | None = None
    cold: bool | None = None
    only: str = ""
    stock_rounds: int | None = None
    limit_minutes: float | None = None

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise UsageError(f"precision {self.precision!r}: expected one of {', '.join(DTYPES)}.")
        for name, rounds in (("rounds", self.rounds), ("stock_rounds", self.stock_rounds)):
            if rounds is not None and rounds < 1:
                raise UsageError(f"{name}: expected at least 1, found {rounds}.")
        if self.limit_minutes is not None and not self.limit_minutes > 0:
            raise UsageError(f"limit_minutes: expected more than 0, found {self.limit_minutes:g}.")
        if self.folder is not None and not os.path.isdir(self.folder):
            raise UsageError(
                f"folder {self.folder!r}: expected a folder, found none there. Create it, or leave --folder out for "
                "the system's folder of temporary files."
            )

    def rounds_of(self, way: Way) -> int:
        """How often it runs."""
        return self.rounds if way.group == "ours" else self.stock_rounds or self.rounds


def run_bench(options: Options, on_step: Callable[[str, int, int], None] | None = None) -> Results:
    """Measure all rows that can run here; see `Bench`."""
    return Bench(options, on_step=on_step).run()


class Bench:
    """One benchmark: the rows that can run here, round by round.

    Args:
        options: What to measure.
        on_step: Called before each step with what it is, its number, and how many there will be.
        on_row: Called with each row's measurement, as soon as it is there.
        start_method: See `FreshProcesses`.

    Attributes:
        results: What has been measured so far.

    Raises:
        UsageError: A name is unknown.
    """

    def __init__(
        self,
        options: Options,
        *,
        on_step: Callable[[str, int, int], None] | None = None,
        on_row: Callable[[Row], None] | None = None,
        start_method: StartMethod = "forkserver",
    ) -> None:
        self._started = time.monotonic()
        self._options = options
        self._on_step = on_step
        self._on_row = on_row
        self._step = self._num_steps = 0
        self._took_s: dict[tuple[str, str], float] = {}
        self._files: list[str] = []
        chosen = _chosen(options)
        self._processes = FreshProcesses(start_method)
        task, machine = self._processes.run(partial(_look, options))
        self.results = Results(machine, task, options.rounds)
        self._task = task  # with the paths of files that are written for it
        self._ways = self._runnable(chosen)
        if task.accelerator == "cpu":  # elsewhere some of them look for devices when they are imported
            self._processes.preload({package for way in self._ways.values() for package in way.packages})

    def _runnable(self, chosen: Mapping[str, Way]) -> dict[str, Way]:
        """What nothing stands against; the rest is noted."""
        task = self.results.task
        intended = task if task.paths else replace(task, paths={way.form: "" for way in chosen.values()})
        obstacles = {name: way.obstacle(intended, available_bytes()) for name, way in chosen.items()}
        self.results.not_run |= {name: reason for name, reason in obstacles.items() if reason is not None}
        return {name: way for name, way in chosen.items() if obstacles[name] is None}

    def run(self) -> Results:
        """Measure.

        Raises:
            UsageError: There is no room for the files.
        """
        with tempfile.TemporaryDirectory(dir=self._options.folder, prefix="efficient-init-bench-") as folder:
            try:
                if self._ways:
                    self._prepare(folder)
                    self._run_rounds()
            except TimeoutError:
                pass  # what was not reached is said below
            except StoppedError:
                self.results.notes.append("the rest: it was stopped")
                return self.results
            self._note_what_is_missing()
        return self.results

    def stop(self) -> None:
        """End the row that runs; ``run`` returns what was measured until then. A signal handler may call it."""
        self._processes.stop()

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._processes.is_stopped

    def _prepare(self, folder: str) -> None:
        task = self._task
        if not task.paths:
            forms = {way.form for way in self._ways.values()}
            check_space(folder, task.num_bytes, forms)
            self._say(f"writing {task.num_bytes * len(forms) / 1e9:.2f} GB of random weights")
            self._task = replace(task, paths=self._in_time(partial(write_files, task, folder, forms)))
        self._files = all_files(self._task)
        cache.warm(self._files)

    def _run_rounds(self) -> None:
        options = self._options
        caches = ["warm", "cold"] if self._is_cold_wanted() and self._can_evict() else ["warm"]
        self._num_steps = self._step + len(caches) * (options.rounds + sum(map(options.rounds_of, self._ways.values())))
        for i in range(options.rounds):
            for state in caches:
                self._measure_limits(state)
                for name, way in [*self._ways.items()][::-1]:  # the slow ones last, if time is limited
                    if i < options.rounds_of(way):
                        self._say(f"{name}, {state}, round {i + 1} of {options.rounds_of(way)}")
                        self._run_row(name, state, check=i == 0)

    def _is_cold_wanted(self) -> bool:
        wanted, num_bytes = self._options.cold, sum(map(os.path.getsize, self._files))
        if wanted is None and num_bytes < _MIN_COLD_BYTES:
            self.results.notes.append(
                f"cold: not run, {num_bytes / 1e6:.0f} MB say little about a disk; --cold runs it"
            )
            return False
        return wanted is not False

    def _can_evict(self) -> bool:
        cache.evict(self._files)
        share = cache.cached_share(self._files)
        if share is not None and share <= 1 - _FILE_CACHED:
            return True
        self.results.notes.append("cold: not run, the file system keeps the files in the page cache")
        return False

    def _set_cache(self, state: str) -> None:
        if state == "cold":
            cache.evict(self._files)
        elif (cache.cached_share(self._files) or 0) < _FILE_CACHED:
            cache.warm(self._files)
            share = cache.cached_share(self._files)
            note = "the page cache does not hold all the files: warm rows read from the disk, too"
            if share is not None and share < _FILE_CACHED and note not in self.results.notes:
                self.results.notes.append(note)

    def _measure_limits(self, state: str) -> None:
        self._say(f"the machine's limits, {state}")
        self._set_cache(state)
        task = self._task
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
        rate = self._in_time(partial(function, *args))
        self.results.limits.setdefault(name, []).append(rate)

    def _run_row(self, name: str, state: str, *, check: bool) -> None:
        left_s, started = self._left_s(), time.monotonic()
        if left_s is not None and left_s < self._took_s.get((name, state), 0):
            return
        try:
            self._set_cache(state)
            row = self._in_time(partial(measure, name, self._task, state, check=check))
        except TimeoutError:
            pass  # how often it did run is said at the end
        except StoppedError:
            raise
        except ProcessDiedError as error:
            self._drop(name, f"{error}; most likely the host's memory did not suffice")
        except Exception as error:  # other people's code, which may raise anything
            self._drop(name, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        else:
            self._took_s[name, state] = time.monotonic() - started
            self.results.rows.append(row)
            if self._on_row is not None:
                self._on_row(row)

    def _in_time(self, function: Callable[[], Any]) -> Any:
        """Call it in a fresh process, which has the time that is left."""
        return self._processes.run(function, self._left_s())

    def _left_s(self) -> float | None:
        limit = self._options.limit_minutes
        return None if limit is None else max(0.0, self._started + 60 * limit - time.monotonic())

    def _drop(self, name: str, reason: str) -> None:
        del self._ways[name]
        self.results.not_run[name] = reason

    def _note_what_is_missing(self) -> None:
        for name, way in self._ways.items():
            for state in dict.fromkeys(["warm", *(row.cache for row in self.results.rows)]):
                count = sum((row.way, row.cache) == (name, state) for row in self.results.rows)
                if count < self._options.rounds_of(way):
                    self.results.notes.append(
                        f"{name}, {state}: {count} of {self._options.rounds_of(way)} rounds; the rest did not fit the "
                        f"limit of {self._options.limit_minutes} minutes"
                    )

    def _say(self, what: str) -> None:
        self._step += 1
        if self._on_step is not None:
            self._on_step(what, self._step, max(self._step, self._num_steps))


def _chosen(options: Options) -> dict[str, Way]:
    chosen: dict[str, Way] = {}
    for name in options.ways:
        if name not in GROUPS and name not in WAYS:
            raise UsageError(f"way {name!r}: expected some of {', '.join([*GROUPS, *WAYS])}.")
        chosen |= GROUPS.get(name) or {name: WAYS[name]}
    try:
        found = {name: way for name, way in WAYS.items() if name in chosen and way.is_called(options.only, name)}
    except re.error as error:
        raise UsageError(f"only {options.only!r}: expected a regular expression; {error}.") from error
    if not found:
        raise UsageError(f"only {options.only!r}: expected a part of a name or a title of {', '.join(chosen)}.")
    return found


def _look(options: Options) -> tuple[Task, dict[str, Any]]:
    """What is loaded, and on what; in a process of its own, as it computes and asks for devices."""
    accelerator = options.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    elif accelerator == "cuda" and not torch.cuda.is_available():
        raise UsageError("accelerator 'cuda': expected a GPU that torch can use, found none. Pass --accelerator cpu.")
    paths = {} if options.checkpoint is None else {form_of(options.checkpoint): os.path.abspath(options.checkpoint)}
    with deferred_init():
        model = constructor_of(options.model)()
    numel = sum({id(tensor): tensor.numel() for tensor in named_state(model).values()}.values())
    num_bytes = numel * DTYPES[options.precision].itemsize
    task = Task(options.model, paths, options.precision, accelerator, num_bytes)
    return task, _machine(task)


def _machine(task: Task) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if task.accelerator == "cuda" else _processor(),
        "cores": available_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": L.__version__,
    }


def _processor() -> str:
    """The processor's name, from ``/proc/cpuinfo`` (Linux)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line for line in file if line.startswith("model name")).partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or "CPU"
