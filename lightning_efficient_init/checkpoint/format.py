"""The seam for checkpoint formats: what a format can do, and what it hands over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning_efficient_init.checkpoint.file import Seal


@dataclass(frozen=True, slots=True)
class CheckpointTree:
    """A checkpoint's object as it was saved, with an `Entry` in place of every tensor.

    Attributes:
        path: What was asked for.
        format: Name of the format.
        files: Absolute paths of all files that make up the checkpoint.
        tree: The object; containers keep their types.
        seal: Of the files, as their headers were read.
    """

    path: str
    format: str
    files: tuple[str, ...]
    tree: Any
    seal: Seal = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seal", Seal(self.files))


class CheckpointFormat(Protocol):
    """One format of checkpoints."""

    @property
    def name(self) -> str:
        """How errors and reports call it."""

    def recognize(self, path: str, head: bytes | None) -> bool:
        """Whether this is a checkpoint of this format, by its content.

        Args:
            path: Absolute path of a file or folder that exists.
            head: The first bytes of the file (at most 512), None for a folder.
        """

    def read(self, path: str, *, weights_only: bool) -> CheckpointTree:
        """Reads the tree from headers alone; raises `CheckpointError` subclasses only."""
