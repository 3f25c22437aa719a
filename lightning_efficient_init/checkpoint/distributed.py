"""Folders of ``torch.distributed.checkpoint``, and with it Lightning's and Fabric's sharded checkpoints.

How a folder is laid out: ``.metadata`` is a pickle that says of each tensor its shape and which blocks of it (*chunks*)
are where: file, offset, length. The files are ``torch.save`` archives one after the other, one for each chunk, and for
each object that is no tensor. Lightning adds ``meta.pt``: what was neither a model's nor an optimizer's.

The metadata is read like any other pickle, with inert stand-ins for the classes that it names.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from lightning_efficient_init.checkpoint.entry import Chunk, Entry
from lightning_efficient_init.checkpoint.file import CheckpointFile
from lightning_efficient_init.checkpoint.format import CheckpointTree
from lightning_efficient_init.checkpoint.torch_zip import TorchZip, read_archive
from lightning_efficient_init.checkpoint.unpickle import MAX_PICKLE_BYTES, SafeUnpickler
from lightning_efficient_init.checkpoint.wording import DOWNLOAD_AGAIN, explain, shorten, show
from lightning_efficient_init.errors import CorruptCheckpointError, UnsupportedCheckpointError

_METADATA: Final = ".metadata"
_LIGHTNING_METADATA: Final = "meta.pt"
_MAX_CHUNKS_COMPARED: Final = 4096


class DistributedFolder:
    """A folder of torch.distributed.checkpoint."""

    name = "torch distributed checkpoint folder"

    def recognize(self, path: str, head: bytes | None) -> bool:
        """Whether the folder has that kind's metadata."""
        return head is None and os.path.isfile(os.path.join(path, _METADATA))

    def read(self, path: str, *, weights_only: bool) -> CheckpointTree:
        """Reads the tree; raises as `index_checkpoint` does."""
        with _Folder(path, weights_only=weights_only) as folder:
            tree = folder.tree()
            files = folder.files()
        extra = os.path.join(path, _LIGHTNING_METADATA)
        if os.path.isfile(extra):
            found = TorchZip().read(extra, weights_only=weights_only)
            if isinstance(found.tree, dict):
                tree = {**found.tree, **tree}
                files = (*files, *found.files)
        return CheckpointTree(path, self.name, files, tree)


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where one chunk or object is."""

    file: str
    offset: int
    num_bytes: int


class _Folder:
    """One folder being read: its metadata, and its files, open."""

    def __init__(self, path: str, *, weights_only: bool) -> None:
        self._path = path
        self._weights_only = weights_only
        self._open: dict[str, CheckpointFile] = {}
        self._metadata = _read_metadata(os.path.join(path, _METADATA))
        self._stored = dict(self._locations())

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def files(self) -> tuple[str, ...]:
        """The files that have been looked into."""
        return tuple(sorted(self._open))

    def tree(self) -> Any:
        """The state dict as it was saved, containers within containers."""
        described = _expect(self._metadata, "state_dict_metadata", dict, self._path)
        paths = getattr(self._metadata, "planner_data", None)
        root: dict[Any, Any] = {}
        for name, about in described.items():
            path = paths.get(name) if isinstance(paths, dict) else None
            _insert(root, path if isinstance(path, tuple) and path else (name,), self._value(str(name), about))
        return _with_lists(root)

    def _value(self, name: str, about: Any) -> Any:
        if not hasattr(about, "chunks"):
            return self._read(name, self._find(name, None))
        shape = _sizes(about.size, self._path, name)
        chunks = [self._chunk(name, chunk, shape) for chunk in about.chunks]
        if len(chunks) == 1 and chunks[0].entry.shape == shape:
            return chunks[0].entry
        self._check_cover(name, chunks, shape)
        first = chunks[0].entry
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return Entry(first.file, first.offset, first.dtype, shape, stride, tuple(chunks))

    def _chunk(self, name: str, about: Any, shape: tuple[int, ...]) -> Chunk:
        offsets, sizes = (_sizes(getattr(about, key, None), self._path, name) for key in ("offsets", "sizes"))
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise self._corrupt(name, f"chunks of {len(shape)} dims", f"offsets {offsets}, sizes {sizes}")
        if any(offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise self._corrupt(name, f"chunks inside {shape}", f"offsets {offsets}, sizes {sizes}")
        entry = self._read(name, self._find(name, offsets))
        if not isinstance(entry, Entry) or entry.shape != sizes:
            found = f"shape {entry.shape}" if isinstance(entry, Entry) else type(entry).__name__
            raise self._corrupt(name, f"a chunk of shape {sizes}", found)
        return Chunk(offsets, entry)

    def _check_cover(self, name: str, chunks: list[Chunk], shape: tuple[int, ...]) -> None:
        """Every element is in exactly one chunk."""
        total = sum(chunk.entry.numel for chunk in chunks)
        if not chunks or total != math.prod(shape) or len({chunk.entry.dtype for chunk in chunks}) != 1:
            raise self._corrupt(name, f"chunks of one dtype that make up {shape}", f"{total} elements in {len(chunks)}")
        if len(chunks) > _MAX_CHUNKS_COMPARED:
            raise UnsupportedCheckpointError(
                explain(
                    self._path,
                    tensor=name,
                    expected=f"at most {_MAX_CHUNKS_COMPARED} chunks",
                    found=len(chunks),
                    todo="Save it from fewer ranks.",
                )
            )
        ordered = sorted((c for c in chunks if c.entry.numel), key=lambda chunk: chunk.offsets)
        for index, chunk in enumerate(ordered):
            for other in ordered[index + 1 :]:
                if other.offsets[0] >= chunk.offsets[0] + chunk.entry.shape[0]:
                    break
                if _overlap(chunk, other):
                    raise self._corrupt(
                        name, "chunks apart from each other", f"two at {chunk.offsets}, {other.offsets}"
                    )

    def _read(self, name: str, stored: _Stored) -> Any:
        if stored.file not in self._open:
            self._open[stored.file] = CheckpointFile(stored.file)
        section = _Section(self._open[stored.file], stored.offset, stored.num_bytes, name)
        return read_archive(section, weights_only=self._weights_only, start=stored.offset)

    def _find(self, name: str, offsets: tuple[int, ...] | None) -> _Stored:
        stored = self._stored.get((name, offsets))
        if stored is None:
            raise self._corrupt(name, f"a place in a file for the chunk at {offsets}", "none")
        return stored

    def _locations(self) -> Iterator[tuple[tuple[str, tuple[int, ...] | None], _Stored]]:
        for index, info in _expect(self._metadata, "storage_data", dict, self._path).items():
            name, file = getattr(index, "fqn", None), getattr(info, "relative_path", None)
            offset, length = getattr(info, "offset", None), getattr(info, "length", None)
            if not isinstance(name, str) or not isinstance(file, str) or os.path.basename(file) != file or not file:
                raise self._corrupt(str(name), "the name of a file in the folder", show(file))
            if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
                raise self._corrupt(name, "an offset and a length", f"{show(offset)}, {show(length)}")
            if getattr(info, "transform_descriptors", None):
                raise UnsupportedCheckpointError(
                    explain(
                        self._path,
                        tensor=name,
                        expected="chunks stored as they are",
                        found=f"transformed ones ({show(info.transform_descriptors)})",
                        todo="Save it without compression or encryption.",
                    )
                )
            place = getattr(index, "offset", None)
            key = None if place is None else _sizes(place, self._path, name)
            yield (name, key), _Stored(os.path.join(self._path, file), offset, length)

    def _corrupt(self, name: str, expected: object, found: object) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            explain(self._path, tensor=name, expected=expected, found=found, todo=DOWNLOAD_AGAIN)
        )


class _Section(CheckpointFile):
    """A part of an open file that is read as if it were a file of its own."""

    def __init__(self, file: CheckpointFile, start: int, num_bytes: int, name: str) -> None:
        file.check_inside(start, num_bytes, f"the chunk of {shorten(name)!r}")
        self.path = file.path
        self.num_bytes = num_bytes
        self._file = file
        self._start = start

    def close(self) -> None:
        """The file belongs to somebody else."""

    def read(self, offset: int, num_bytes: int, what: str = "data") -> bytes:
        """See `CheckpointFile`."""
        self.check_inside(offset, num_bytes, what)
        return self._file.read(self._start + offset, num_bytes, what)

    def read_into(self, buffer: memoryview, offset: int, what: str = "data") -> None:
        """See `CheckpointFile`."""
        self.check_inside(offset, len(buffer), what)
        self._file.read_into(buffer, self._start + offset, what)


def _overlap(one: Chunk, other: Chunk) -> bool:
    return all(
        a < b + m and b < a + n
        for a, b, n, m in zip(one.offsets, other.offsets, one.entry.shape, other.entry.shape, strict=True)
    )


def _insert(root: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        root = root.setdefault(key, {})
        if not isinstance(root, dict):
            return
    root[path[-1]] = value


def _with_lists(node: Any, name: Any = None, done: dict[tuple[int, bool], Any] | None = None) -> Any:
    """Dicts with the keys 0, 1, 2 and so on were lists; but an optimizer's state, which has numbers for keys."""
    if not isinstance(node, dict):
        return node
    done = {} if done is None else done
    place = id(node), name == "state"
    if place not in done:  # one that is in many places is done once
        children = {key: _with_lists(value, key, done) for key, value in node.items()}
        is_list = bool(children) and name != "state" and list(children) == list(range(len(children)))
        done[place] = list(children.values()) if is_list else children
    return done[place]


def _sizes(value: Any, path: str, name: str) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(type(size) is int and size >= 0 for size in value):
        raise CorruptCheckpointError(
            explain(path, tensor=name, expected="sizes", found=show(value), todo=DOWNLOAD_AGAIN)
        )
    return tuple(value)


def _expect(owner: Any, name: str, kind: type[Any], path: str) -> Any:
    value = getattr(owner, name, None)
    if not isinstance(value, kind):
        raise CorruptCheckpointError(
            explain(path, expected=f"metadata with {name}", found=show(value), todo=DOWNLOAD_AGAIN)
        )
    return value


def _read_metadata(path: str) -> Any:
    with CheckpointFile(path) as file:
        if file.num_bytes > MAX_PICKLE_BYTES:
            raise UnsupportedCheckpointError(
                explain(path, expected=f"at most {MAX_PICKLE_BYTES} bytes", found=file.num_bytes, todo=DOWNLOAD_AGAIN)
            )
        data = file.read(0, file.num_bytes, "the metadata")
    return SafeUnpickler(data, 0, _no_storage, path, _STAND_INS).load_whole()


class _StandIn:
    """Holds what a pickle says of an object."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({name: value for name, value in state.items() if isinstance(name, str)})


def _joined(*parts: str) -> str:
    if not all(type(part) is str for part in parts):
        raise TypeError("a path that is not made of text")
    return "/".join(parts)


def _nothing(*_: Any) -> None:
    return None


def _no_storage(pid: Any) -> Any:
    raise ValueError("a persistent id in the metadata")


_METADATA_CLASSES: Final = (
    "Metadata",
    "TensorStorageMetadata",
    "TensorProperties",
    "ChunkStorageMetadata",
    "BytesStorageMetadata",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_STAND_INS: Final[dict[str, Any]] = {
    **{f"torch.distributed.checkpoint.metadata.{name}": _StandIn for name in _METADATA_CLASSES},
    **{f"torch.distributed.checkpoint.filesystem.{name}": _StandIn for name in ("_StorageInfo", "_StoragePrefix")},
    "torch._utils._get_layout": _nothing,
    **{f"pathlib.{name}": _joined for name in ("Path", "PosixPath", "WindowsPath", "_local.PosixPath")},
}
