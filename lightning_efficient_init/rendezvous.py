"""Where ranks meet: what is raised on one of them is raised on all.

`exchange` is the only rendezvous there is. Whatever a rank is up to inside `agree`, its next exchange meets the next
one of the others, so a failure anywhere reaches all of them at once, with its own type and message. That holds as long
as no other collective comes between: whoever needs one (a broadcast of buffers, a new group) calls `exchange` right
before it, so that a rank that has failed says so while the others still listen.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from lightning_efficient_init.errors import EfficientInitError

_AGREED = "_efficient_init_agreed"  # on exceptions: the groups whose ranks all know
_LOST = "_efficient_init_lost"


def is_alone(group: distributed.ProcessGroup | None = None) -> bool:
    """Whether there is nobody to meet: no process group, or one of a single rank."""
    return not distributed.is_initialized() or distributed.get_world_size(group) == 1


def exchange(note: Any = None, group: distributed.ProcessGroup | None = None) -> list[Any]:
    """Give this rank's note to all ranks of the group, and get theirs, by rank. All of them come here.

    Args:
        note: What can be pickled, and is small.
        group: The ranks; all there are, by default.

    Raises:
        Exception: What another rank has raised inside `agree`.
        RuntimeError: Another rank has ended without a word.
    """
    return [note] if is_alone(group) else _exchange(None, note, group)


@contextmanager
def agree(group: distributed.ProcessGroup | None = None) -> Iterator[None]:
    """What is raised inside on one rank is raised on all; a context for all ranks of the group to enter."""
    if is_alone(group):
        yield
        return
    try:
        yield
    except Exception as error:
        if _key(group) not in getattr(error, _AGREED, ()) and not hasattr(error, _LOST):
            _exchange(error, None, group)
        raise
    _exchange(None, None, group)


def _exchange(error: Exception | None, note: Any, group: distributed.ProcessGroup | None) -> list[Any]:
    """Give every rank's note to all, or raise the failure of the first rank that has one."""
    outcomes: list[Any] = [None] * distributed.get_world_size(group)
    try:
        distributed.all_gather_object(outcomes, (_pickled(error), note), group=group)
    except RuntimeError as lost:
        raise (_rank_lost(lost) if error is None else error) from lost
    failure = next((failed for failed, _ in outcomes if failed is not None), None)
    if failure is None:
        return [noted for _, noted in outcomes]
    if error is None:
        error = pickle.loads(failure)
    error.__dict__[_AGREED] = {*getattr(error, _AGREED, ()), _key(group)}
    raise error


def _key(group: distributed.ProcessGroup | None) -> int:
    return id(distributed.group.WORLD if group is None else group)


def _rank_lost(lost: RuntimeError) -> RuntimeError:
    error = RuntimeError(
        f"Rank {distributed.get_rank()} waited for the others, and at least one of them has ended: its own output says "
        f"why, if it had the time. ({lost})"
    )
    error.__dict__[_LOST] = True  # there is nobody left to tell
    return error


def _pickled(error: Exception | None) -> bytes | None:
    """An exception as bytes that surely become one again."""
    if error is None:
        return None
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return pickle.dumps(EfficientInitError(f"{type(error).__name__}: {error}"))
    return data
