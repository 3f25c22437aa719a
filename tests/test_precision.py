from __future__ import annotations

import pickle
from contextlib import nullcontext

import lightning as L
import pytest
import torch
import torchmetrics
from lightning_models import (
    ADVICE,
    DTYPES,
    PRECISIONS,
    Regression,
    assert_equal_states,
    loader,
    quiet_fabric,
    quiet_trainer,
)
from torch import nn

from lightning_efficient_init import EfficientInit

pytestmark = ADVICE


@pytest.fixture
def accelerator(device):
    return device.type


def steps_with_fabric(fabric, model):
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    losses = []
    for (x,) in loader():
        optimizer.zero_grad()
        loss = model(x.to(fabric.device)).float().square().mean()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fabric_trains_exactly_as_with_lightnings_own_plugin(precision, accelerator):
    results = []
    stock = {"precision": precision}
    if precision == "16-mixed" and accelerator == "cpu":  # asked for by name, Lightning turns it into bf16-mixed
        stock = {"plugins": [L.fabric.plugins.precision.MixedPrecision("16-mixed", "cpu")]}
    for kwargs in ({}, stock):
        fabric = quiet_fabric(precision, accelerator, **kwargs)
        torch.manual_seed(1)
        with fabric.init_module():
            model = Regression()
        results.append((steps_with_fabric(fabric, model), model.state_dict()))
    assert results[0][0] == results[1][0]
    assert_states_match_up_to_kept_buffers(results[0][1], results[1][1])


def backward_of_the_loss(fabric, x):
    """Train one step without ``fabric.backward``."""
    with fabric.init_module():
        model = Regression()
    model = fabric.setup(model)
    model(x).float().square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("strategy", ["auto", "efficient_init"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_has_a_backward_of_its_own_where_it_has_one_with_lightnings_plugin(precision, strategy):
    ours = L.Fabric(accelerator="cpu", devices=1, strategy=strategy, plugins=[EfficientInit(precision)])
    (x,) = next(iter(loader()))
    if precision.endswith("mixed"):
        plugin = L.fabric.plugins.precision.MixedPrecision(precision, "cpu")
        for fabric in (ours, L.Fabric(accelerator="cpu", devices=1, plugins=[plugin])):
            with pytest.raises(RuntimeError, match=r"requires you to call `fabric\.backward"):
                backward_of_the_loss(fabric, x)
    else:
        assert all(gradient is not None for gradient in backward_of_the_loss(ours, x))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strategy", ["auto", "efficient_init"])
def test_the_trainer_trains_exactly_as_with_lightnings_own_plugin(precision, strategy, accelerator):
    states = []
    stock = {"precision": precision}
    if precision == "16-mixed" and accelerator == "cpu":
        stock = {"plugins": [L.pytorch.plugins.precision.MixedPrecision("16-mixed", "cpu")]}
    for kwargs in ({"plugins": [EfficientInit(precision)], "strategy": strategy}, stock):
        trainer = quiet_trainer(accelerator, gradient_clip_val=1.0, **kwargs)
        torch.manual_seed(1)
        with trainer.init_module():
            model = Regression()
        trainer.fit(model, loader())
        states.append({**model.state_dict(), "loss": trainer.callback_metrics["loss"]})
    assert_states_match_up_to_kept_buffers(*states)


def assert_states_match_up_to_kept_buffers(ours, stock):
    for name, value in stock.items():
        if name != "frequencies":
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name
    assert ours["frequencies"].dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("empty", [False, True])
def test_parameters_are_created_on_the_device_in_the_dtype(precision, empty, device):
    fabric = quiet_fabric(precision, device.type)
    with fabric.init_module(empty_init=empty):
        model = Regression()
    for parameter in model.parameters():
        assert parameter.device == device
        assert parameter.dtype == DTYPES.get(precision, torch.float32)
    assert model.frequencies.dtype == torch.float32
    assert model.frequencies.device == device
    assert torch.equal(model.frequencies.cpu(), torch.arange(4) / 3)


def test_init_module_without_empty_init_gives_the_values_of_eager_construction(device):
    fabric = quiet_fabric("32-true", device.type)
    torch.manual_seed(5)
    with fabric.init_module():
        model = Regression()
    torch.manual_seed(5)
    with device:
        expected = Regression()
    assert_equal_states(model.state_dict(), expected.state_dict())


def test_a_declared_buffer_dtype_survives_setup_in_fabric_and_in_the_trainer():
    fabric = quiet_fabric("bf16-true")
    with fabric.init_module():
        model = Regression()
    fabric.setup(model)
    assert model.frequencies.dtype == torch.float32
    assert model.net[1].running_mean.dtype == torch.bfloat16

    trainer = quiet_trainer(plugins=[EfficientInit("bf16-true")])
    with trainer.init_module():
        model = Regression()
    trainer.validate(model, loader(), verbose=False)
    assert model.frequencies.dtype == torch.float32


def test_a_module_built_elsewhere_is_cast_as_lightning_casts_it():
    model = quiet_fabric("bf16-true").setup(Regression())
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}


class Measured(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.mse = torchmetrics.MeanSquaredError()
        self.both = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.CatMetric()])
        self.recurrent = nn.LSTM(2, 2)


@pytest.mark.parametrize("is_elsewhere", [True, False])
def test_metrics_and_lightning_modules_have_the_dtype_that_they_have_with_lightnings_plugin(is_elsewhere):
    results = []
    stock = L.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    for fabric in (quiet_fabric("bf16-true"), stock):
        with nullcontext() if is_elsewhere else fabric.init_module():
            model = Measured()
        fabric.setup(model)
        torch.manual_seed(3)
        model.mse(5 * torch.rand(100), torch.zeros(100))
        model.both(torch.rand(9))
        results.append([model.dtype, model.mse.compute(), *model.both.compute().values()])
        assert model.mse.sum_squared_error.dtype == torch.bfloat16
        model.mse.reset()
        assert model.mse.sum_squared_error.dtype == torch.bfloat16
    for ours, theirs in zip(*results, strict=True):
        assert ours is theirs or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


def test_layers_added_to_a_built_model_are_cast_with_their_own_buffers_only():
    fabric = quiet_fabric("bf16-true")
    with fabric.init_module():
        model = Regression()
    model.added = nn.BatchNorm1d(3)
    fabric.setup(model)
    assert model.added.weight.dtype == model.added.running_mean.dtype == torch.bfloat16
    assert model.frequencies.dtype == torch.float32


def test_the_default_dtype_is_restored_after_an_exception():
    fabric = quiet_fabric("bf16-true")
    with pytest.raises(KeyError), fabric.init_module(empty_init=True):
        raise KeyError
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device() == torch.device("cpu")
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_an_unknown_precision_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="must be one of 32-true, bf16-true"):
        EfficientInit("bf16")


def test_the_plugin_can_be_pickled_after_use():
    fabric = quiet_fabric("16-mixed")
    model = Regression()
    steps_with_fabric(fabric, model)
    assert pickle.loads(pickle.dumps(fabric._precision)).precision == "16-mixed"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fabric_and_a_trainer_may_take_turns_with_one_plugin(precision):
    plugin = EfficientInit(precision)
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    layer = fabric.setup(nn.Linear(8, 1))
    for _ in range(2):
        steps_with_fabric(fabric, Regression())
        quiet_trainer(plugins=[plugin]).fit(Regression(), loader())
        scaler = plugin.scaler
        fabric.backward(layer(torch.ones(2, 8)).sum())
        assert layer.weight.grad.any()
        assert plugin.scaler is scaler


def test_a_fabric_can_go_on_after_a_run_of_the_trainer_that_failed():
    class Fails(Regression):
        def training_step(self, batch, _):
            raise KeyError

    plugin = EfficientInit()
    with pytest.raises(KeyError):
        quiet_trainer(plugins=[plugin]).fit(Fails(), loader())
    steps_with_fabric(L.Fabric(accelerator="cpu", devices=1, plugins=[plugin]), Regression())


def test_the_scaler_of_16_mixed_is_saved_and_restored(tmp_path):
    trainer = quiet_trainer(plugins=[EfficientInit("16-mixed")])
    model = Regression()
    trainer.fit(model, loader())
    trainer.strategy.precision_plugin.scaler.update(new_scale=128.0)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    plugin = EfficientInit("16-mixed")
    quiet_trainer(plugins=[plugin], max_epochs=1).fit(Regression(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert plugin.scaler.get_scale() == 128.0
    assert plugin.state_dict()["scale"] == 128.0


def test_autocast_before_setup_does_not_decide_for_which_device_it_is_on(device):
    class Asks(nn.Linear):
        def forward(self, x):
            self.is_cast = torch.is_autocast_enabled(self.weight.device.type)
            return super().forward(x)

    fabric = quiet_fabric("bf16-mixed", device.type)
    with fabric.autocast():
        pass
    model = Asks(2, 2)
    fabric.setup(model)(torch.ones(1, 2, device=device))
    assert model.is_cast


def test_precisions_without_a_scaler_have_none():
    assert EfficientInit("bf16-mixed").scaler is None
    assert EfficientInit("32-true").state_dict() == {}
