"""Real processes, one for each rank, as ``torchrun`` would start them."""

import importlib.util
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

_PRELOADED = ["torch", "torch.distributed.fsdp", "lightning", "pytest"]


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
        target = (function.__code__.co_filename, function.__qualname__, args, folder, world_size, _free_port())
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
        problems = [f"rank {rank} was still running after {timeout_s} s" for rank in hung]
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


def _run_rank(rank, file, name, args, folder, world_size, port):
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
    try:
        result = getattr(_module(file), name)(rank, *args)
        torch.save(result, Path(folder, f"{rank}.pt"))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)  # threads of a process group that others have left may never end


def _module(file):
    """The test module, which is not on the path here."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(folder, rank):
    path = Path(folder, f"{rank}.txt")
    return path.read_text() if path.exists() else "without a word"


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
