"""What is recognized only to be refused: with its name, and with the way on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from lightning_efficient_init.checkpoint.wording import DOWNLOAD_AGAIN, explain, listing
from lightning_efficient_init.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)

_SAVE_AS_WEIGHTS: Final = "Save the model's state_dict() with torch.save or safetensors."
_OTHER_FILES: Final = (
    (0, b"version https://git-lfs", "a Git LFS pointer", "Fetch the file itself with `git lfs pull`."),
    (0, b"<!DOCTYPE", "a web page", "Download the file itself, not the page about it."),
    (0, b"<html", "a web page", "Download the file itself, not the page about it."),
    (0, b"GGUF", "a GGUF file", "Convert it to safetensors."),
    (0, b"\x89HDF", "an HDF5 file", "Convert it to safetensors."),
    (0, b"\x93NUMPY", "a NumPy array", _SAVE_AS_WEIGHTS),
    (0, b"\x1f\x8b", "a gzip file", "Unpack it first."),
    (0, b"\xfd7zXZ", "an xz file", "Unpack it first."),
    (0, b"(\xb5/\xfd", "a zstd file", "Unpack it first."),
    (
        257,
        b"ustar",
        "a tar file",
        "Unpack it; torch files of that kind (before 0.1.10): load and save with torch first.",
    ),
    (0, b"PK\x05\x06", "an empty zip archive", DOWNLOAD_AGAIN),
    (0, b"\x80", "a plain pickle that torch.save did not write", _SAVE_AS_WEIGHTS),
)


def refuse(path: str, head: bytes | None, formats: Sequence[str]) -> CheckpointError:
    """Makes the error for what no format recognizes.

    Args:
        path: Absolute path of the file or folder.
        head: The file's first bytes, None for a folder.
        formats: Names of the formats that there are.
    """
    known = f"one of: {', '.join(formats)}"
    if head is None:
        found = f"a folder with {listing(sorted(os.listdir(path)))}"
        return CheckpointNotFoundError(
            explain(path, expected=known, found=found, todo="Pass the file with the weights.")
        )
    for offset, magic, found, todo in _OTHER_FILES:
        if head[offset:].startswith(magic):
            return UnsupportedCheckpointError(explain(path, expected=known, found=found, todo=todo))
    found = f"a file that starts with {head[:16]!r}" if head else "an empty file"
    return CorruptCheckpointError(explain(path, expected=known, found=found, todo=DOWNLOAD_AGAIN))
