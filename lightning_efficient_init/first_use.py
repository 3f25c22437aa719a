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
    """Watch a module that is set up. One that has its weights, as a Trainer is setting it up, is looked at right away.

    Pretrained weights of `ConfigureModelMixin` are loaded before.
    """
    trainer = getattr(module, "_trainer", None)
    is_restored = trainer is not None and not trainer.strategy.restore_checkpoint_after_setup
    if is_restored:
        for part in module.modules():
            if (load := getattr(part, "_load_awaited_weights", None)) is not None:
                load()
    watch(module)
    if is_restored and not is_deferred(module):  # what is deferred gets its values where it is moved to
        look(module)
