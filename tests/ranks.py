"""Real processes, one for each rank, as ``torchrun`` would start them; and scripts that start their own."""

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

_PRELOADED = ["torch", "torch.distributed.fsdp", "lightning", "pytest"]
_OF_RANKS = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE"}


def run_ranks(function, world_size, *args, timeout_s=120):
    """Call ``function(rank, *args)`` in ``world_size`` new processes, and give what each returned, by rank.

    The environment is that of ``torchrun`` on one node; nothing is initialized. The processes are forked from a
    server that has torch and Lightning imported, and nothing else. ``function`` is found by its name in its file.

    Raises:
        RanksFailedError: With the traceback of every rank that raised, and the ranks that died or hung.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        code = function.__code__.co_filename, function.__qualname__
        target = (*code, args, folder, world_size, _free_port(), timeout_s)
        processes = [context.Process(target=_run_rank, args=(rank, *target)) for rank in range(world_size)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        problems = [f"rank {rank} was still running after {timeout_s} s\n{_read(folder, rank)}" for rank in hung]
        problems += [
            f"rank {rank} ended with exit code {process.exitcode}\n{_read(folder, rank)}"
            for rank, process in enumerate(processes)
            if rank not in hung and process.exitcode
        ]
        if problems:
            raise RanksFailedError("\n".join(problems))
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


class RanksFailedError(AssertionError):
    """Some ranks raised, died or hung."""


def run_script(command, environment, timeout_s):
    """Run a program that may start others, and give what it has printed, on both streams.

    What the environment of this process says of ranks is not handed on: a script that finds it takes itself for one of
    several processes that somebody else has started, and waits for the others.

    Raises:
        RanksFailedError: It failed, or took too long; then with the stacks of all of its processes.
    """
    environment = {name: value for name, value in environment.items() if name not in _OF_RANKS}
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            command,
            env={**environment, "PYTHONFAULTHANDLER": "1"},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        problem = _wait(process, timeout_s)
        printed.seek(0)
        if problem:
            raise RanksFailedError(f"{' '.join(command)}\n{problem}\n{printed.read()}")
        return printed.read()


def _wait(process, timeout_s):
    """What went wrong, if anything."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        for member in _members(process.pid):  # one after the other, or their words would mix
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(member, signal.SIGABRT)  # Python's fault handler prints where each thread is
                time.sleep(1)
        _kill_all(process.pid)
        process.wait()
        return f"was still running after {timeout_s} s"
    _kill_all(process.pid)
    return f"ended with exit code {process.returncode}" if process.returncode else None


def _members(group):
    """The processes of a group, the first one first: who is aborted does not see that what it waits for ends."""
    found = []
    for pid in (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == group:
                found.append(pid)
    return sorted(found)


def _kill_all(group):
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(group, signal.SIGKILL)


def _run_rank(rank, file, name, args, folder, world_size, port, timeout_s):
    size = str(world_size)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=size,
        LOCAL_WORLD_SIZE=size,
        TORCHELASTIC_RUN_ID="tests",
    )
    torch.set_num_threads(1)
    with Path(folder, f"{rank}.txt").open("w") as words:
        faulthandler.dump_traceback_later(0.9 * timeout_s, file=words)
        try:
            result = getattr(_module(file), name)(rank, *args)
            torch.save(result, Path(folder, f"{rank}.pt"))
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        except BaseException:
            words.write(traceback.format_exc())
            words.flush()
            sys.stderr.flush()
            os._exit(1)  # threads of a process group that others have left may never end
        finally:
            faulthandler.cancel_dump_traceback_later()


def _module(file):
    """The test module, which is not on the path here."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(folder, rank):
    path = Path(folder, f"{rank}.txt")
    return (path.exists() and path.read_text()) or "without a word"


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
