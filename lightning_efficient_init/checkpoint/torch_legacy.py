"""Checkpoints of ``torch.save`` before torch 1.6, or with ``_use_new_zipfile_serialization=False``.

Five pickles in a row (a magic number, a version, the machine, the object, the storages' keys), then the storages in
the order of the keys, each one its number of elements (int64) and its bytes. Where a storage is follows from the
sizes of those before it, and these from the element types that the object's pickle gives them.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from lightning_efficient_init.checkpoint.file import CheckpointFile
from lightning_efficient_init.checkpoint.format import CheckpointTree
from lightning_efficient_init.checkpoint.tensors import StorageError, StoredStorage, resolve_tensors
from lightning_efficient_init.checkpoint.trusted import unpickle_trusted
from lightning_efficient_init.checkpoint.unpickle import (
    MAX_PICKLE_BYTES,
    SafeUnpickler,
    TruncatedPickleError,
    stored_storage,
)
from lightning_efficient_init.checkpoint.wording import DOWNLOAD_AGAIN, explain, show
from lightning_efficient_init.errors import CorruptCheckpointError, UnsupportedCheckpointError

MAGIC: Final = 0x1950A86A20F9469CFC6C
_MAGIC_BYTES: Final = MAGIC.to_bytes(10, "little")
_VERSION: Final = 1001
_FIRST_BYTES: Final = 1 << 24


class LegacyTorch:
    """What ``torch.save`` wrote before it wrote zip archives."""

    name = "legacy torch"

    def recognize(self, path: str, head: bytes | None) -> bool:
        """Whether the file starts with a pickle of torch's magic number."""
        return head is not None and head.startswith(b"\x80") and _MAGIC_BYTES in head[:32]

    def read(self, path: str, *, weights_only: bool) -> CheckpointTree:
        """Reads the tree; raises as `index_checkpoint` does."""
        with CheckpointFile(path) as file:
            reader = _Reader(file)
            tree = reader.read(weights_only=weights_only)
            return CheckpointTree(path, self.name, (file.path,), tree)


class _Reader:
    """One open legacy file."""

    def __init__(self, file: CheckpointFile) -> None:
        self._file = file
        self._storages: dict[Any, StoredStorage] = {}
        self._offsets: dict[Any, tuple[int, int]] = {}  # key -> position of its first byte, size in bytes

    def read(self, *, weights_only: bool) -> Any:
        tree, keys, end = self._read_pickles(weights_only=weights_only)
        self._place_storages(keys, end)
        return resolve_tensors(tree, self._file.path, self._locate)

    def _read_pickles(self, *, weights_only: bool) -> tuple[Any, Any, int]:
        """Gives the object, the keys of the storages, and the position of the first one.

        Nothing says where the pickles end, so a first part of the file is tried, then a longer one.
        """
        num_bytes = _FIRST_BYTES
        while True:
            data = self._file.read(0, min(num_bytes, self._file.num_bytes))
            try:
                return self._unpickle(data, weights_only=weights_only)
            except TruncatedPickleError:
                if len(data) == self._file.num_bytes or num_bytes >= MAX_PICKLE_BYTES:
                    raise self._corrupt("whole pickles", f"only their first {len(data)} bytes") from None
            num_bytes *= 8

    def _unpickle(self, data: bytes, *, weights_only: bool) -> tuple[Any, Any, int]:
        unpickler = SafeUnpickler(data, 0, self._read_storage, self._file.path)
        self._check_preamble([unpickler.load() for _ in range(3)])
        if not weights_only:
            tree, unpickler.pos = self._unpickle_trusted(unpickler.pos)
            data = self._file.read(0, min(self._file.num_bytes, unpickler.pos + MAX_PICKLE_BYTES))
            unpickler = SafeUnpickler(data, unpickler.pos, self._read_storage, self._file.path)
        else:
            tree = unpickler.load()
        keys = unpickler.load()
        return tree, keys, unpickler.pos

    def _unpickle_trusted(self, pos: int) -> tuple[Any, int]:
        with open(self._file.path, "rb") as stream:
            stream.seek(pos)
            return unpickle_trusted(stream, self._file.path, self._read_storage), stream.tell()

    def _check_preamble(self, preamble: list[Any]) -> None:
        magic, version, machine = preamble
        if magic != MAGIC or version != _VERSION or not isinstance(machine, dict):
            raise self._corrupt(f"torch's magic number and version {_VERSION}", show((magic, version)))
        if machine.get("little_endian", machine.get(b"little_endian")) is False:
            raise UnsupportedCheckpointError(
                explain(
                    self._file.path,
                    expected="little-endian numbers",
                    found="big-endian ones",
                    todo="Save it again on a little-endian machine.",
                )
            )

    def _read_storage(self, data: Any) -> Any:
        """Reads a persistent id, and the part of a storage that it may stand for."""
        if data[0] in ("module", b"module"):
            return data[1]
        root = stored_storage(data)
        known = self._storages.setdefault(root.key, root)
        if known.num_bytes != root.num_bytes:
            raise ValueError(f"a storage {show(root.key)} of {known.num_bytes} and of {root.num_bytes} bytes")
        if len(data) < 6 or data[5] is None:
            return root
        _, offset, numel = data[5]
        if type(offset) is not int or type(numel) is not int or min(offset, numel) < 0:
            raise ValueError(f"a part of a storage at {show(offset)} of {show(numel)} elements")
        size = root.dtype.itemsize
        if (offset + numel) * size > root.num_bytes:
            raise ValueError(f"a part of a storage up to {offset + numel} of {root.num_bytes // size} elements")
        return StoredStorage(root.key, root.dtype, numel * size, offset * size)

    def _place_storages(self, keys: Any, offset: int) -> None:
        """Finds each storage's position by stepping over those before it."""
        if type(keys) is not list or any(type(key) not in (str, int, bytes) for key in keys):
            raise self._corrupt("a list of storage keys", show(keys))
        for key in keys:
            storage = self._storages.get(key)
            if storage is None or key in self._offsets:
                raise self._corrupt("each storage once", f"{show(key)} again, or one that no tensor uses")
            (numel,) = struct.unpack("<q", self._file.read(offset, 8, f"the size of storage {show(key)}"))
            num_bytes = numel * storage.dtype.itemsize
            self._offsets[key] = offset + 8, num_bytes
            if numel < 0:
                raise self._corrupt(f"a size of storage {show(key)}", numel)
            offset += 8 + num_bytes

    def _locate(self, storage: StoredStorage) -> int:
        """Gives the position of a storage in the file, once its size has been compared with the pickle's."""
        offset, num_bytes = self._offsets.get(storage.key, (0, -1))
        shown = show(storage.key)
        stated = self._storages[storage.key].num_bytes
        if num_bytes != stated:
            found = "no such storage" if num_bytes < 0 else f"{num_bytes} bytes of it"
            raise StorageError(f"storage {shown} of {stated} bytes", found)
        if offset + num_bytes > self._file.num_bytes:
            raise StorageError(
                f"storage {shown} up to byte {offset + num_bytes}",
                f"a file of {self._file.num_bytes} bytes (truncated)",
            )
        return offset + storage.view_offset

    def _corrupt(self, expected: object, found: object) -> CorruptCheckpointError:
        return CorruptCheckpointError(explain(self._file.path, expected=expected, found=found, todo=DOWNLOAD_AGAIN))
