from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning_models import (
    ADVICE,
    DTYPES,
    PRECISIONS,
    Recording,
    Regression,
    assert_equal_states,
    loader,
    quiet_trainer,
    same_losses,
)
from ranks import RanksFailedError, run_ranks
from torch import nn

from lightning_efficient_init import EfficientInit, is_deferred
from lightning_efficient_init.deferred import UninitializedParameterWarning
from lightning_efficient_init.trainer import EfficientDDPStrategy

pytestmark = ADVICE
WORLDS = [1, 2, 3]
WIDE = 40_000


def ddp_trainer(world_size, rank=0, efficient_init="32-true", **kwargs):
    torch.manual_seed(17 + rank)
    ours = {"strategy": "efficient_init_ddp", "plugins": [EfficientInit(efficient_init)]}
    return quiet_trainer(**{**ours, **kwargs, "devices": world_size})


class Losses(Callback):
    """The losses of every step of this rank."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.values.append(outputs["loss"].item())


class Values(Callback):
    """What the module holds when the loop starts."""

    def on_sanity_check_start(self, trainer, module):
        self.state = {name: value.clone() for name, value in module.state_dict().items()}

    on_train_start = on_validation_start = on_sanity_check_start


def eager_model(precision="32-true"):
    torch.manual_seed(17)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES.get(precision, torch.float32))
    try:
        return Regression(24)
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint after one epoch, by stock Lightning on one device."""
    trainer = quiet_trainer()
    trainer.fit(Regression(width=24), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def _build(rank, world_size, stage, precision):
    values = Values()
    trainer = ddp_trainer(world_size, rank, precision, callbacks=[values], max_steps=1)
    with trainer.init_module():
        model = Regression(24)
    getattr(trainer, stage)(model, loader())
    return values.state


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_every_rank_starts_with_the_values_of_a_single_device(world_size, stage):
    for found in run_ranks(_build, world_size, world_size, stage, "32-true"):
        assert_equal_states(found, eager_model().state_dict())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_builds_in_its_dtype(precision):
    for found in run_ranks(_build, 2, 2, "fit", precision):
        assert_equal_states(found, eager_model(precision).state_dict())


def _late(rank, world_size):
    trainer = ddp_trainer(world_size, rank)
    with trainer.init_module(empty_init=True):
        model = Regression(24)
    with pytest.warns(UninitializedParameterWarning):
        trainer.validate(model, loader(), verbose=False)
    return dict(model.named_parameters())


def test_what_nobody_loads_gets_the_values_of_a_single_device():
    for found in run_ranks(_late, 2, 2):
        assert_equal_states(found, dict(eager_model().named_parameters()))


class FromOutside(Regression):
    """Numbers that no generator of torch gives."""

    def __init__(self):
        super().__init__(24)
        self.shift = nn.Parameter(torch.from_numpy(np.random.randn(8)).float())

    def forward(self, x):
        return super().forward(x + self.shift)


def _from_outside(rank, world_size, stage):
    np.random.seed(rank)
    trainer = ddp_trainer(world_size, rank, max_steps=1)
    with trainer.init_module(empty_init=True):
        model = FromOutside()
    with pytest.warns(UninitializedParameterWarning):
        getattr(trainer, stage)(model, loader())
    return dict(model.named_parameters())


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_numbers_from_outside_are_rank_0s_too(stage):
    first, second = run_ranks(_from_outside, 2, 2, stage)
    assert_equal_states(second, first)
    if stage == "validate":
        np.random.seed(0)
        assert torch.equal(first["shift"], torch.from_numpy(np.random.randn(8)).float())


def _load(rank, world_size, path, stage):
    values = Values()
    trainer = ddp_trainer(world_size, rank, callbacks=[values], max_epochs=2)
    with trainer.init_module(empty_init=True):
        model = Regression(24)
    getattr(trainer, stage)(model, loader(), ckpt_path=path)
    return values.state, trainer.global_step


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_a_checkpoint_of_one_device_loads_on_every_rank(checkpoint, world_size, stage):
    for found, step in run_ranks(_load, world_size, world_size, checkpoint, stage):
        assert_equal_states(found, torch.load(checkpoint)["state_dict"])
        assert step == (4 + -(-4 // world_size) if stage == "fit" else 0)


def _count_bytes(rank, world_size, path):
    read = []

    class Counts(Callback):
        def setup(self, trainer, module, stage):
            read.append(_rchar())

        def on_fit_start(self, trainer, module):
            read.append(_rchar())

        on_validation_start = on_fit_start

    trainer = ddp_trainer(world_size, rank, callbacks=[Counts()])
    with trainer.init_module(empty_init=True):
        model = Regression(WIDE)
    trainer.validate(model, loader(), ckpt_path=path, verbose=False)
    return read[1] - read[0]


def _rchar():
    with open("/proc/self/io", "rb") as io:
        return int(next(line for line in io if line.startswith(b"rchar:")).split()[1])


def test_ckpt_path_is_read_once_on_a_node_without_optimizer_states(tmp_path):
    trainer = quiet_trainer()
    trainer.fit(Regression(WIDE), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    weights = sum(t.nbytes for t in trainer.model.state_dict().values())
    first, second = run_ranks(_count_bytes, 2, 2, tmp_path / "a.ckpt")
    assert first + second <= 1.05 * weights + 300_000
    assert first == pytest.approx(weights / 2, rel=0.05, abs=150_000)


def _train(rank, world_size, max_epochs, path=None, resume=None, **kwargs):
    losses = Losses()
    trainer = ddp_trainer(world_size, rank, callbacks=[losses], max_epochs=max_epochs, **kwargs)
    with trainer.init_module(empty_init=resume is not None):
        model = Regression(24)
    trainer.fit(model, loader(), ckpt_path=resume)
    if path is not None:
        trainer.save_checkpoint(path)
    return losses.values


def _train_stock(rank, world_size, max_epochs, precision):
    return _train(rank, world_size, max_epochs, strategy="ddp", plugins=None, precision=precision)


def _train_ours(rank, world_size, max_epochs, precision):
    return _train(rank, world_size, max_epochs, efficient_init=precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_that_of_stock_ddp(precision):
    ours = run_ranks(_train_ours, 2, 2, 1, precision)
    assert ours == run_ranks(_train_stock, 2, 2, 1, precision)


def _train_on(rank, world_size, accelerator, *args):
    return _train(rank, world_size, *args, accelerator=accelerator)


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_goes_on_after_a_resume_as_without(tmp_path, world_size, accelerator):
    if accelerator == "cuda" and world_size > torch.cuda.device_count():
        pytest.skip("needs more CUDA devices")
    whole = run_ranks(_train_on, world_size, world_size, accelerator, 2)
    run_ranks(_train_on, world_size, world_size, accelerator, 1, tmp_path / "a.ckpt")
    resumed = run_ranks(_train_on, world_size, world_size, accelerator, 2, None, tmp_path / "a.ckpt")
    for found, losses in zip(resumed, whole, strict=True):
        assert found == same_losses(losses[len(losses) // 2 :], accelerator)


def _fail_on_one_rank(rank, world_size, paths):
    trainer = ddp_trainer(world_size, rank)
    with trainer.init_module(empty_init=True):
        model = Regression(24)
    trainer.validate(model, loader(), ckpt_path=paths[rank])


def test_a_rank_whose_checkpoint_does_not_fit_takes_the_others_down(checkpoint, tmp_path):
    state = torch.load(checkpoint)
    del state["state_dict"]["scale"]
    torch.save(state, tmp_path / "bad.ckpt")
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(_fail_on_one_rank, 2, 2, [checkpoint, tmp_path / "bad.ckpt"], timeout_s=60)
    lines = [line for line in str(failed.value).splitlines() if "errors.StateDictMismatchError" in line]
    assert len(lines) == 2
    assert len(set(lines)) == 1


def _start_processes(rank, folder, start_method, empty_init):
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        del os.environ[name]
    trainer = ddp_trainer(2, strategy=EfficientDDPStrategy(start_method=start_method), max_steps=1)
    with trainer.init_module(empty_init=empty_init):
        model = Recording(folder)
    was_deferred = is_deferred(model)
    trainer.fit(model, loader())
    return was_deferred, is_deferred(model), os.getpid()


@pytest.mark.parametrize("empty_init", [False, True])
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_init_module_works_before_processes_are_started(tmp_path, start_method, empty_init):
    [(was_deferred, is_deferred, pid)] = run_ranks(_start_processes, 1, str(tmp_path), start_method, empty_init)
    assert was_deferred == (start_method == "fork")
    assert not is_deferred  # Lightning brings the weights back
    states, processes = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    assert len({*processes, pid}) == 3
    for state in states:
        assert_equal_states(state, eager_model().state_dict())
