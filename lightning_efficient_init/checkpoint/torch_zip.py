"""Checkpoints of ``torch.save``: a zip archive of one pickle and one member for each storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from lightning_efficient_init.checkpoint.entry import Entry
from lightning_efficient_init.checkpoint.file import CheckpointFile
from lightning_efficient_init.checkpoint.format import CheckpointTree
from lightning_efficient_init.checkpoint.tensors import (
    StorageError,
    StoredLayout,
    StoredStorage,
    is_inside,
    resolve_tensors,
)
from lightning_efficient_init.checkpoint.trusted import unpickle_trusted
from lightning_efficient_init.checkpoint.unpickle import (
    MAX_PICKLE_BYTES,
    SafeUnpickler,
    stored_storage,
)
from lightning_efficient_init.checkpoint.wording import DOWNLOAD_AGAIN, SAVE_AGAIN, explain, shorten
from lightning_efficient_init.checkpoint.zip_archive import MAGIC, ZipArchive
from lightning_efficient_init.errors import CorruptCheckpointError, UnsupportedCheckpointError

_PICKLE: Final = b"/data.pkl"


class TorchZip:
    """What ``torch.save`` writes, and with it Lightning's and Fabric's checkpoints."""

    name = "torch zip"

    def recognize(self, path: str, head: bytes | None) -> bool:
        """Whether the file is a zip archive."""
        return head is not None and head.startswith(MAGIC)

    def read(self, path: str, *, weights_only: bool) -> CheckpointTree:
        """Reads the tree; raises as `index_checkpoint` does."""
        with CheckpointFile(path) as file:
            return CheckpointTree(path, self.name, (file.path,), read_archive(file, weights_only=weights_only))


def read_archive(
    file: CheckpointFile, *, weights_only: bool, start: int = 0, stand_ins: Mapping[str, Any] | None = None
) -> Any:
    """Reads the tree of one archive.

    Args:
        file: The archive.
        weights_only: See `index_checkpoint`.
        start: How many bytes before the archive's first one entries' positions count from.
        stand_ins: Harmless classes to be used in the place of those that its pickle names.
    """
    archive = _Archive(file, start)
    return archive.resolve(archive.unpickle(stand_ins or {}) if weights_only else archive.unpickle_trusted())


class _Archive:
    """One open archive of ``torch.save``."""

    def __init__(self, file: CheckpointFile, start: int = 0) -> None:
        self._file = file
        self._start = start
        self._zip = ZipArchive(file)
        self._root = self._find_root()
        self._data_root = self._root + b"/data/"
        self._offsets: dict[tuple[Any, int], int] = {}  # of storages by key and size
        self._check_byte_order()

    def unpickle(self, stand_ins: Mapping[str, Any]) -> Any:
        unpickler = SafeUnpickler(
            self._read_pickle(), 0, stored_storage, self._file.path, stand_ins, entry_of=self._entry_of
        )
        return unpickler.load_whole()

    def unpickle_trusted(self) -> Any:
        return unpickle_trusted(self._read_pickle(), self._file.path)

    def resolve(self, tree: Any) -> Any:
        return resolve_tensors(tree, self._file.path, self._locate)

    def _entry_of(self, key: bytes, dtype: torch.dtype, num_bytes: int, layout: StoredLayout) -> Entry | None:
        """Makes the entry of a tensor at once; None if something is wrong, which is said once its name is known."""
        member = self._zip.members.get(self._data_root + key)
        if member is None or member.num_bytes != num_bytes or not is_inside(layout, dtype, num_bytes):
            return None
        start = self._start + self._zip.data_offset(member)
        return Entry(self._file.path, start + layout.offset * dtype.itemsize, dtype, layout.shape, layout.stride)

    def _locate(self, storage: StoredStorage) -> int:
        """Gives the position of a storage in the file, once its size has been compared with the pickle's."""
        found = self._offsets.get((storage.key, storage.num_bytes))
        if found is None:
            found = self._offsets[storage.key, storage.num_bytes] = self._find(storage)
        return found

    def _find(self, storage: StoredStorage) -> int:
        key = storage.key.decode("latin1") if isinstance(storage.key, bytes) else str(storage.key)
        member = self._zip.members.get(self._data_root + key.encode("utf-8", "surrogatepass"))
        if member is None:
            raise StorageError(
                f"storage {shorten(key)!r} of {storage.num_bytes} bytes", "no such member in the archive"
            )
        if member.num_bytes != storage.num_bytes:
            raise StorageError(
                f"storage {shorten(key)!r} of {storage.num_bytes} bytes", f"{member.num_bytes} bytes of it"
            )
        return self._start + self._zip.data_offset(member)

    def _read_pickle(self) -> bytes:
        member = self._zip.members[self._root + _PICKLE]
        if member.num_bytes > MAX_PICKLE_BYTES:
            raise self._refused(
                f"a pickle of at most {MAX_PICKLE_BYTES} bytes",
                f"{member.num_bytes} bytes",
                "Keep large lists and tables out of the checkpoint, or save them as tensors.",
            )
        return self._zip.read(member)

    def _find_root(self) -> bytes:
        """Gives the archive's one top folder, after looking for what tells other archives of torch apart."""
        names = self._zip.members
        roots = [name[: -len(_PICKLE)] for name in names if name.endswith(_PICKLE) and name.count(b"/") == 1]
        if len(roots) != 1:
            raise self._refused(
                "the archive of one torch.save (one data.pkl)", f"a zip file with {len(roots)}", SAVE_AGAIN
            )
        code = roots[0] + b"/code/"
        if roots[0] + b"/constants.pkl" in names or any(name.startswith(code) for name in names):
            raise self._refused(
                "a checkpoint",
                "a TorchScript archive, which is a program",
                "Load it with torch.jit.load, and save its state_dict() with torch.save.",
            )
        return roots[0]

    def _check_byte_order(self) -> None:
        member = self._zip.members.get(self._root + b"/byteorder")
        order = b"little" if member is None or member.num_bytes > 16 else self._zip.read(member)
        if order == b"big":
            raise self._refused("little-endian numbers", "big-endian ones", "Save it again on a little-endian machine.")
        if order != b"little":
            raise CorruptCheckpointError(
                explain(self._file.path, expected="a byte order", found=repr(order), todo=DOWNLOAD_AGAIN)
            )

    def _refused(self, expected: str, found: str, todo: str) -> UnsupportedCheckpointError:
        return UnsupportedCheckpointError(explain(self._file.path, expected=expected, found=found, todo=todo))
