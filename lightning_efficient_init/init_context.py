"""What ``init_module`` does here beyond choosing a device and a dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from lightning.fabric.utilities.init import _EmptyInit

from lightning_efficient_init.deferred import empty_init
from lightning_efficient_init.lightning_checkpoint import streaming_load_from_checkpoint
from lightning_efficient_init.load.state_dict import streaming_load_state_dict


@contextmanager
def init_context(*, empty: bool) -> Iterator[None]:
    """Construct modules here: empty if asked for, and with checkpoints streaming into them.

    Args:
        empty: Whether parameters get memory without running their initializers. What nobody writes afterwards runs
            its own initializer at first use.
    """
    with streaming_load_state_dict(), streaming_load_from_checkpoint(), empty_init() if empty else nullcontext():
        yield


def is_empty_requested() -> bool:
    """Whether Lightning was asked for ``empty_init=True``.

    Lightning's strategies do not tell the precision plugin; they enter a function mode of theirs before they enter the
    plugin's context.
    """
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, _EmptyInit) and mode.enabled for mode in modes)
