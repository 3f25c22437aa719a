"""What the package promises to whoever imports it."""

from __future__ import annotations

import subprocess
import sys

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

import lightning_efficient_init
from lightning_efficient_init import fabric, trainer


def test_what_is_exported_is_exactly_what_all_says():
    public = {name for name in vars(lightning_efficient_init) if not name.startswith("_")}
    submodules = {name for name in public if f"lightning_efficient_init.{name}" in sys.modules}
    assert public - submodules - {"annotations", "register_strategies"} == set(lightning_efficient_init.__all__)


def test_the_strategies_are_known_to_both_registries():
    assert STRATEGY_REGISTRY["efficient_init"]["strategy"] is fabric.EfficientSingleDeviceStrategy
    assert StrategyRegistry["efficient_init"]["strategy"] is trainer.EfficientSingleDeviceStrategy


def test_importing_registers_and_does_nothing_else():
    code = """
import logging, torch, lightning.pytorch
from lightning.pytorch.core import saving
handlers, load, init = list(logging.root.handlers), torch.nn.Module.load_state_dict, vars(torch.nn.Parameter).copy()
pl_load, normal = saving.pl_load, torch.nn.init.normal_
import lightning_efficient_init
assert logging.root.handlers == handlers and not torch.cuda.is_initialized()
assert torch.nn.Module.load_state_dict is load and vars(torch.nn.Parameter) == init
assert saving.pl_load is pl_load and torch.nn.init.normal_ is normal
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_the_core_does_not_import_lightning():
    code = """
import sys, types
package = types.ModuleType("lightning_efficient_init")
package.__path__ = [PATH]
sys.modules["lightning_efficient_init"] = package  # without its __init__, which imports the adapters
import lightning_efficient_init.load, lightning_efficient_init.deferred, lightning_efficient_init.checkpoint
import lightning_efficient_init.sinks, lightning_efficient_init.load.state_dict, lightning_efficient_init.load.tree
assert not [name for name in sys.modules if name.split(".")[0] in ("lightning", "pytorch_lightning")]
"""
    path = repr(next(iter(lightning_efficient_init.__path__)))
    subprocess.run([sys.executable, "-W", "ignore", "-c", code.replace("PATH", path)], check=True)
