"""Fresh processes: what they return, what they raise, how they end."""

import os
import sys
import threading
import time
from functools import partial

import pytest

from lightning_efficient_init.bench.processes import FreshProcesses, ProcessDiedError, StoppedError, in_fresh_process


class OddError(Exception):
    """Cannot be made from what it was made of."""

    def __init__(self, first, second):
        super().__init__("something odd")


def raise_odd():
    raise OddError(1, 2)


@pytest.fixture(params=["forkserver", "fork"])  # what runs here starts no threads of torch
def processes(request):
    return FreshProcesses(request.param)


def test_each_function_has_a_process_of_its_own_and_errors_come_back():
    first, second = in_fresh_process(os.getpid), in_fresh_process(os.getpid)
    assert len({first, second, os.getpid()}) == 3
    with pytest.raises(FileNotFoundError):
        in_fresh_process(os.stat, "/nothing")
    assert in_fresh_process(dict, a=1) == {"a": 1}


def test_results_larger_than_a_pipe_come_back(processes):
    assert len(processes.run(partial(bytes, 10_000_000))) == 10_000_000


def test_an_exception_that_cannot_be_sent_says_what_it_said(processes):
    with pytest.raises(RuntimeError, match="OddError: something odd"):
        processes.run(raise_odd)


def test_a_process_that_dies_is_told_from_one_that_raises(processes):
    with pytest.raises(ProcessDiedError, match="its process ended with exit code -9"):
        processes.run(die)


def die():
    os.kill(os.getpid(), 9)


def test_a_process_that_takes_too_long_is_ended(processes):
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="did not end within 2 s"):
        processes.run(partial(time.sleep, 600), timeout_s=2)
    assert time.monotonic() - started < 60


def test_nobody_is_left_when_it_is_stopped(processes, tmp_path):
    file = tmp_path / "pid"
    threading.Thread(target=stop_when_there, args=(processes, file)).start()
    with pytest.raises(StoppedError):
        processes.run(partial(write_pid_and_wait, file))
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
    with pytest.raises(StoppedError):
        processes.run(partial(time.sleep, 600))


def write_pid_and_wait(file):
    file.with_suffix(".new").write_text(str(os.getpid()))
    file.with_suffix(".new").rename(file)
    time.sleep(600)


def stop_when_there(processes, file):
    while not file.exists():
        time.sleep(0.05)
    processes.stop()


def test_packages_are_imported_once_for_all_and_a_broken_one_is_left_to_its_row():
    processes = FreshProcesses("fork")
    processes.preload(["colorsys", "no_such_package"])
    assert processes.run(partial(is_imported, "colorsys"))


def is_imported(name):
    return name in sys.modules
