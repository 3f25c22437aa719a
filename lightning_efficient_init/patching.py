"""The one way in which this package replaces something that belongs to somebody else.

A ``ScopedPatch`` replaces an attribute while at least one of its contexts is open, anywhere in the process, and puts
the original back when the last one closes, also after an exception. The replacement acts only inside such a context:
other threads, and code that runs after it, reach the original.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any


class ScopedPatch:
    """Replaces ``owner.name``, a function, while a context is open.

    Args:
        owner: Module or class that has the attribute.
        name: The attribute's name.
        replacement: Called as ``replacement(original, *args, **kwargs)``.
    """

    def __init__(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self._owner = owner
        self._name = name
        self._replacement = replacement
        self._is_active: ContextVar[bool] = ContextVar(f"{name}_is_patched", default=False)
        self._lock = threading.Lock()
        self._num_open = 0
        self._original: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Open a context; contexts nest."""
        self._install()
        token = self._is_active.set(True)
        try:
            yield
        finally:
            try:
                self._is_active.reset(token)  # which raises where somebody leaves in another context than it entered
            finally:
                self._remove()

    def _install(self) -> None:
        with self._lock:
            self._num_open += 1
            if self._num_open == 1:
                self._original = vars(self._owner)[self._name]
                setattr(self._owner, self._name, self._wrapper(self._original))

    def _remove(self) -> None:
        with self._lock:
            self._num_open -= 1
            if self._num_open == 0:
                setattr(self._owner, self._name, self._original)

    def _wrapper(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not self._is_active.get():
                return original(*args, **kwargs)
            return self._replacement(original, *args, **kwargs)

        return wrapper


@contextmanager
def patching(patches: Iterable[ScopedPatch]) -> Iterator[None]:
    """Open a context of each of several patches."""
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch())
        yield
