from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_models import Regression, assert_equal_states, loader, quiet_fabric
from torch import nn

from lightning_efficient_init import (
    EfficientInit,
    deferred_init,
    load_checkpoint,
    materialize,
    uninitialized_parameters,
)
from lightning_efficient_init.deferred import UninitializedParameterWarning
from lightning_efficient_init.errors import CheckpointReadError, StateDictMismatchError
from lightning_efficient_init.fabric import EfficientSingleDeviceStrategy


def trained(fabric, width=16):
    """A model and an optimizer that has state."""
    with fabric.init_module():
        model = Regression(width)
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), eps=1e-3))
    for (x,) in loader():
        optimizer.zero_grad()
        fabric.backward(model(x.to(fabric.device)).float().square().mean())
        optimizer.step()
    return model, optimizer


def test_the_seeds_snippet_runs_as_written(tmp_path, device):
    expected = Regression()
    torch.save(expected.state_dict(), tmp_path / "lit-llama.pth")
    fabric = L.Fabric(
        accelerator=device.type, devices=1, strategy="efficient_init", plugins=[EfficientInit("bf16-true")]
    )
    with fabric.init_module(empty_init=True):
        model = Regression()
    fabric.load_raw(tmp_path / "lit-llama.pth", model)
    reference = Regression().to(device)
    reference.load_state_dict(torch.load(tmp_path / "lit-llama.pth"))
    for name, value in reference.state_dict().items():
        dtype = torch.float32 if name == "frequencies" else torch.bfloat16
        assert torch.equal(model.state_dict()[name], value.to(dtype) if value.is_floating_point() else value), name
    assert fabric.setup(model)(torch.randn(4, 8, device=device)).device.type == device.type


def test_the_strategy_follows_the_accelerators_device(device):
    fabric = quiet_fabric(accelerator=device.type)
    assert isinstance(fabric.strategy, EfficientSingleDeviceStrategy)
    assert fabric.device == device
    with fabric.init_module():
        assert nn.Linear(2, 2).weight.device == device


def test_a_strategy_made_with_a_device_stays_there():
    fabric = L.Fabric(strategy=EfficientSingleDeviceStrategy("cpu"), plugins=[EfficientInit("64-true")])
    assert fabric.device == torch.device("cpu")


def test_several_devices_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"offers 2.*devices=1"):
        L.Fabric(accelerator="cpu", devices=2, strategy="efficient_init")


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_the_strategy_works_with_lightnings_own_precision(precision, tmp_path):
    fabric = L.Fabric(accelerator="cpu", devices=1, strategy="efficient_init", precision=precision)
    with fabric.init_module(empty_init=True):
        model = Regression()
    torch.save(Regression().state_dict(), tmp_path / "a.pth")
    fabric.load_raw(tmp_path / "a.pth", model)
    assert not uninitialized_parameters(model)
    assert model.scale.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)


def test_empty_init_runs_no_initializer(monkeypatch):
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(nn.init.trunc_normal_(torch.empty(300, 300)))
            self.b = nn.Parameter(torch.randn(300, 300).mul_(0.02))
            self.c = nn.Parameter(nn.init.orthogonal_(torch.empty(300, 300)))
            self.d = nn.Parameter(torch.ones(300))
            self.d.data.uniform_()

    with quiet_fabric().init_module(empty_init=True):
        model = Slow()
    assert uninitialized_parameters(model) == ["a", "b", "c", "d"]


def test_loading_before_and_after_setup_gives_the_same_model_and_no_warning(tmp_path, device):
    torch.save(Regression().state_dict(), tmp_path / "a.pth")
    models = []
    for is_late in (False, True):
        fabric = quiet_fabric("bf16-true", device.type)
        with fabric.init_module(empty_init=True):
            model = Regression()
        if not is_late:
            fabric.load_raw(tmp_path / "a.pth", model)
        model = fabric.setup(model)
        if is_late:
            fabric.load_raw(tmp_path / "a.pth", model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.randn(4, 8, device=device))
        models.append(model)
    for late, early in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(late, early)


def test_what_nobody_loads_is_initialized_at_first_use_with_one_warning(device):
    fabric = quiet_fabric("32-true", device.type)
    torch.manual_seed(4)
    with fabric.init_module(empty_init=True):
        model = Regression()
    model = fabric.setup(model)
    with pytest.warns(UninitializedParameterWarning, match=r"net\.0\.weight") as caught:
        model(torch.randn(4, 8, device=device))
    assert len(caught) == 1
    torch.manual_seed(4)
    with device:
        expected = Regression()
    for found, value in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 8, device=device))
        model.state_dict()


def test_what_nobody_loads_is_initialized_before_it_is_saved(tmp_path):
    fabric = quiet_fabric()
    torch.manual_seed(4)
    expected = Regression()
    torch.manual_seed(4)
    with fabric.init_module(empty_init=True):
        model = Regression()
    with pytest.warns(UninitializedParameterWarning):
        fabric.save(tmp_path / "a.ckpt", {"model": model})
    assert_equal_states(torch.load(tmp_path / "a.ckpt")["model"], expected.state_dict())


def test_saving_counts_as_first_use(tmp_path):
    fabric = quiet_fabric()
    with fabric.init_module(empty_init=True):
        model = Regression()
    model = fabric.setup(model)
    with pytest.warns(UninitializedParameterWarning):
        fabric.save(tmp_path / "a.ckpt", {"model": model})
    saved = torch.load(tmp_path / "a.ckpt")["model"]
    assert_equal_states(saved, model.state_dict())
    assert saved["scale"].abs().max() < 2


def test_load_restores_model_optimizer_and_counters(tmp_path, device):
    fabric = quiet_fabric("32-true", device.type)
    model, optimizer = trained(fabric)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "step": 4, "best": torch.tensor(0.5)})
    other, other_optimizer = trained(fabric)
    state = {"model": other, "optimizer": other_optimizer, "step": 0, "best": None}
    assert fabric.load(tmp_path / "a.ckpt", state) == {}
    assert state["step"] == 4
    assert state["best"] == torch.tensor(0.5)
    assert type(state["best"]) is torch.Tensor
    assert_equal_states(other.state_dict(), model.state_dict())
    for found, expected in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        for key, value in expected.items():
            assert found[key].device == value.device
            assert torch.equal(found[key], value)


def test_what_is_not_asked_for_is_read_when_it_is_taken_out(tmp_path, bytes_read):
    fabric = quiet_fabric()
    model, optimizer = trained(fabric, width=60_000)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "step": 4})
    weights = sum(t.nbytes for t in model.state_dict().values())
    before = bytes_read()
    rest = fabric.load(tmp_path / "a.ckpt", {"model": model})
    assert bytes_read() - before < 1.05 * weights + 200_000
    assert set(rest) == {"optimizer", "step"}
    moment = rest["optimizer"]["state"][0]["exp_avg"]
    assert type(moment) is torch.Tensor
    assert torch.equal(moment, next(iter(optimizer.state.values()))["exp_avg"])


def test_what_is_not_asked_for_serves_as_if_it_had_been_read(tmp_path):
    fabric = quiet_fabric()
    generator = torch.Generator().manual_seed(4)
    model, optimizer = trained(fabric)
    path = tmp_path / "a.ckpt"
    fabric.save(path, {"model": model, "optimizer": optimizer, "ema": model, "random": generator.get_state()})
    rest = fabric.load(path, {"optimizer": optimizer})
    other = torch.Generator()
    other.set_state(rest["random"])
    assert torch.equal(torch.rand(3, generator=other), torch.rand(3, generator=generator))
    average = Regression()
    average.load_state_dict(rest["ema"], assign=True)
    average.eval()(torch.ones(2, 8)).sum().backward()
    assert type(average.scale) is nn.Parameter
    assert_equal_states(average.state_dict(), model.state_dict())
    assert average.scale.grad is not None


def test_a_file_that_was_replaced_is_not_taken_for_the_one_that_was_loaded(tmp_path):
    fabric = quiet_fabric()
    model, optimizer = trained(fabric)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "step": 4})
    rest = fabric.load(tmp_path / "a.ckpt", {"model": model})
    assert rest["step"] == 4
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "step": 5})
    assert rest["step"] == 4
    with pytest.raises(CheckpointReadError, match="as it was when its header was read, found another one"):
        rest["optimizer"]
    (tmp_path / "a.ckpt").unlink()
    with pytest.raises(CheckpointReadError, match="nothing at this path"):
        rest.get("optimizer")


def test_nothing_changes_unless_every_model_fits(tmp_path):
    fabric = quiet_fabric()
    torch.save({"a": nn.Linear(2, 2).state_dict(), "b": nn.Linear(3, 3).state_dict()}, tmp_path / "a.ckpt")
    first, second = nn.Linear(2, 2), nn.Linear(4, 4)
    before = first.weight.clone()
    with pytest.raises(StateDictMismatchError, match=r"\[4, 4\], the checkpoint \[3, 3\]"):
        fabric.load(tmp_path / "a.ckpt", {"a": first, "b": second})
    assert torch.equal(first.weight, before)


def test_load_without_a_state_returns_everything(tmp_path):
    fabric = quiet_fabric()
    model, optimizer = trained(fabric)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "step": 4})
    found, expected = fabric.load(tmp_path / "a.ckpt"), torch.load(tmp_path / "a.ckpt")
    assert_equal_states(found["model"], expected["model"])
    assert type(found["model"]["scale"]) is torch.Tensor
    assert found["step"] == 4


def test_what_was_saved_as_a_parameter_is_loaded_as_one(tmp_path):
    fabric = quiet_fabric()
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    torch.save({"net": net, "p": net.weight, "rest": {"p": net.weight}}, tmp_path / "a.ckpt")
    state = {"net": None, "p": None}
    load = fabric.strategy.load_checkpoint  # fabric.load has taken weights_only since Lightning 2.6
    rest = load(tmp_path / "a.ckpt", state, weights_only=False)
    whole = load(tmp_path / "a.ckpt", weights_only=False)
    for found in (state["p"], rest["rest"]["p"], whole["p"], *state["net"].parameters(), *whole["net"].parameters()):
        assert type(found) is nn.Parameter
    assert [p.requires_grad for p in state["net"].parameters()] == [True, False]
    assert whole["p"] is whole["net"].weight
    assert torch.equal(whole["p"], net.weight)


def test_strict_loading_asks_for_every_key(tmp_path):
    fabric = quiet_fabric()
    torch.save({"model": nn.Linear(2, 2).state_dict()}, tmp_path / "a.ckpt")
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError, match="step"):
        fabric.load(tmp_path / "a.ckpt", {"model": model, "step": 0})
    fabric.load(tmp_path / "a.ckpt", {"model": model, "step": 0}, strict=False)


def test_load_raw_reads_a_bare_optimizer_state(tmp_path):
    fabric = quiet_fabric()
    _, optimizer = trained(fabric)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    _, other = trained(fabric)
    fabric.load_raw(tmp_path / "a.pt", other)
    for found, expected in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(found["exp_avg"], expected["exp_avg"])


def test_a_checkpoint_io_of_the_users_own_does_the_loading(tmp_path):
    class Counting(TorchCheckpointIO):
        loads = 0

        def load_checkpoint(self, *args, **kwargs):
            self.loads += 1
            return super().load_checkpoint(*args, **kwargs)

    io = Counting()
    fabric = L.Fabric(accelerator="cpu", devices=1, strategy="efficient_init", plugins=[io])
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
    fabric.load_raw(tmp_path / "a.pth", nn.Linear(2, 2))
    assert io.loads == 1


def test_load_checkpoint_takes_a_model_that_fabric_has_set_up(tmp_path):
    torch.save(Regression().state_dict(), tmp_path / "a.pth")
    model = quiet_fabric().setup(Regression())
    load_checkpoint(model, tmp_path / "a.pth")
    assert_equal_states(model.state_dict(), torch.load(tmp_path / "a.pth"))


def test_inside_a_recording_an_empty_model_has_whole_recipes():
    fabric = quiet_fabric(strategy="efficient_init")
    torch.manual_seed(0)
    expected = nn.Linear(40, 50)
    torch.manual_seed(0)
    with deferred_init(), fabric.init_module(empty_init=True):
        found = nn.Linear(40, 50)
    assert_equal_states(materialize(found).state_dict(), expected.state_dict())
