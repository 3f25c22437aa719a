"""Safetensors files: eight bytes of length, a JSON header of that length, then the tensors back to back.

The header is read here rather than through the safetensors package, which does not tell positions in the file. The
checks are those of its reference reader: each tensor starts where the one before it ends, the last one ends the
file, and every size is what dtype and shape make it. The free text under ``__metadata__`` is no tensor and does not
appear in the tree.

The format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import struct
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final

import torch

from lightning_efficient_init.checkpoint.entry import Entry, layout_of, row_major
from lightning_efficient_init.checkpoint.file import CheckpointFile
from lightning_efficient_init.checkpoint.format import CheckpointTree
from lightning_efficient_init.checkpoint.wording import DOWNLOAD_AGAIN, SAVE_AGAIN, explain, shorten, show
from lightning_efficient_init.errors import CorruptCheckpointError, UnsupportedCheckpointError

MAX_HEADER_BYTES: Final = 100_000_000  # as in the reference reader
_MAX_SIZE: Final = (1 << 63) - 1
_MAX_DIMS: Final = 64
_KEYS: Final = {"dtype", "shape", "data_offsets"}
_WORDS: Final = tuple(f'"{key}"'.encode() for key in _KEYS)

_DTYPE_NAMES: Final = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}
_DTYPES: Final[dict[str, torch.dtype]] = {
    key: getattr(torch, name) for key, name in _DTYPE_NAMES.items() if hasattr(torch, name)
}


class Safetensors:
    """One safetensors file."""

    name = "safetensors"

    def recognize(self, path: str, head: bytes | None) -> bool:
        """Whether a length and a JSON object follow each other at the start of the file."""
        return head is not None and len(head) > 8 and head[8:9] == b"{" and not head.startswith(b"{")

    def read(self, path: str, *, weights_only: bool) -> CheckpointTree:
        """Reads the tree, a dict of entries; raises as `index_checkpoint` does."""
        with CheckpointFile(path) as file:
            return CheckpointTree(path, self.name, (file.path,), read_entries(file))


def read_entries(file: CheckpointFile) -> dict[str, Entry]:
    """Reads the header of an open safetensors file: tensor name to entry, in the order of the header."""
    header, data_offset = _read_header(file)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, info, data_offset) for name, info in header.items()}
    _check_packed(file, header, data_offset)
    return entries


def _read_header(file: CheckpointFile) -> tuple[dict[str, Any], int]:
    """Gives the parsed header and the position of the first tensor."""
    (num_bytes,) = struct.unpack("<Q", file.read(0, 8, "the length of the safetensors header"))
    if num_bytes > min(MAX_HEADER_BYTES, file.num_bytes - 8):
        limit = f"a header of at most {MAX_HEADER_BYTES} bytes within the file's {file.num_bytes}"
        raise _corrupt(file, limit, f"one of {num_bytes}")
    text = file.read(8, num_bytes, "the safetensors header")
    try:
        header = _parse(text)
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, "a JSON header", f"{type(error).__name__}: {shorten(error)}") from error
    if not isinstance(header, dict):
        raise _corrupt(file, "a JSON object as header", type(header).__name__)
    return header, 8 + num_bytes


def _parse(text: bytes) -> Any:
    """Parses a header, and refuses one that says a thing twice.

    To look at every object for that takes longer than all the rest. It is not needed where each word of a tensor's
    description occurs once for each tensor, spelled out.
    """
    header = json.loads(text.decode("utf-8"))
    if b"\\" not in text and isinstance(header, dict):
        num_tensors = len(header) - ("__metadata__" in header)
        if all(text.count(word) == num_tensors for word in _WORDS) and text.count(b'"__metadata__"') <= 1:
            return header
    return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object, and refuses one that says a thing twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object with a duplicate key")
    return result


def _entry(file: CheckpointFile, name: str, info: Any, data_offset: int) -> Entry:
    """Makes an entry of what the header says of one tensor, without a second look where all is in order."""
    try:
        shape, (start, end) = info["shape"], info["data_offsets"]
        dtype, sizes, strides, num_bytes = _kind(info["dtype"], *shape)
    except (KeyError, TypeError, ValueError):
        return _checked_entry(file, name, info, data_offset)
    is_sound = type(shape) is list and type(start) is type(end) is int and start >= 0 and end - start == num_bytes
    if is_sound and data_offset + end <= file.num_bytes:
        return Entry(file.path, data_offset + start, dtype, sizes, strides)
    return _checked_entry(file, name, info, data_offset)


@lru_cache(maxsize=4096, typed=True)  # of many tensors, most are like another one; 1, 1.0 and true differ
def _kind(dtype: Any, *shape: Any) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]:
    """Gives dtype, sizes, strides and bytes of a tensor of the usual kind."""
    sizes = None if dtype == "F4" else _sizes([*shape])
    if sizes is None:
        raise ValueError("not of the usual kind")
    strides = row_major(sizes)
    return _DTYPES[dtype], sizes, strides, layout_of(sizes, strides).numel * _DTYPES[dtype].itemsize


def _checked_entry(file: CheckpointFile, name: str, info: Any, data_offset: int) -> Entry:
    """Makes an entry step by step, and says what is wrong."""
    if not isinstance(info, dict) or not info.keys() >= _KEYS:
        raise _corrupt(file, "dtype, shape and data_offsets", show(info), name)
    shape, span = info["shape"], info["data_offsets"]
    sizes = _sizes(shape)
    if sizes is None or not _is_span(span):
        raise _corrupt(
            file, "a shape and two offsets that are not negative", f"shape {show(shape)}, offsets {show(span)}", name
        )
    dtype = _dtype(file, name, info["dtype"])
    if info["dtype"] == "F4":
        sizes = _packed_in_pairs(file, name, sizes)
    strides = row_major(sizes)
    start, end = span
    num_bytes = layout_of(sizes, strides).numel * dtype.itemsize
    if end - start != num_bytes:
        raise _corrupt(file, f"{num_bytes} bytes, from its dtype and shape", f"offsets {span}", name)
    if data_offset + end > file.num_bytes:
        raise _corrupt(file, f"bytes up to {data_offset + end}", f"a file of {file.num_bytes} bytes (truncated)", name)
    return Entry(file.path, data_offset + start, dtype, sizes, strides)


def _dtype(file: CheckpointFile, name: str, dtype: Any) -> torch.dtype:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    if found is None:
        raise UnsupportedCheckpointError(
            explain(
                file.path,
                tensor=name,
                expected=f"one of the dtypes {', '.join(_DTYPES)}",
                found=f"dtype {show(dtype)}, which torch {torch.__version__} does not have",
                todo="Save it in another dtype, or use a newer torch.",
            )
        )
    return found


def _packed_in_pairs(file: CheckpointFile, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Two 4-bit numbers share a byte, which is one element to torch; the header counts the numbers."""
    if not shape or shape[-1] % 2:
        raise _corrupt(file, "an even number of 4-bit numbers in the last dimension", f"shape {list(shape)}", name)
    return (*shape[:-1], shape[-1] // 2)


def _check_packed(file: CheckpointFile, header: dict[str, Any], data_offset: int) -> None:
    """The format knows no gaps and no overlaps: a byte that two tensors claim, or none, is a damaged header."""
    end = 0
    spans = [(info["data_offsets"], name) for name, info in header.items()]
    for (start, stop), name in sorted(spans, key=itemgetter(0)):
        if start != end:
            expected = f"its first byte at {data_offset + end}, after the tensor before it"
            raise _corrupt(file, expected, f"at {data_offset + start}", name)
        end = stop
    if data_offset + end != file.num_bytes:
        raise _corrupt(file, f"a file of {data_offset + end} bytes, as its header says", f"{file.num_bytes} bytes")


def _sizes(shape: Any) -> tuple[int, ...] | None:
    """The sizes of a shape; None if it is none."""
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        return None
    return tuple(shape) if all(type(size) is int and 0 <= size <= _MAX_SIZE for size in shape) else None


def _is_span(span: Any) -> bool:
    """Whether these are two offsets."""
    if not isinstance(span, list) or len(span) != 2:
        return False
    start, end = span
    return type(start) is type(end) is int and 0 <= start <= _MAX_SIZE and 0 <= end <= _MAX_SIZE


def _corrupt(
    file: CheckpointFile, expected: object, found: object, tensor: str | None = None
) -> CorruptCheckpointError:
    todo = DOWNLOAD_AGAIN if tensor is None else SAVE_AGAIN
    return CorruptCheckpointError(explain(file.path, tensor=tensor, expected=expected, found=found, todo=todo))
