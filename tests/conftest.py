"""What all tests share: the devices they run on."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


@pytest.fixture(autouse=True)
def as_found():
    """Leave neither a process group nor what Lightning writes to the environment when it launches to later tests.

    A script that finds ``LOCAL_RANK`` there starts no processes of its own, and waits for somebody else's forever.
    """
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def accelerator(request):
    """What two ranks run on."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return request.param


@pytest.fixture
def bytes_read():
    """Bytes that this process has asked the system to read so far, whether from a disk or not."""
    return lambda: _count("rchar")


@pytest.fixture
def reads_issued():
    """How often this process has asked the system to read so far."""
    return lambda: _count("syscr")


def _count(what):
    with open("/proc/self/io", "rb") as io:
        return int(next(line for line in io if line.startswith(f"{what}:".encode())).split()[1])
