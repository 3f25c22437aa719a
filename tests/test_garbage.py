"""``collections_paused``: no collections inside, and as before outside."""

import gc
import importlib
import threading

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_efficient_init import EfficientInit, load_checkpoint
from lightning_efficient_init.garbage import collections_paused

load_module = importlib.import_module("lightning_efficient_init.load.load")


def test_collection_is_off_inside_and_on_again_outside_also_after_an_exception():
    with collections_paused():
        assert not gc.isenabled()
        with collections_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="inside"), collections_paused():
        raise ValueError("inside")
    assert gc.isenabled()


def test_collection_that_was_off_stays_off():
    gc.disable()
    try:
        with collections_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_last_thread_out_turns_it_on():
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with collections_paused():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=stay)
    with collections_paused():
        thread.start()
        inside.wait(10)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def _load(path):
    load_checkpoint(many(), path)


def _load_by_fabric(path):
    fabric = Fabric(accelerator="cpu", devices=1, strategy="efficient_init", plugins=[EfficientInit("32-true")])
    with fabric.init_module(empty_init=True):
        model = many()
    fabric.load_raw(path, model)


def _load_by_the_trainer(path):
    model = Wrapped()
    trainer = L.Trainer(accelerator="cpu", strategy="efficient_init", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    checkpoint = trainer.strategy.load_checkpoint(path)
    trainer.strategy.load_model_state_dict(checkpoint)


class Wrapped(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.inner = many()


def many():
    return nn.ParameterList(nn.Parameter(torch.zeros(2)) for _ in range(20))


@pytest.mark.parametrize("load", [_load, _load_by_fabric, _load_by_the_trainer])
def test_no_way_to_load_collects_on_its_way(load, tmp_path, monkeypatch):
    weights = many().state_dict()
    if load is _load_by_the_trainer:
        weights = {"state_dict": {f"inner.{name}": value for name, value in weights.items()}}
    torch.save(weights, tmp_path / "many.ckpt")
    meter, seen = load_module.Meter, []
    monkeypatch.setattr(load_module, "Meter", lambda *args: seen.append(gc.isenabled()) or meter(*args))
    load(tmp_path / "many.ckpt")
    assert seen == [False]
    assert gc.isenabled()
