"""Safetensors files, and headers that lie."""

import json
import struct

import pytest
import safetensors.torch
import torch

from lightning_efficient_init.checkpoint import index_checkpoint
from lightning_efficient_init.errors import CorruptCheckpointError, UnsupportedCheckpointError


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def info(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_every_tensor_is_found_bit_for_bit(tmp_path, state_dict, assert_same):
    tensors = {
        key: value.contiguous().clone() for key, value in state_dict.items() if value.dtype in safetensors.torch._SIZE
    }
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    index = index_checkpoint(path)
    assert index.format == "safetensors"
    assert index.weights.keys() == tensors.keys()
    loaded = safetensors.torch.load_file(path)
    assert_same({key: index.weights[key] for key in tensors}, {key: loaded[key] for key in tensors})


def test_the_name_of_the_file_does_not_matter(tmp_path):
    path = write(tmp_path / "weights.pt", {"w": info()}, bytes(8))
    assert index_checkpoint(path).format == "safetensors"


def test_a_file_without_tensors_is_read(tmp_path):
    assert index_checkpoint(write(tmp_path / "a", {"__metadata__": {"format": "pt"}})).weights == {}


def test_dtypes_that_the_package_cannot_write_are_read(tmp_path):
    header = {"e8": info((4,), (0, 4), "F8_E8M0"), "f4": info((2, 4), (4, 8), "F4")}
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch does not have these dtypes")
    weights = index_checkpoint(write(tmp_path / "a", header, bytes(8))).weights
    assert (weights["e8"].dtype, weights["e8"].shape) == (torch.float8_e8m0fnu, (4,))
    assert (weights["f4"].dtype, weights["f4"].shape) == (torch.float4_e2m1fn_x2, (2, 2))


def test_an_unknown_dtype_is_refused_by_tensor_and_name(tmp_path):
    path = write(tmp_path / "a", {"layer.w": info(dtype="F6_E2M3")}, bytes(8))
    with pytest.raises(UnsupportedCheckpointError, match=r"'layer\.w'.*F6_E2M3"):
        index_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ({"w": info(offsets=(0, 12))}, "'w'.*8 bytes"),
        ({"w": info(offsets=(8, 0))}, "'w'.*8 bytes"),
        ({"w": info((3,), (0, 12))}, "'w'.*truncated"),
        ({"w": info((1,), (4, 8))}, "'w'.*first byte"),
        ({"w": info(), "v": info()}, "'v'.*first byte"),
        ({"w": info((1,), (0, 4))}, "8 bytes|bytes, as its header says"),
        ({"w": info((-2,), (0, 8))}, "'w'.*not negative"),
        ({"w": info((2.0,), (0, 8))}, "'w'.*not negative"),
        ({"w": info((True, 2), (0, 8))}, "'w'.*not negative"),
        ({"w": {**info((), (0, 4)), "shape": ""}}, "'w'.*not negative"),
        ({"w": {**info((), (0, 4)), "shape": {}}}, "'w'.*not negative"),
        ({"w": info((2**40, 2**40), (0, 8))}, "'w'.*expected"),
        ({"w": info((1,) * 100, (0, 4))}, "'w'"),
        ({"w": info((10**30,), (0, 8))}, "'w'"),
        ({"w": {"dtype": "F32"}}, "'w'.*data_offsets"),
        ({"w": 3}, "'w'"),
        (b'{"w": 1, "w": 2}', "duplicate key"),
        (b"{nonsense", "JSON"),
        (b"{" + b'"a":[' * 100_000, "JSON"),
        (b'{"\xff": 1}', "JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "JSON|'a'"),
    ],
)
def test_a_header_that_lies_is_reported(tmp_path, header, found):
    with pytest.raises(CorruptCheckpointError, match=found):
        index_checkpoint(write(tmp_path / "a", header, bytes(8)))


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 10**8 + 1, 100])
def test_an_absurd_header_size_is_reported(tmp_path, size):
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", size) + b'{"w": 1}')
    with pytest.raises(CorruptCheckpointError, match=str(size)):
        index_checkpoint(path)


def test_a_file_cut_anywhere_is_reported(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.ones(3), "b": torch.ones(2)}, path)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(CorruptCheckpointError, match=r"a\.safetensors"):
            index_checkpoint(path)
