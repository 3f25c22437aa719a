"""Parts of tensors: what is taken and what is read are the same elements."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_efficient_init.checkpoint import Chunk, Entry
from lightning_efficient_init.load.load import stream
from lightning_efficient_init.load.pipeline import Settings
from lightning_efficient_init.load.report import Meter
from lightning_efficient_init.sharding import Block, Stretch
from lightning_efficient_init.sharding.dtensor import _chunk
from lightning_efficient_init.sinks import sink_for_part

SHAPES = [(7,), (5, 6), (4, 3, 5), (3, 4, 2, 3), (0, 4), (3, 0)]


def elements(part):
    """The elements that the part's rows name, in order."""
    return [r.start + line * r.pitch + i for r in part.rows() for line in range(r.count) for i in range(r.length)]


def cuts(size):
    """All, a run, several runs, and nothing of a dim."""
    return {((0, size),), ((size // 3, size),), ((0, size // 3), (size - size // 3, size)), ()}


def clean(runs):
    return tuple(run for run in runs if run[1] > run[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_a_block_are_what_it_takes(shape):
    whole = torch.arange(math.prod(shape)).view(shape)
    for chosen in itertools.product(*[cuts(size) for size in shape]):
        kept = tuple(map(clean, chosen))
        part = Block(shape, kept, torch.empty([sum(b - a for a, b in runs) for runs in kept]))
        assert elements(part) == part.take(whole).flatten().tolist(), kept


def test_a_block_cut_in_two_dims_is_one_stretch_of_rows():
    part = Block((8, 6), (((2, 6),), ((3, 5),)), torch.empty(4, 2))
    assert [(rows.start, rows.length, rows.count, rows.pitch) for rows in part.rows()] == [(15, 2, 4, 6)]


def test_a_stretch_is_a_range_of_the_flattened_tensor():
    whole = torch.arange(12).view(3, 4)
    part = Stretch((3, 4), 5, torch.empty(4))
    assert elements(part) == part.take(whole).tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("size", [0, 1, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_chunks_are_those_of_torch(size, count):
    chunks = torch.arange(size).chunk(count)
    for index in range(count):
        expected = chunks[index].tolist() if index < len(chunks) else []
        runs = _chunk(((0, size),), count, index)
        assert [i for run in runs for i in range(*run)] == expected


def fill(part, entry):
    with Meter(0, {torch.device("cpu")}, progress=False) as meter:
        stream([sink_for_part("w", part, entry)], Settings(), meter)


def parts_of(shape, dtype):
    yield Block(shape, tuple(((0, size),) for size in shape), torch.zeros(shape, dtype=dtype))
    yield Block(shape, (((1, 4),), ((2, 5),)), torch.zeros(3, 3, dtype=dtype))
    yield Block(shape, (((0, 1), (3, 5)), ((0, 6),)), torch.zeros(3, 6, dtype=dtype))
    yield Block(shape, (((1, 4),), ((2, 5),)), torch.zeros(3, 3, dtype=dtype).t())
    yield Stretch(shape, 7, torch.zeros(15, dtype=dtype))
    yield Stretch(shape, 30, torch.zeros(0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["one piece", "transposed", "chunks of rows", "chunks of columns", "four chunks"])
def test_a_part_is_filled_from_a_file_in_any_layout(tmp_path, dtype, layout):
    whole = torch.randn(5, 6)
    shape = (5, 6)
    blocks = {
        "chunks of rows": [(slice(0, 2), slice(0, 6)), (slice(2, 5), slice(0, 6))],
        "chunks of columns": [(slice(0, 5), slice(0, 4)), (slice(0, 5), slice(4, 6))],
        "four chunks": [(slice(*a), slice(*b)) for a in [(0, 3), (3, 5)] for b in [(0, 1), (1, 6)]],
    }
    file = tmp_path / "w.bin"
    if layout in blocks:
        data, chunks = b"xyz.", []
        for rows, columns in blocks[layout]:
            block = whole[rows, columns].contiguous()
            entry = Entry(str(file), len(data), block.dtype, tuple(block.shape), block.stride())
            chunks.append(Chunk((rows.start, columns.start), entry))
            data += block.numpy().tobytes()
        entry = Entry(str(file), 4, whole.dtype, shape, whole.stride(), tuple(chunks))
    else:
        stored = whole.t().contiguous() if layout == "transposed" else whole
        data, stride = stored.numpy().tobytes(), (1, 5) if layout == "transposed" else (6, 1)
        entry = Entry(str(file), 0, whole.dtype, shape, stride)
    file.write_bytes(data)
    for part in parts_of(shape, dtype):
        fill(part, entry)
        expected = part.take(whole.to(dtype)).reshape(part.memory.shape)
        assert torch.equal(part.memory, expected), part
