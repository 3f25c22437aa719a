"""``load_from_checkpoint`` inside ``init_module``."""

from __future__ import annotations

import argparse
import io
import threading

import lightning as L
import pytest
import torch
from lightning.pytorch.core import saving
from lightning_models import ADVICE, DTYPES, Regression, assert_equal_states, loader, quiet_fabric, quiet_trainer
from torch import nn

from lightning_efficient_init import EfficientInit, uninitialized_parameters
from lightning_efficient_init.checkpoint import LazyTensor
from lightning_efficient_init.errors import CheckpointNotFoundError, StateDictMismatchError, UnsafeCheckpointError

pytestmark = ADVICE


@pytest.fixture
def checkpoint(tmp_path, device):
    trainer = quiet_trainer(device.type)
    trainer.fit(Regression(width=24, lr=0.3), loader())
    trainer.save_checkpoint(tmp_path / "path.ckpt")
    return tmp_path / "path.ckpt"


def init(accelerator="cpu", precision="32-true", strategy="auto", **kwargs):
    trainer = quiet_trainer(accelerator, strategy=strategy, plugins=[EfficientInit(precision)])
    return trainer.init_module(**{"empty_init": True, **kwargs})


@pytest.mark.parametrize("strategy", ["auto", "efficient_init"])
@pytest.mark.parametrize("precision", ["32-true", "16-true", "bf16-true", "64-true", "bf16-mixed"])
def test_the_seeds_snippet_runs_as_written(checkpoint, precision, strategy, device):
    MyLightningModule = Regression
    trainer = quiet_trainer(device.type, strategy=strategy, plugins=[EfficientInit(precision)])
    with trainer.init_module(empty_init=True):
        model = MyLightningModule.load_from_checkpoint(checkpoint)
    dtype = DTYPES.get(precision, torch.float32)
    expected = Regression.load_from_checkpoint(checkpoint).to(device)
    for name, value in expected.state_dict().items():
        keeps = name == "frequencies" or not value.is_floating_point()
        assert torch.equal(model.state_dict()[name], value if keeps else value.to(dtype)), name
        assert model.state_dict()[name].device == device
    assert dict(model.hparams) == {"width": 24, "lr": 0.3}
    assert not uninitialized_parameters(model)
    trainer.fit(model, loader())


def test_no_optimizer_state_is_read(tmp_path, bytes_read):
    trainer = quiet_trainer()
    trainer.fit(Regression(width=60_000), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    weights = sum(t.nbytes for t in trainer.model.state_dict().values())
    with init():
        Regression.load_from_checkpoint(tmp_path / "a.ckpt")
        before = bytes_read()
        Regression.load_from_checkpoint(tmp_path / "a.ckpt")
    assert bytes_read() - before < 1.05 * weights + 200_000


def test_keyword_arguments_override_hyperparameters(checkpoint):
    with init():
        model = Regression.load_from_checkpoint(checkpoint, lr=0.7)
    assert model.hparams.lr == 0.7


def test_an_hparams_file_overrides_the_checkpoints(checkpoint, tmp_path):
    (tmp_path / "hparams.yaml").write_text("width: 24\nlr: 0.9\n")
    with init():
        model = Regression.load_from_checkpoint(checkpoint, hparams_file=tmp_path / "hparams.yaml")
    assert model.hparams.lr == 0.9


def test_hyperparameters_of_any_safe_kind_come_back(tmp_path):
    class Configured(L.LightningModule):
        def __init__(self, sizes, offset, name="x"):
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(*sizes)

    trainer = quiet_trainer()
    model = Configured([2, 3], torch.tensor([1.0, 2.0]), name="y")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with init():
        found = Configured.load_from_checkpoint(tmp_path / "a.ckpt")
    assert found.hparams.sizes == [2, 3]
    assert type(found.hparams.offset) is torch.Tensor
    assert torch.equal(found.hparams.offset, torch.tensor([1.0, 2.0]))


def test_a_checkpoint_whose_pickle_would_run_code_is_refused_unless_trusted(tmp_path):
    class Configured(L.LightningModule):
        def __init__(self, config):
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(2, 2)

    trainer = quiet_trainer()
    trainer.strategy.connect(Configured(argparse.Namespace(a=1)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with init(), pytest.raises(UnsafeCheckpointError, match="argparse"):
        Configured.load_from_checkpoint(tmp_path / "a.ckpt")
    if "weights_only" in saving._load_from_checkpoint.__code__.co_varnames:  # since Lightning 2.6
        with init():
            found = Configured.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=False)
        assert found.hparams.config.a == 1


@pytest.mark.filterwarnings("ignore:.*is an instance of `nn.Module`")  # and what happens is tested
def test_a_module_among_the_hyperparameters_comes_back_with_parameters_that_train(tmp_path):
    class Wraps(L.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.save_hyperparameters()
            self.net = net

    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net[0].bias.requires_grad_(False)
    trainer = quiet_trainer()
    trainer.strategy.connect(Wraps(net))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with init():
        found = Wraps.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert {type(parameter) for parameter in found.parameters()} == {nn.Parameter}
    assert {type(buffer) for buffer in found.buffers()} == {torch.Tensor}
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in net.parameters()]
    for name, value in net.state_dict().items():
        assert torch.equal(found.net.state_dict()[name], value)


def test_strict_loading_names_everything(checkpoint):
    class Other(Regression):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = nn.Linear(2, 2)
            del self.scale

    with init(), pytest.raises(StateDictMismatchError) as caught:
        Other.load_from_checkpoint(checkpoint)
    assert caught.value.missing == ("extra.weight", "extra.bias")
    assert caught.value.unexpected == ("scale",)


def test_a_partial_checkpoint_gives_the_rest_its_own_initialization(checkpoint):
    class Extended(Regression):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = nn.Linear(2, 2)

    torch.manual_seed(6)
    with init(), pytest.warns(UserWarning, match="Found keys that are in the model state dict but not in"):
        model = Extended.load_from_checkpoint(checkpoint, strict=False)
    torch.manual_seed(6)
    expected = Extended(width=24)
    assert torch.equal(model.extra.weight, expected.extra.weight)
    assert torch.equal(model.scale, torch.load(checkpoint)["state_dict"]["scale"].cpu())
    assert not uninitialized_parameters(model)


def test_map_location_decides_where_the_model_ends(checkpoint, device):
    for map_location in ("cpu", torch.device("cpu"), {"cuda:0": "cpu"}, lambda storage, _: storage):
        with init(device.type):
            model = Regression.load_from_checkpoint(checkpoint, map_location=map_location)
        assert model.scale.device.type == "cpu"


def test_on_load_checkpoint_runs_and_may_edit(checkpoint):
    class Edits(Regression):
        def on_load_checkpoint(self, checkpoint):
            assert checkpoint["epoch"] == 1
            state = checkpoint["state_dict"]
            state["scale"] = torch.full_like(state["scale"], 3.0)

    with init():
        model = Edits.load_from_checkpoint(checkpoint)
    assert torch.equal(model.scale, torch.full((8,), 3.0))


def test_on_load_checkpoint_may_edit_many_weights_in_one_call(checkpoint):
    class Scales(Regression):
        def on_load_checkpoint(self, checkpoint):
            torch._foreach_add_(list(checkpoint["state_dict"].values()), 2)

    with init():
        model = Scales.load_from_checkpoint(checkpoint)
    expected = torch.load(checkpoint)["state_dict"]
    assert all(torch.equal(value.cpu(), 2 + expected[name].cpu()) for name, value in model.state_dict().items())


def test_layers_made_in_configure_model_are_loaded(tmp_path, device):
    class Late(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = None

        def configure_model(self):
            if self.layer is None:
                self.layer = nn.Linear(4, 4)

    trainer = quiet_trainer()
    saved = Late()
    saved.configure_model()
    trainer.strategy.connect(saved)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with init(device.type, "bf16-true"):
        model = Late.load_from_checkpoint(tmp_path / "a.ckpt")
    assert model.layer.weight.dtype == torch.bfloat16
    assert model.layer.weight.device == device
    assert torch.equal(model.layer.weight.cpu(), saved.layer.weight.bfloat16())


def test_it_streams_without_empty_init_and_in_fabric_too(checkpoint):
    with init(empty_init=False):
        model = Regression.load_from_checkpoint(checkpoint)
    assert_equal_states(model.state_dict(), torch.load(checkpoint, map_location="cpu")["state_dict"])
    with quiet_fabric().init_module(empty_init=True):
        model = Regression.load_from_checkpoint(checkpoint)
    assert_equal_states(model.state_dict(), torch.load(checkpoint, map_location="cpu")["state_dict"])


def test_file_objects_are_left_to_lightning(checkpoint):
    with init():
        model = Regression.load_from_checkpoint(io.BytesIO(checkpoint.read_bytes()))
    assert_equal_states(model.state_dict(), torch.load(checkpoint, map_location="cpu")["state_dict"])


def test_data_modules_load_too(tmp_path):
    class Data(L.LightningDataModule):
        def __init__(self, size=1):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return loader()

        def state_dict(self):
            return {"seen": 5}

        def load_state_dict(self, state_dict):
            self.seen = state_dict["seen"]

    trainer = quiet_trainer()
    trainer.fit(Regression(), datamodule=Data(size=9))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with init():
        data = Data.load_from_checkpoint(tmp_path / "a.ckpt")
    assert data.hparams.size == 9
    assert data.seen == 5


def test_a_missing_file_is_reported_and_everything_is_restored(tmp_path):
    before = saving.pl_load, nn.Module.load_state_dict
    with pytest.raises(CheckpointNotFoundError), init():
        Regression.load_from_checkpoint(tmp_path / "nothing.ckpt")
    assert (saving.pl_load, nn.Module.load_state_dict) == before


def test_other_threads_load_as_ever(checkpoint):
    used = []

    def load():
        used.append(saving.pl_load(checkpoint, map_location="cpu")["state_dict"]["scale"])

    with init():
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
        load()
    assert [type(tensor) for tensor in used] == [torch.Tensor, LazyTensor]
