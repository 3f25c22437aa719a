"""When a Trainer uses a module first: before any hook of the module's would say so.

Once the Trainer sets a module up, its weights are there. From then on anybody may use its parameters without calling
the module: ``configure_optimizers``, ``on_fit_start``, callbacks, loggers that write hyperparameters, and the module's
own ``training_step``, compiled or not. Strategies that shard restore checkpoints later, and look when the first loop
starts (trainer/sharded.py).
"""

from __future__ import annotations

from torch.nn import Module

from lightning_efficient_init.deferred import is_deferred, look, watch


def look_at_setup(module: Module) -> None:
    """Initialize what nobody has written, in a module that a Trainer sets up; pretrained weights are loaded before."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None or trainer.strategy.restore_checkpoint_after_setup:
        return
    for part in module.modules():
        if (load := getattr(part, "_load_awaited_weights", None)) is not None:  # of `ConfigureModelMixin`
            load()
    if not is_deferred(module):  # else it is built where it is moved to, with its values
        watch(module)
        look(module)
