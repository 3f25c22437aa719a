"""The exceptions of this package.

    EfficientInitError
    ├── CheckpointError                       something is wrong with a checkpoint, or with what was asked of it
    │   ├── CheckpointNotFoundError           (FileNotFoundError) nothing there, or a folder without weights
    │   ├── UnsupportedCheckpointError        readable in principle, refused with the reason
    │   ├── CorruptCheckpointError            truncated, damaged, or its offsets and sizes contradict the file
    │   ├── UnsafeCheckpointError             its pickle would run code
    │   ├── CheckpointReadError               (OSError) the operating system failed to read it, after retries
    │   └── StateDictMismatchError            (RuntimeError) its tensors do not fit the model
    ├── DeferredInitError                     (RuntimeError) deferred construction
    │   ├── UnrecordableError                 an operation that cannot be recorded exactly
    │   └── DeferredParameterError            a parameter without memory, or without values, was used as if it had some
    ├── QuantizationError                     (ValueError) a model cannot be quantized as it was asked for
    └── UsageError                            (ValueError) what was asked of a plan or a benchmark cannot be done

Every message says what (the file and the tensor), what was expected, what was found, and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice


def shorten(names: Iterable[str], most: int = 8) -> str:
    """Quote the first names, and say how many more there are."""
    names = list(names)
    quoted = ", ".join(repr(name) for name in islice(names, most))
    return quoted if len(names) <= most else f"{quoted} and {len(names) - most} more"


class EfficientInitError(Exception):
    """Base of all exceptions that this package raises on its own account."""


class CheckpointError(EfficientInitError):
    """Something is wrong with a checkpoint, or with what was asked of it.

    Attributes:
        written: Names of the model's tensors that were already written, wholly or in part, when the error came up;
            empty as long as the model is as it was. Where ranks share what they read, also those that were about to be:
            no rank knows how far the others were.
    """

    written: tuple[str, ...] = ()

    def add_written(self, names: Sequence[str]) -> None:
        """Note that these tensors no longer hold what they held before the load."""
        self.written = tuple(names)

    def __str__(self) -> str:
        message = super().__str__()
        if not self.written:
            return message
        return (
            f"{message} {len(self.written)} tensors were already written, wholly or in part: {shorten(self.written)}."
        )


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is nothing at the path, or a folder without weights."""


class UnsupportedCheckpointError(CheckpointError):
    """The checkpoint is of a kind that is refused, for the reason given."""


class CorruptCheckpointError(CheckpointError):
    """The file is truncated or damaged, or states offsets and sizes that it does not have."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the checkpoint would run code that it brings along."""


class CheckpointReadError(CheckpointError, OSError):
    """The operating system failed to deliver bytes of the file, also when asked again."""


class StateDictMismatchError(CheckpointError, RuntimeError):
    """The checkpoint's tensors do not fit the model.

    Attributes:
        missing: Names of the model's tensors that the checkpoint lacks.
        unexpected: Keys of the checkpoint that match nothing in the model.
        mismatched: Name to (expected shape, found shape) of tensors whose shapes differ.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected
        self.mismatched = mismatched or {}


class QuantizationError(EfficientInitError, ValueError):
    """A model cannot be quantized as it was asked for."""


class DeferredInitError(EfficientInitError, RuntimeError):
    """Deferred construction could not do what was asked."""


class UnrecordableError(DeferredInitError):
    """An operation under ``deferred_init`` cannot be recorded so that replaying it gives the same values."""


class DeferredParameterError(DeferredInitError):
    """A deferred parameter was used where its values are needed."""


class UsageError(EfficientInitError, ValueError):
    """What was asked of a plan or a benchmark cannot be done: a name is unknown, or there is no room."""
