"""What ``init_module`` does here beyond choosing a device and a dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from lightning.fabric.utilities.init import _EmptyInit

from lightning_efficient_init.deferred import empty_init, know_mode
from lightning_efficient_init.lightning_checkpoint import streaming_load_from_checkpoint
from lightning_efficient_init.load.state_dict import streaming_load_state_dict
from lightning_efficient_init.quantize import Quantizer

know_mode(_EmptyInit)  # skips initializers, which are not compiled


@contextmanager
def init_context(*, empty: bool, quantizer: Quantizer | None = None) -> Iterator[None]:
    """Construct modules here: empty if asked for, and with checkpoints streaming into them.

    Args:
        empty: Whether parameters get memory without running their initializers. What nobody writes afterwards runs
            its own initializer at first use.
        quantizer: Replaces layers while they are constructed.
    """
    if quantizer is not None:
        building: AbstractContextManager[None] = quantizer.building(empty=empty)
    else:
        building = empty_init() if empty else nullcontext()
    with streaming_load_state_dict(), streaming_load_from_checkpoint(), building:
        yield


def is_building_modules() -> bool:
    """Whether a context of Lightning's that is meant for modules is open, and not one for tensors only."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, _EmptyInit) for mode in modes)


def is_empty_requested() -> bool:
    """Whether Lightning was asked for ``empty_init=True``.

    Lightning's strategies do not tell the precision plugin; they enter a function mode of theirs before they enter the
    plugin's context.
    """
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, _EmptyInit) and mode.enabled for mode in modes)
