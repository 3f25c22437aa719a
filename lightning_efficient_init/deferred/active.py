"""Which recording, if any, is under way in this thread."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_efficient_init.deferred.record import Recorder

_local = threading.local()


def current() -> Recorder | None:
    """The recorder of this thread, if one records."""
    return getattr(_local, "recorder", None)


def set_current(recorder: Recorder | None) -> None:
    """Say who records in this thread from now on."""
    _local.recorder = recorder
