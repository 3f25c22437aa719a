"""Files to read, and how to compare what was read."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_efficient_init.checkpoint import Entry, map_leaves, read_entry

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.fixture
def state_dict() -> dict[str, torch.Tensor]:
    """Tensors of every dtype and layout that a state dict may have."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    tensors = module.state_dict()
    base = torch.randn(6, 10)
    for dtype in DTYPES:
        tensors[str(dtype)] = (torch.randn(2, 3) * 4).abs().to(dtype)
    tensors["base"] = base
    tensors["view"] = base[2:4].t()
    tensors["every other"] = base[::2, 1::3]
    tensors["expanded"] = base[0, 0].expand(3, 4)
    tensors["tied"] = base
    tensors["empty"] = torch.empty(0, 3)
    tensors["empty view"] = base[6:]
    tensors["scalar"] = torch.tensor(3.0)
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2))
    tensors["channels last"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return tensors


def _bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).flatten()
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


@pytest.fixture
def assert_same() -> Callable[[Any, Any], None]:
    """Compares a tree of entries with the tree that was saved: types, keys, and tensors bit for bit."""

    def compare(found: Any, expected: Any) -> None:
        if isinstance(expected, torch.Tensor):
            assert isinstance(found, Entry)
            tensor = read_entry(found)
            assert tensor.dtype == expected.dtype
            assert tensor.shape == expected.shape
            assert tensor.stride() == expected.stride()
            assert _bits(tensor) == _bits(expected)
        elif isinstance(expected, dict):
            assert type(found) is type(expected)
            assert list(found) == list(expected)
            assert getattr(found, "_metadata", None) == getattr(expected, "_metadata", None)
            for key in expected:
                compare(found[key], expected[key])
        elif isinstance(expected, list | tuple):
            assert type(found) is type(expected)
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                compare(one, other)
        else:
            assert type(found) is type(expected)
            assert found == expected

    return compare


@pytest.fixture
def assert_inside() -> Callable[[Any], None]:
    """Checks that all entries of a tree are inside their files."""

    def check(entry: Entry, _: Any) -> Entry:
        assert entry.offset >= 0
        assert entry.offset + entry.extent_bytes <= Path(entry.file).stat().st_size
        return entry

    return lambda tree: map_leaves(tree, Entry, check)


@pytest.fixture
def write_torch_zip(tmp_path: Path) -> Callable[..., Path]:
    """Writes a zip archive as torch would, around any pickle and any members."""

    def write(pickled: bytes, members: dict[str, bytes] | None = None, **options: Any) -> Path:
        path = tmp_path / "made.pt"
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", **options) as archive:
            archive.writestr("made/data.pkl", pickled)
            for name, data in (members or {}).items():
                archive.writestr(f"made/{name}", data)
        path.write_bytes(content.getvalue())
        return path

    return write
