"""LightningModules that `torch.compile` has compiled: the look at them at first use is taken before their step runs.

The Trainer calls their compiled steps, not the module, so that its hooks would be run by compiled code. But that may
have been made for another model of the same class, which had no hooks: the compiler does not ask whether hooks differ
(``torch._dynamo.config.skip_nnmodule_hook_guards``).
"""

from __future__ import annotations

from torch.nn import Module

from lightning_efficient_init.deferred import look


def look_if_compiled(module: Module | None) -> None:
    """Initialize what nobody has written by now, in a module with compiled steps that is watched."""
    if getattr(module, "_compiler_ctx", None) is not None:  # the Trainer's mark
        assert module is not None
        look(module)
