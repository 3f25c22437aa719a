"""Initializers of `torch.nn.init` that fill their tensor with one operation, and with which numbers.

What is recorded are operations that reach a kernel, and the way there is most of the time that a recording takes. Where
it is known what comes at its end, it need not be gone. These are the initializers that ask function modes before they
begin; torch's others are seen when they reach a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, TypeAlias

import torch
from torch.nn import init

from lightning_efficient_init.deferred.arguments import META

Numbers: TypeAlias = tuple[Any, ...]
_PLAIN: Final = (int, float, str)


def _kaiming_bounds(options: Mapping[str, Any]) -> Numbers | None:
    rest = options["a"], options["mode"], options["nonlinearity"]
    return _bounds(options["tensor"].shape, *rest) if all(isinstance(value, _PLAIN) for value in rest) else None


@lru_cache(maxsize=4096, typed=True)  # of many layers, most have the shape of another one; True is no slope
def _bounds(shape: tuple[int, ...], a: float, mode: str, nonlinearity: str) -> Numbers | None:
    """The bounds that torch works out for a tensor of this shape; None if it does something else with it, or fails."""
    with torch._C._DisableTorchDispatch():
        tensor = torch.empty(shape, device=META).as_subclass(_Notes)
        try:
            init.kaiming_uniform_(tensor, a, mode, nonlinearity)  # type: ignore[arg-type]
        except Exception:  # it does so again when it is called for real
            return None
        return tensor.bounds


class _Notes(torch.Tensor):
    """A tensor that only notes between which bounds it is to be filled."""

    bounds: Numbers | None = None

    def uniform_(self, low: float, high: float, *, generator: Any = None) -> _Notes:  # type: ignore[override]
        self.bounds = low, high
        return self


FILLS: Final[dict[Any, tuple[Any, Callable[[Mapping[str, Any]], Numbers | None]]]] = {
    init.uniform_: (torch.ops.aten.uniform_.default, itemgetter("a", "b")),
    init.normal_: (torch.ops.aten.normal_.default, itemgetter("mean", "std")),
    init.kaiming_uniform_: (torch.ops.aten.uniform_.default, _kaiming_bounds),
}
"""Initializer to the operation that fills its tensor, and what gives the numbers, from the arguments by name."""
