"""From any checkpoint to an index of its tensors: which format it is, and where the weights are."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lightning_efficient_init.checkpoint.deepspeed import DeepSpeedFolder
from lightning_efficient_init.checkpoint.distributed import DistributedFolder
from lightning_efficient_init.checkpoint.file import CheckpointFile
from lightning_efficient_init.checkpoint.format import CheckpointFormat, CheckpointTree
from lightning_efficient_init.checkpoint.huggingface import HuggingFaceFolder
from lightning_efficient_init.checkpoint.refused import refuse
from lightning_efficient_init.checkpoint.safetensors import Safetensors
from lightning_efficient_init.checkpoint.torch_legacy import LegacyTorch
from lightning_efficient_init.checkpoint.torch_zip import TorchZip
from lightning_efficient_init.checkpoint.weights import weights_of
from lightning_efficient_init.checkpoint.wording import DOWNLOAD_AGAIN, explain, shorten
from lightning_efficient_init.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReadError,
    CorruptCheckpointError,
)
from lightning_efficient_init.garbage import collections_paused

_FILES: Final[tuple[CheckpointFormat, ...]] = (TorchZip(), LegacyTorch(), Safetensors())
_FOLDERS: Final[tuple[CheckpointFormat, ...]] = (HuggingFaceFolder(_FILES), DistributedFolder(), DeepSpeedFolder())
FORMATS: Final[tuple[CheckpointFormat, ...]] = (*_FILES, *_FOLDERS)
"""All formats, in the order in which they are asked whether they recognize a checkpoint."""

_HEAD_BYTES: Final = 512
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """What a checkpoint holds, and where the bytes of each tensor are.

    Attributes:
        path: What was asked for.
        format: Name of the format, such as "torch zip" or "safetensors".
        files: Absolute paths of all files that make up the checkpoint.
        tree: The checkpoint's object as it was saved, with an `Entry` in place of every tensor; containers keep
            their types.
        weights: The model's weights: key to `Entry`, or to another object for ``_extra_state`` keys.
        weights_key: Where in the tree they are: "state_dict" (Lightning), "model" or another key (Fabric), None (the
            tree itself).
        weights_metadata: ``_metadata`` of the state dict (module versions), or None.
    """

    path: str
    format: str
    files: tuple[str, ...]
    tree: Any
    weights: Mapping[str, Any]
    weights_key: str | None
    weights_metadata: Any


def index_checkpoint(
    path: str | os.PathLike[str], *, weights_only: bool = True, weights_key: str | None = None
) -> CheckpointIndex:
    """Indexes a checkpoint from its headers alone; no tensor is read, and no code from it runs.

    Args:
        path: A file or folder of any format in `FORMATS`, recognized by its content. ``~`` and ``file://`` are
            understood.
        weights_only: False lets a pickle run any code. Only for files whose author you trust.
        weights_key: The key in the tree under which the model's weights are; None finds the only choice.

    Raises:
        CheckpointNotFoundError: Nothing is there, or no weights.
        UnsupportedCheckpointError: It is of a kind that is refused.
        CorruptCheckpointError: It is damaged, or contradicts itself.
        UnsafeCheckpointError: Its pickle would run code, and ``weights_only`` is True.
        CheckpointReadError: The operating system could not read it.
        TypeError: ``path`` is no path.
    """
    found = index_tree(path, weights_only=weights_only)
    weights = weights_of(found.tree, weights_key, path=found.path)
    return CheckpointIndex(
        found.path, found.format, found.files, found.tree, weights.entries, weights.key, weights.metadata
    )


def index_tree(path: str | os.PathLike[str], *, weights_only: bool = True) -> CheckpointTree:
    """Indexes a checkpoint without choosing what its weights are (see `weights_of`); raises as `index_checkpoint`."""
    asked = _as_text(path)
    with _reported(asked), collections_paused():
        found = _read(os.path.abspath(_as_local(asked)), weights_only=weights_only)
    return CheckpointTree(asked, found.format, found.files, found.tree)


def _as_text(path: object) -> str:
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(
            "path: expected the path of a checkpoint, a str, bytes or os.PathLike after the model, found "
            f"{type(path).__name__}. A state dict that is in memory goes into model.load_state_dict; a file that is "
            "open, or in memory, has to be on a disk first."
        )
    return os.fsdecode(path)


def _as_local(path: str) -> str:
    """A path as the system knows it: Lightning takes ``~`` and ``file://`` as well."""
    path = os.path.expanduser(path.removeprefix("file://"))
    if not path:
        raise CheckpointNotFoundError(
            explain(path, expected="the path of a checkpoint", found="an empty one", todo="Check the path.")
        )
    if _URL.match(path) and not os.path.lexists(path):
        raise CheckpointNotFoundError(
            explain(path, expected="a local file or folder", found="a URL", todo="Download it, and pass its path.")
        )
    return path


def _read(path: str, *, weights_only: bool) -> CheckpointTree:
    head = _read_head(path)
    for kind in FORMATS:
        if kind.recognize(path, head):
            return kind.read(path, weights_only=weights_only)
    raise refuse(path, head, [kind.name for kind in FORMATS])


@contextlib.contextmanager
def _reported(path: str) -> Iterator[None]:
    """Makes checkpoint errors of what can go wrong at any place."""
    try:
        yield
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CorruptCheckpointError(
            explain(path, expected="a tree of containers", found="one nested too deep to follow", todo=DOWNLOAD_AGAIN)
        ) from error
    except MemoryError as error:
        raise CorruptCheckpointError(
            explain(path, expected="headers that fit into memory", found="larger ones", todo=DOWNLOAD_AGAIN)
        ) from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:  # of what is no such thing
        found = f"{type(error).__name__}: {shorten(error)}"
        raise CorruptCheckpointError(
            explain(path, expected="headers that describe tensors", found=found, todo=DOWNLOAD_AGAIN)
        ) from error
    except OSError as error:
        raise CheckpointReadError(
            explain(path, expected="files that can be read", found=str(error), todo="Check the disk, then try again.")
        ) from error


def _read_head(path: str) -> bytes | None:
    """Reads a file's first bytes; None for a folder."""
    if os.path.isdir(path):
        return None
    with CheckpointFile(path) as file:
        return file.read(0, min(_HEAD_BYTES, file.num_bytes))
