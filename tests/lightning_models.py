"""A small LightningModule with everything that precision and loading have to get right."""

from __future__ import annotations

import logging
import os

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient_init import ConfigureModelMixin, EfficientInit

# Lightning's advice on data loaders and unused GPUs
ADVICE = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
PRECISIONS = ["32-true", "bf16-true", "16-true", "64-true", "bf16-mixed", "16-mixed"]
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


class Regression(L.LightningModule):
    """Two layers, statistics, a buffer in a dtype of its own, and a parameter that no ``nn.init`` function fills."""

    def __init__(self, width: int = 16, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 1))
        self.scale = nn.Parameter(torch.randn(8) * 0.02 + 1)
        self.register_buffer("frequencies", torch.arange(4, dtype=torch.float32) / 3)

    def forward(self, x):
        return self.net(x * self.scale)

    def training_step(self, batch, _):
        loss = self(batch[0]).float().square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("value", self(batch[0]).float().mean())

    test_step = validation_step

    def predict_step(self, batch, _):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.hparams.lr, eps=1e-3)


class Recording(Regression):
    """Leaves behind what its training started from, and in which process."""

    def __init__(self, folder: str):
        super().__init__(24)
        self.folder = folder

    def on_train_start(self):
        torch.save((self.state_dict(), os.getpid()), f"{self.folder}/{self.global_rank}.pt")


class Configured(ConfigureModelMixin, L.LightningModule):
    """The same model, built in ``configure_model``."""

    def __init__(self, width: int = 16, lr: float = 0.1, pretrained: str | None = None):
        super().__init__(pretrained=pretrained)
        self.save_hyperparameters(ignore=["pretrained"])
        self.built = 0

    def configure_model(self):
        self.built += 1
        model = Regression(self.hparams.width)
        self.net, self.scale = model.net, model.scale
        self.register_buffer("frequencies", model.frequencies)

    forward = Regression.forward
    training_step = Regression.training_step
    validation_step = test_step = Regression.validation_step
    predict_step = Regression.predict_step
    configure_optimizers = Regression.configure_optimizers


def loader():
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(torch.randn(32, 8, generator=generator)), batch_size=8)


def quiet_trainer(accelerator="cpu", **kwargs):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(accelerator=accelerator, **{**quiet, "devices": 1, "max_epochs": 1, **kwargs})


def quiet_fabric(efficient_init="32-true", accelerator="cpu", **kwargs):
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    ours = {"strategy": "efficient_init", "plugins": [EfficientInit(efficient_init)]}
    return L.Fabric(accelerator=accelerator, devices=1, **(kwargs or ours))


def same_losses(expected, accelerator):
    """What equals the losses that are expected. CUDA adds up gradients of an embedding in any order."""
    return expected if accelerator == "cpu" else pytest.approx(expected, rel=1e-4)


def assert_equal_states(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].cpu(), value.cpu()), name
