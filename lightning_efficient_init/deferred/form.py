"""The seam between recipes and parameters that keep their values in another form than a plain tensor's."""

from __future__ import annotations

from typing import Protocol

import torch


class Form(Protocol):
    """How a parameter keeps what its recipe gives: quantized, say. A recipe has one, or none for a plain tensor.

    The parameter stays the same object, whatever its class and memory become.
    """

    def allocate(self, param: torch.Tensor, device: torch.device) -> None:
        """Give a deferred parameter the memory of this form, which nobody has written yet."""

    def write(self, param: torch.Tensor, values: torch.Tensor) -> None:
        """Give the parameter values. A deferred one gets its memory now, on the device of ``values``."""

    def marked(self, param: torch.Tensor) -> torch.Tensor:
        """Floating-point memory of an allocated parameter that any write of values changes; for the canary."""
