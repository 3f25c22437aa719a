"""Reading bytes by position: whole, or an error that says what was wanted."""

import os
import threading

import pytest
import torch

from lightning_efficient_init.checkpoint.file import CheckpointFile
from lightning_efficient_init.errors import CheckpointReadError, CorruptCheckpointError
from lightning_efficient_init.load.load import stream
from lightning_efficient_init.load.pipeline import Settings
from lightning_efficient_init.load.report import Meter
from lightning_efficient_init.sinks import Segment

UNREADABLE = "/proc/self/mem"  # a regular file that can be opened, and whose first bytes nobody can read

needs_unreadable = pytest.mark.skipif(not os.path.exists(UNREADABLE), reason="Linux only")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 40)
    with CheckpointFile(str(path)) as file:
        yield file


@pytest.mark.parametrize("sizes", [[1], [256, 1, 3000], [1] * 5000])
def test_any_number_of_buffers_is_filled_in_order(file, sizes):
    buffers = [bytearray(size) for size in sizes]
    file.fill(buffers, 100)
    assert b"".join(buffers) == (bytes(range(256)) * 40)[100 : 100 + sum(sizes)]


def test_buffers_at_equal_distances_are_filled_with_nothing_of_what_is_between(file):
    buffers = [bytearray(3) for _ in range(50)]
    file.fill(buffers, 7, pitch_bytes=200)
    content = bytes(range(256)) * 40
    assert buffers == [content[7 + i * 200 : 10 + i * 200] for i in range(50)]


def test_bytes_beyond_the_end_are_reported_with_the_tensor(file):
    with pytest.raises(CorruptCheckpointError, match=r"tensor 'w'.* 8 bytes at position 10236, .*ends at 10240"):
        file.fill([bytearray(4), bytearray(4)], 10_236, tensor="w")


def test_a_file_that_grows_while_it_is_asked_again_is_read(file):
    data = bytearray(8)
    timer = threading.Timer(0.1, lambda: os.truncate(file.path, 20_000))
    timer.start()
    file.fill([data], 19_000)
    timer.join()
    assert data == bytes(8)


@needs_unreadable
def test_a_file_that_the_system_fails_to_read_is_reported_after_several_attempts():
    with CheckpointFile(UNREADABLE) as file, pytest.raises(CheckpointReadError, match=r"5 attempts.*Check the disk"):
        file.fill([bytearray(8)], 0)


@needs_unreadable
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_load_says_which_tensor_the_system_failed_to_read(dtype):
    segment = Segment(UNREADABLE, 0, torch.float32, torch.zeros(4, dtype=dtype), "w")
    with pytest.raises(CheckpointReadError, match=r"self/mem', tensor 'w': expected 16 bytes at position 0") as caught:
        stream([segment], Settings(), Meter(16, set(), progress=False))
    assert caught.value.written == ("w",)
