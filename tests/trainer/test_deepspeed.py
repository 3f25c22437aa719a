"""ZeRO-3 under the Trainer, by real processes."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning_models import Configured, Regression, assert_equal_states, loader, quiet_trainer, same_losses
from ranks import RanksFailedError, run_ranks
from torch import nn

from lightning_efficient_init import EfficientInit, is_deferred, load_checkpoint

NAME = "efficient_init_deepspeed_stage_3"


class Plain(Regression):
    """Without statistics of batches, which ranks have each for itself."""

    def __init__(self, width=24):
        super().__init__(width)
        self.net[1] = nn.LayerNorm(width)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


class Watches(Callback):
    """What the module holds when a loop starts, whole, and the losses of this rank."""

    def __init__(self):
        self.losses, self.state = [], None

    def on_train_start(self, trainer, module):
        self.state = gathered(module)

    on_validation_start = on_train_start

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(outputs["loss"].item())


def gathered(module):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def trainer_of(world_size, rank=0, strategy=NAME, **kwargs):
    warnings.filterwarnings("ignore")  # DeepSpeed's own, and Lightning's about them
    torch.manual_seed(17 + rank)
    watches = Watches()
    ours = {"plugins": [EfficientInit("32-true")], "strategy": strategy, "max_epochs": 1, "callbacks": [watches]}
    return quiet_trainer(**{**ours, "devices": world_size, **kwargs}), watches


def eager_model():
    torch.manual_seed(17)
    return Plain()


@pytest.fixture
def checkpoint(tmp_path):
    trainer = quiet_trainer()
    trainer.fit(Plain(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def _build(rank, world_size, stage):
    trainer, watches = trainer_of(world_size, rank)
    with trainer.init_module():
        model = Plain()
    assert is_deferred(model)
    getattr(trainer, stage)(model, loader())
    return watches.state


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_every_stage_starts_with_the_values_of_one_device(world_size, stage):
    for state in run_ranks(_build, world_size, world_size, stage):
        assert_equal_states(state, eager_model().state_dict())


def _warnings_of_init_module(rank, world_size):
    trainer, _ = trainer_of(world_size, rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with trainer.init_module():
            Plain()
    return [str(warning.message) for warning in caught if "init_module" in str(warning.message)]


def test_nobody_is_warned_of_init_module():
    assert run_ranks(_warnings_of_init_module, 1, 1) == [[]]


def _load(rank, world_size, path, stage):
    trainer, watches = trainer_of(world_size, rank, max_epochs=2)
    with trainer.init_module(empty_init=True):
        model = Plain()
    getattr(trainer, stage)(model, loader(), ckpt_path=path)
    return watches.state


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_checkpoint_of_one_device_loads(checkpoint, stage):
    for state in run_ranks(_load, 2, 2, checkpoint, stage):
        assert_equal_states(state, torch.load(checkpoint)["state_dict"])


def test_strict_is_strict(checkpoint):
    content = torch.load(checkpoint)
    del content["state_dict"]["scale"]
    torch.save(content, checkpoint)
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(_load, 2, 2, checkpoint, "validate")
    lines = [line for line in str(failed.value).splitlines() if "errors.StateDictMismatchError" in line]
    assert len(lines) == 2
    assert "scale" in str(failed.value)


def _train(rank, world_size, max_epochs, strategy=NAME, save=None, resume=None, accelerator="cpu"):
    plugins = {"plugins": None} if strategy == "ddp" else {}
    trainer, watches = trainer_of(world_size, rank, strategy, max_epochs=max_epochs, accelerator=accelerator, **plugins)
    with trainer.init_module():
        model = Plain()
    if strategy == "ddp":
        watches.on_train_start = lambda *_: None
    trainer.fit(model, loader(), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return watches.losses


def test_training_losses_are_those_of_ddp():
    ours, theirs = run_ranks(_train, 2, 2, 2), run_ranks(_train, 2, 2, 2, "ddp")
    for found, expected in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_training_goes_on_after_a_resume_as_without(tmp_path, accelerator):
    whole = run_ranks(_train, 2, 2, 2, NAME, None, None, accelerator)
    run_ranks(_train, 2, 2, 1, NAME, str(tmp_path / "saved"), None, accelerator)
    resumed = run_ranks(_train, 2, 2, 2, NAME, None, str(tmp_path / "saved"), accelerator)
    for found, losses in zip(resumed, whole, strict=True):
        assert found == same_losses(losses[len(losses) // 2 :], accelerator)


@pytest.mark.parametrize(("world_size", "stage"), [(2, "validate"), (3, "validate"), (3, "fit")])
def test_where_no_optimizer_can_be_resumed_a_folder_gives_its_weights(tmp_path, world_size, stage):
    path, model = str(tmp_path / "saved"), Plain()
    run_ranks(_train, 2, 2, 1, NAME, path)
    load_checkpoint(model, path)
    for state in run_ranks(_load, world_size, world_size, path, stage):
        assert_equal_states(state, model.state_dict())


class Wraps(Plain):
    def __init__(self, net):
        super().__init__()
        self.save_hyperparameters()
        self.net = net


def _fit_with_a_module_among_hparams(rank, world_size, path):
    trainer, _ = trainer_of(world_size, rank)
    with trainer.init_module():
        model = Wraps(Plain().net)
    trainer.fit(model, loader())
    trainer.save_checkpoint(path)
    return list(model.hparams)


def test_a_module_among_the_hyperparameters_is_left_out_of_the_checkpoint(tmp_path):
    (hparams,) = run_ranks(_fit_with_a_module_among_hparams, 1, 1, tmp_path / "a.ckpt")
    assert "width" in hparams
    assert "net" not in hparams
    assert (tmp_path / "a.ckpt").exists()


def _configured(rank, world_size, path):
    trainer, watches = trainer_of(world_size, rank)
    model = Configured(24, pretrained=path)
    trainer.validate(model, loader(), verbose=False)
    start = watches.state
    trainer.fit(model, loader())
    return model.built, start


def test_configure_model_is_called_once_and_pretrained_weights_are_loaded(tmp_path):
    torch.manual_seed(5)
    torch.save(Regression(24).state_dict(), tmp_path / "raw.pth")
    for built, start in run_ranks(_configured, 2, 2, str(tmp_path / "raw.pth")):
        assert built == 1
        assert start["scale"].shape == (8,)
