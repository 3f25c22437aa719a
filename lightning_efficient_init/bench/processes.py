"""Fresh processes: each is forked from one that has libraries imported, and has done nothing else."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeVar

_T = TypeVar("_T")
_POLL_S = 0.1
_PRELOADED = "lightning_efficient_init.bench.row"

StartMethod = Literal["forkserver", "fork"]


class ProcessDiedError(RuntimeError):
    """A process ended without an answer: it was killed, most likely because memory ran out."""


class StoppedError(RuntimeError):
    """Whoever asked for the answer does not want it any more."""


class FreshProcesses:
    """Runs functions, each in a process of its own.

    Args:
        start_method: "forkserver" forks from a server that has this package imported. "fork" forks from this process,
            which saves the seconds that the server takes to import; it is for a process that has itself done nothing
            but import: threads that torch starts when it computes do not exist in a fork, which then waits for them.
    """

    def __init__(self, start_method: StartMethod = "forkserver") -> None:
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not initialize CUDA there
        self._start_method = start_method
        self._stopped = threading.Event()
        self._context: Any = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            self._context.set_forkserver_preload([_PRELOADED])

    def preload(self, packages: Iterable[str]) -> None:
        """Import packages once for all processes: those that import without a look at the devices."""
        if self._start_method == "fork":
            for package in packages:
                with suppress(Exception):  # which the row that needs it will tell
                    importlib.import_module(package)

    def stop(self) -> None:
        """End the process that runs, and run no other. A signal handler may call it."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def run(self, function: Callable[[], _T], timeout_s: float | None = None) -> _T:
        """Call ``function`` in a new process, and give what it returns, or raise what it raises.

        Args:
            function: What to call; it, its result and its exceptions can be pickled.
            timeout_s: After how many seconds it is ended.

        Raises:
            TimeoutError: It has been ended.
            ProcessDiedError: It ended by itself, without an answer.
            StoppedError: `stop` was called.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(sender, function))
        process.start()
        sender.close()
        try:
            self._wait_for(receiver, timeout_s)
            is_result, answer = receiver.recv()
        except EOFError as error:
            process.join()
            raise ProcessDiedError(f"its process ended with exit code {process.exitcode}") from error
        except BaseException:
            process.kill()
            raise
        finally:
            process.join()
            receiver.close()
        if is_result:
            return answer  # type: ignore[no-any-return]
        raise answer

    def _wait_for(self, receiver: Connection, timeout_s: float | None) -> None:
        # By looking, not by an exception from a signal handler: one that comes while Python forks is lost.
        started = time.monotonic()
        while not self.is_stopped:
            left_s = _POLL_S if timeout_s is None else started + timeout_s - time.monotonic()
            if receiver.poll(max(0.0, min(_POLL_S, left_s))):
                return
            if left_s <= 0:
                raise TimeoutError(f"did not end within {timeout_s:.0f} s")
        raise StoppedError("it was stopped")


def in_fresh_process(function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    """Call a function in a process that has done nothing but import this package."""
    return FreshProcesses().run(partial(function, *args, **kwargs))


def _answer(sender: Connection, function: Callable[[], object]) -> None:
    """What the new process does. A signal from the terminal is for the process that waits for it, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        answer = True, function()
    except Exception as error:
        answer = False, _picklable(error)
    sender.send(answer)


def _picklable(error: Exception) -> Exception:
    """The exception, or one that says the same: other people's may not survive the way between processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
