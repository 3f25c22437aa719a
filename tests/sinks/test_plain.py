"""``plain_sink``: what it asks for, and what it does with it."""

import pytest
import torch
from torch import nn

from lightning_efficient_init.checkpoint import index_checkpoint
from lightning_efficient_init.sinks import plain_sink


@pytest.fixture
def entry_of(tmp_path):
    """Save a tensor and give its entry."""

    def save(tensor):
        torch.save({"t": tensor}, tmp_path / "w.pt")
        return index_checkpoint(tmp_path / "w.pt").weights["t"]

    return save


def test_contiguous_tensors_are_filled_in_place_without_scratch(device, entry_of):
    parameter = nn.Parameter(torch.zeros(3, 4, device=device))
    entry = entry_of(torch.randn(3, 4))
    sink = plain_sink("t", parameter, entry)
    (segment,) = sink.segments()
    assert sink.scratch_bytes == 0
    assert sink.device == device
    assert segment.dest.data_ptr() == parameter.data_ptr()
    assert (segment.file, segment.offset, segment.num_bytes, segment.name) == (entry.file, entry.offset, 48, "t")
    assert segment.is_raw
    assert not segment.dest.requires_grad


def test_a_cast_needs_no_scratch_and_is_not_raw(entry_of):
    entry = entry_of(torch.randn(3))
    sink = plain_sink("t", torch.zeros(3, dtype=torch.float16), entry)
    assert sink.scratch_bytes == 0
    assert not sink.segments()[0].is_raw
    assert sink.segments()[0].num_bytes == 12


@pytest.mark.parametrize(
    ("value", "target"),
    [
        (torch.randn(4, 3).t(), torch.zeros(3, 4)),
        (torch.randn(3, 4), torch.zeros(4, 3).t()),
        (torch.randn(6, 4)[::2], torch.zeros(3, 4).double()),
        (torch.randn(1, 4).expand(3, 4), torch.zeros(3, 4)),
    ],
)
def test_other_layouts_arrive_in_scratch_memory_of_the_entrys_extent(value, target, device, entry_of):
    entry = entry_of(value)
    moved = torch.empty_strided(target.shape, target.stride(), dtype=target.dtype, device=device)
    sink = plain_sink("t", moved, entry)
    (segment,) = sink.segments()
    assert sink.scratch_bytes == segment.num_bytes == entry.extent_bytes
    with open(entry.file, "rb") as file:
        file.seek(entry.offset)
        data = bytearray(file.read(entry.extent_bytes))
    segment.dest.copy_(torch.frombuffer(data, dtype=entry.dtype))
    sink.finish()
    assert torch.equal(moved.cpu(), value.to(target.dtype))
    assert moved.stride() == target.stride()


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_one_element_of_any_stride_is_seen_as_bytes(shape, entry_of):
    tensor = torch.zeros(2).as_strided(shape, (2,) * len(shape), 1)
    segment = plain_sink("t", tensor, entry_of(torch.ones(shape))).segments()[0]
    segment.dest_bytes.copy_(torch.ones(1).view(torch.uint8))
    assert tensor.item() == 1


def test_an_empty_tensor_needs_nothing(entry_of):
    entry = entry_of(torch.empty(0, 3))
    sink = plain_sink("t", torch.zeros(0, 3), entry)
    assert [segment.num_bytes for segment in sink.segments()] == [0]
    assert sink.scratch_bytes == 0
    sink.finish()


def test_looking_at_a_sink_works_on_the_meta_device(entry_of):
    sink = plain_sink("t", torch.zeros(3, device="meta"), entry_of(torch.randn(3)))
    assert sink.device.type == "meta"
    assert sink.scratch_bytes == 0
