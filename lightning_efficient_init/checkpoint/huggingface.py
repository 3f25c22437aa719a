"""Hugging Face folders: shards of safetensors or of torch.save, and an index that says which holds what."""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from lightning_efficient_init.checkpoint.entry import Entry
from lightning_efficient_init.checkpoint.file import CheckpointFile
from lightning_efficient_init.checkpoint.format import CheckpointFormat, CheckpointTree
from lightning_efficient_init.checkpoint.wording import DOWNLOAD_AGAIN, explain, listing, shorten, show
from lightning_efficient_init.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)

_INDEX: Final = ".index.json"
_MAX_INDEX_BYTES: Final = 100_000_000
# In the order of preference: safetensors before pickles, and an index before the single file of the same name.
_KNOWN: Final = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


class HuggingFaceFolder:
    """A folder with an index and its shards, or with one file of weights.

    Args:
        shard_formats: Formats that a shard may have.
    """

    name = "Hugging Face folder"

    def __init__(self, shard_formats: Sequence[CheckpointFormat]) -> None:
        self._shard_formats = shard_formats

    def recognize(self, path: str, head: bytes | None) -> bool:
        """Whether a folder holds weights under one of the names in use, or a file is such an index."""
        if head is not None:
            return head.removeprefix(BOM_UTF8).lstrip()[:1] == b"{" and path.endswith(_INDEX)
        return bool(_candidates(path))

    def read(self, path: str, *, weights_only: bool) -> CheckpointTree:
        """Reads the tree, a dict of entries; raises as `index_checkpoint` does."""
        folder, name, note = self._choose(path)
        chosen = os.path.join(folder, name)
        if name.endswith(_INDEX):
            files, tree = self._read_shards(folder, chosen, weights_only=weights_only)
        else:
            files, tree = (chosen,), self._read_shard(chosen, weights_only=weights_only)
        return CheckpointTree(path, f"{self.name}: {name}{note}", files, tree)

    def _choose(self, path: str) -> tuple[str, str, str]:
        """Gives the folder, the name of the file to start from, and what to say of others that were there."""
        if not os.path.isdir(path):
            return os.path.dirname(path), os.path.basename(path), ""
        names = _candidates(path)
        if names[0] not in _KNOWN and len(names) > 1:
            raise UnsupportedCheckpointError(
                explain(path, expected="one index", found=listing(names), todo="Pass the path of the one to read.")
            )
        return path, names[0], f" ({', '.join(names[1:])} not read)" if len(names) > 1 else ""

    def _read_shards(self, folder: str, index: str, *, weights_only: bool) -> tuple[tuple[str, ...], dict[str, Any]]:
        weight_map = _read_weight_map(index)
        num_tensors = Counter(weight_map.values())
        shards = {name: _shard_path(folder, name, index, count) for name, count in num_tensors.items()}
        contents = {name: self._read_shard(shard, weights_only=weights_only) for name, shard in shards.items()}
        for key, name in weight_map.items():
            if key not in contents[name]:
                raise CorruptCheckpointError(
                    explain(
                        shards[name],
                        tensor=key,
                        expected=f"a tensor in this shard, as {os.path.basename(index)} says",
                        found="a shard without it",
                        todo=DOWNLOAD_AGAIN,
                    )
                )
        return tuple(shards.values()), {key: contents[name][key] for key, name in weight_map.items()}

    def _read_shard(self, path: str, *, weights_only: bool) -> dict[str, Any]:
        with CheckpointFile(path) as file:
            head = file.read(0, min(512, file.num_bytes))
        for kind in self._shard_formats:
            if kind.recognize(path, head):
                tree = kind.read(path, weights_only=weights_only).tree
                return _as_state_dict(tree, path)
        raise CorruptCheckpointError(
            explain(
                path,
                expected=" or ".join(kind.name for kind in self._shard_formats),
                found=f"a file of {len(head)} bytes" if len(head) < 8 else f"a file that starts with {head[:8]!r}",
                todo=DOWNLOAD_AGAIN,
            )
        )


def _candidates(folder: str) -> list[str]:
    """Names of the files of weights in a folder, the preferred one first."""
    names = set(os.listdir(folder))
    known: list[str] = [name for name in _KNOWN if name in names]
    return known or sorted(
        (name for name in names if name.endswith(_INDEX)), key=lambda name: ("safetensors" not in name, name)
    )


def _read_weight_map(index: str) -> dict[str, str]:
    """Reads which shard holds which tensor."""
    with CheckpointFile(index) as file:
        if file.num_bytes > _MAX_INDEX_BYTES:
            raise _bad_index(index, f"{file.num_bytes} bytes")
        text = file.read(0, file.num_bytes)
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _bad_index(index, f"{type(error).__name__}: {shorten(error)}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise _bad_index(index, "none")
    return weight_map


def _shard_path(folder: str, name: str, index: str, num_tensors: int) -> str:
    """Gives the path of a shard, which must be in the folder itself or below it."""
    path = os.path.normpath(os.path.join(folder, name))
    inside = (
        path.startswith(os.path.join(os.path.normpath(folder), "")) and not os.path.isabs(name) and "\0" not in name
    )
    if not inside:
        raise CorruptCheckpointError(
            explain(
                index,
                expected="shards inside the folder",
                found=f"a shard {shorten(name)!r}",
                todo="Do not use this checkpoint unless you know who made it.",
            )
        )
    if not os.path.isfile(path):
        raise CheckpointNotFoundError(
            explain(
                path,
                expected=f"the shard {shorten(name)!r}, which holds {num_tensors} tensors",
                found="nothing at this path",
                todo="Download the missing file.",
            )
        )
    return path


def _as_state_dict(tree: Any, path: str) -> dict[str, Any]:
    if (
        isinstance(tree, dict)
        and all(isinstance(key, str) for key in tree)
        and any(isinstance(value, Entry) for value in tree.values())
    ):
        return tree
    raise UnsupportedCheckpointError(
        explain(path, expected="a state dict", found=show(tree), todo="Load this file on its own.")
    )


def _bad_index(index: str, found: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        explain(index, expected='JSON with a "weight_map" of tensor to shard', found=found, todo=DOWNLOAD_AGAIN)
    )
