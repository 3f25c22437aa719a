from __future__ import annotations

import contextlib
import copy
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.parsing import clean_namespace
from lightning_models import ADVICE, Regression, assert_equal_states, loader, quiet_trainer

from lightning_efficient_init import EfficientInit, load_checkpoint, uninitialized_parameters
from lightning_efficient_init.deferred import UninitializedParameterWarning, deferred_init
from lightning_efficient_init.errors import CheckpointReadError, DeferredParameterError, UnsupportedCheckpointError
from lightning_efficient_init.trainer import EfficientSingleDeviceStrategy

pytestmark = ADVICE


def our_trainer(precision="32-true", accelerator="cpu", **kwargs):
    return quiet_trainer(accelerator, **{"strategy": "efficient_init", "plugins": [EfficientInit(precision)], **kwargs})


@pytest.fixture
def checkpoint(tmp_path, device):
    """A checkpoint after one epoch, by stock Lightning."""
    trainer = quiet_trainer(device.type)
    trainer.fit(Regression(width=24), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_the_strategy_follows_the_accelerators_device(device):
    trainer = our_trainer(accelerator=device.type)
    assert isinstance(trainer.strategy, EfficientSingleDeviceStrategy)
    assert trainer.strategy.root_device == device


def test_fit_resumes_as_stock_lightning_does(checkpoint, device):
    states = []
    for trainer in (our_trainer(accelerator=device.type, max_epochs=3), quiet_trainer(device.type, max_epochs=3)):
        torch.manual_seed(0)
        model = Regression(width=24).to(device)
        trainer.fit(model, loader(), ckpt_path=checkpoint)
        assert trainer.current_epoch == 3
        assert trainer.global_step == 12
        states.append(model.state_dict())
    assert_equal_states(states[0], states[1])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_load_the_weights_alone(checkpoint, stage, monkeypatch):
    trainer = our_trainer()
    with trainer.init_module(empty_init=True):
        model = Regression(width=24)
    read = []
    monkeypatch.setattr(
        EfficientSingleDeviceStrategy, "load_optimizer_state_dict", lambda self, checkpoint: read.append(checkpoint)
    )
    getattr(trainer, stage)(model, loader(), ckpt_path=checkpoint)
    assert not read
    assert_equal_states(model.state_dict(), torch.load(checkpoint)["state_dict"])


def test_optimizer_states_are_not_read_by_validate(tmp_path, bytes_read):
    trainer = quiet_trainer()
    trainer.fit(Regression(width=60_000), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    weights = sum(t.nbytes for t in trainer.model.state_dict().values())
    model = Regression(width=60_000)
    trainer = our_trainer()
    trainer.validate(model, loader(), verbose=False)
    before = bytes_read()
    trainer.validate(model, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert bytes_read() - before < 1.05 * weights + 500_000


def test_what_is_saved_loads_with_stock_lightning(tmp_path):
    trainer = our_trainer("bf16-true")
    with trainer.init_module():
        model = Regression()
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stock = Regression.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(stock.scale, model.scale.float())


def test_hooks_see_the_checkpoint_and_may_edit_it(checkpoint):
    class Edits(Regression):
        def on_load_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            assert state["scale"].shape == (8,)
            state["scale"] = state["scale"] * 2
            state["net.0.bias"][0] = 7.0
            state["net.3.weight"] = state.pop("net.3.weight").clone()

    model = Edits(width=24)
    our_trainer().validate(model, loader(), ckpt_path=checkpoint, verbose=False)
    expected = torch.load(checkpoint)["state_dict"]
    expected["scale"] *= 2
    expected["net.0.bias"][0] = 7.0
    assert_equal_states(model.state_dict(), expected)


class TakesParameters(Regression):
    def on_load_checkpoint(self, checkpoint):
        self.scale = self.again = torch.nn.Parameter(checkpoint["state_dict"]["scale"])
        self.net[3].load_state_dict({name: checkpoint["state_dict"][f"net.3.{name}"] for name in ("weight", "bias")})
        self.net[0] = torch.nn.Linear(8, 24)
        self.net[0].weight.data = checkpoint["state_dict"]["net.0.weight"].clone()
        checkpoint["state_dict"]["again"] = checkpoint["state_dict"]["scale"]


@pytest.mark.parametrize("strategy", ["efficient_init", "auto"])
def test_hooks_may_make_parameters_of_what_is_in_the_checkpoint(checkpoint, strategy):
    stock = quiet_trainer(max_epochs=2)
    ours = our_trainer(max_epochs=2, strategy=strategy)
    models = [TakesParameters(width=24), TakesParameters(width=24)]
    for model, trainer in zip(models, [stock, ours], strict=True):
        trainer.validate(model, loader(), ckpt_path=checkpoint, verbose=False)
        torch.manual_seed(2)
        trainer.fit(model, loader())
    assert_equal_states(models[1].state_dict(), models[0].state_dict())
    assert type(models[1].scale) is torch.nn.Parameter
    assert models[1].scale is models[1].again
    with our_trainer().init_module(empty_init=True):
        model = TakesParameters.load_from_checkpoint(checkpoint)
    assert type(model.scale) is torch.nn.Parameter
    assert torch.equal(model.scale, torch.load(checkpoint)["state_dict"]["scale"])


class TakesSavedParameters(Regression):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["offset"] = torch.nn.Parameter(torch.full((3,), 2.0))
        checkpoint["state_dict"]["offset"] = checkpoint["offset"].detach()
        checkpoint["state_dict"]["factor"] = torch.nn.Parameter(torch.full((2,), 3.0), requires_grad=False)

    def on_load_checkpoint(self, checkpoint):
        self.offset = checkpoint["offset"]
        self.factor = checkpoint["state_dict"]["factor"]


def test_hooks_may_take_parameters_out_of_the_checkpoint(tmp_path):
    trainer = quiet_trainer()
    trainer.strategy.connect(TakesSavedParameters())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    model = TakesSavedParameters()
    our_trainer().validate(model, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert type(model.offset) is type(model.factor) is torch.nn.Parameter
    assert (model.offset.tolist(), model.offset.requires_grad) == ([2, 2, 2], True)
    assert (model.factor.tolist(), model.factor.requires_grad) == ([3, 3], False)


def test_a_parameter_whose_data_is_a_lazy_tensor_is_an_error_with_what_to_do(checkpoint):
    class SetsData(Regression):
        def on_load_checkpoint(self, checkpoint):
            self.scale.data = checkpoint["state_dict"]["scale"]

    with pytest.raises(DeferredParameterError, match=r"'scale': expected memory.*p\.data = x\.clone\(\)"):
        our_trainer().validate(SetsData(width=24), loader(), ckpt_path=checkpoint, verbose=False)


def test_what_a_module_keeps_of_a_checkpoint_is_real(checkpoint):
    class Keeps(Regression):
        def on_load_checkpoint(self, checkpoint):
            self.kept = [checkpoint["state_dict"], checkpoint["state_dict"], checkpoint["state_dict"]["scale"]]
            self.ema = checkpoint["state_dict"]
            self.optimizer_state = checkpoint["optimizer_states"][0]

    model = Keeps(width=24)
    our_trainer().validate(model, loader(), ckpt_path=checkpoint, verbose=False)
    expected = torch.load(checkpoint)["state_dict"]
    checkpoint.unlink()
    assert model.kept[0] is model.kept[1]
    for state in (model.kept[0], model.ema):
        assert {type(value) for value in state.values()} == {torch.Tensor}
        assert_equal_states(state, expected)
    assert torch.equal(model.kept[2], expected["scale"])
    optimizer = model.configure_optimizers()
    optimizer.load_state_dict(model.optimizer_state)
    assert {type(value) for state in optimizer.state.values() for value in state.values()} == {torch.Tensor}


class PutsIntoTheModule(L.Callback):
    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        weight = checkpoint["state_dict"]["scale"]
        pl_module.scale = torch.nn.Parameter(weight)
        pl_module.register_buffer("old", checkpoint["state_dict"]["net.0.weight"], persistent=False)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_what_callbacks_put_into_the_module_is_real(checkpoint, stage, device):
    states = []
    for trainer in (
        our_trainer(accelerator=device.type, max_epochs=2, callbacks=[PutsIntoTheModule()]),
        quiet_trainer(device.type, max_epochs=2, callbacks=[PutsIntoTheModule()]),
    ):
        torch.manual_seed(0)
        model = Regression(width=24)
        getattr(trainer, stage)(model, loader(), ckpt_path=checkpoint)
        assert type(model.scale) is torch.nn.Parameter
        assert type(model.old) is torch.Tensor
        states.append({**model.state_dict(), "old": model.old})
    assert_equal_states(states[1], states[0])


def test_what_others_keep_is_not_read_from_another_file(checkpoint):
    kept = []

    class Hands(Regression):
        def on_load_checkpoint(self, checkpoint):
            kept.extend([checkpoint["state_dict"], checkpoint["state_dict"]["scale"].clone()])

    our_trainer().validate(Hands(width=24), loader(), ckpt_path=checkpoint, verbose=False)
    expected = torch.load(checkpoint)["state_dict"]["scale"]
    lazy, copy = kept
    assert torch.equal(lazy["scale"] + 0, expected)
    torch.save(torch.load(checkpoint), checkpoint)
    assert torch.equal(copy, expected)
    with pytest.raises(CheckpointReadError, match="as it was when its header was read, found another one"):
        lazy["scale"] + 0


def test_a_module_may_override_load_state_dict(checkpoint):
    class Renames(Regression):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            self.seen = list(state_dict)
            return super().load_state_dict(state_dict, strict=strict, assign=assign)

    model = Renames(width=24)
    our_trainer().validate(model, loader(), ckpt_path=checkpoint, verbose=False)
    assert "scale" in model.seen
    assert_equal_states(model.state_dict(), torch.load(checkpoint)["state_dict"])


def test_a_checkpoint_of_bare_weights_is_refused_with_what_to_do(tmp_path):
    torch.save(Regression().state_dict(), tmp_path / "a.pth")
    with pytest.raises(UnsupportedCheckpointError, match=r"expected a Lightning checkpoint.*load_checkpoint"):
        our_trainer().validate(Regression(), loader(), ckpt_path=tmp_path / "a.pth")


@pytest.mark.parametrize("strategy", ["auto", "efficient_init"])
def test_what_nobody_loads_is_initialized_when_training_starts(strategy):
    trainer = quiet_trainer(strategy=strategy, plugins=[EfficientInit("32-true")])
    torch.manual_seed(8)
    with trainer.init_module(empty_init=True):
        model = Regression()
    assert uninitialized_parameters(model)
    with pytest.warns(UninitializedParameterWarning):
        trainer.validate(model, loader(), verbose=False)
    torch.manual_seed(8)
    assert_equal_states(dict(model.named_parameters()), dict(Regression().named_parameters()))


class Wraps(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.save_hyperparameters()
        self.net = net

    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Anchored(L.LightningModule):
    """A model that uses its parameters without being called: its optimizer, a hook and its steps look at them."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 4)
        self.position = torch.nn.Parameter(torch.randn(8))

    def configure_optimizers(self):
        self.anchor = [param.detach().clone() for param in self.parameters()]
        rates = [{"params": [param], "lr": 0.1 * param.detach().norm().item()} for param in self.parameters()]
        return torch.optim.SGD(rates)

    def on_fit_start(self):
        self.teacher = [copy.deepcopy(self.net)]

    def training_step(self, batch, _):
        distance = sum((p - a).square().sum() for p, a in zip(self.parameters(), self.anchor, strict=True))
        return distance + (self.net(batch[0] + self.position) - self.teacher[0](batch[0])).square().mean()

    def validation_step(self, batch, _):
        self.log("value", (batch[0] * self.position).mean())


@pytest.mark.filterwarnings("ignore::lightning_efficient_init.deferred.UninitializedParameterWarning")
@pytest.mark.parametrize("strategy", ["auto", "efficient_init"])
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_parameters_have_values_before_anybody_uses_them_without_calling_the_module(stage, strategy):
    def run(*, empty):
        trainer = quiet_trainer(strategy=strategy, plugins=[EfficientInit()])
        with torch.random.fork_rng(), trainer.init_module(empty_init=empty):
            torch.manual_seed(4)
            model = Anchored()
        getattr(trainer, stage)(model, loader())
        return model.state_dict(), trainer.callback_metrics

    (state, metrics), (expected, expected_metrics) = run(empty=True), run(empty=False)
    assert_equal_states(state, expected)
    assert metrics == expected_metrics


class Backbone(torch.nn.Linear):
    def load_pretrained(self, path):
        raise AssertionError(path)


@pytest.mark.filterwarnings("ignore:.*is an instance of `nn.Module`")
def test_a_module_may_have_a_method_of_its_own_that_loads_pretrained_weights():
    model = Wraps(Backbone(8, 2))
    trainer = quiet_trainer(strategy="efficient_init", plugins=[EfficientInit()])
    trainer.fit(model, loader())


def test_what_nobody_loads_is_initialized_before_it_is_saved(tmp_path):
    trainer = quiet_trainer(strategy="efficient_init")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        expected = Regression().state_dict()
        torch.manual_seed(4)
        with trainer.init_module(empty_init=True):
            model = Regression()
    trainer.strategy.connect(model)
    with pytest.warns(UninitializedParameterWarning):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert_equal_states(torch.load(tmp_path / "a.ckpt")["state_dict"], expected)


with_a_module_among_hparams = pytest.mark.filterwarnings("ignore:.*is an instance of `nn.Module`")


@with_a_module_among_hparams
@pytest.mark.filterwarnings("ignore::lightning_efficient_init.deferred.UninitializedParameterWarning")
@pytest.mark.parametrize("strategy", ["auto", "efficient_init"])
def test_a_module_that_is_empty_when_fitting_starts_stays_among_the_hyperparameters(tmp_path, strategy):
    trainer = our_trainer(strategy=strategy)
    with trainer.init_module(empty_init=True):
        model = Wraps(torch.nn.Linear(8, 2))
    with pytest.raises(DeferredParameterError, match="is empty"):
        pickle.dumps(model.hparams)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = Wraps.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert_equal_states(found.state_dict(), model.state_dict())
    assert_equal_states(found.hparams["net"].state_dict(), model.net.state_dict())


@with_a_module_among_hparams
def test_a_deferred_module_stays_among_the_hyperparameters_and_what_cannot_be_pickled_does_not():
    with deferred_init():
        model = Wraps(torch.nn.Linear(8, 2))
    model.hparams["again"] = [model.net.weight, {"bias": model.net.bias}]
    model.hparams["code"] = lambda: model.net
    with pytest.warns(UserWarning, match="'code' removed from hparams"):
        clean_namespace(model.hparams)
    assert list(model.hparams) == ["net", "again"]
    with pytest.raises(DeferredParameterError, match="saved or pickled"):
        pickle.dumps(model.hparams)


class Compilable(Regression):
    def training_step(self, batch, _):
        return self(batch[0]).square().mean()

    validation_step = training_step


@pytest.fixture
def compiling():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler, about its own code
@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize(
    ("strategy", "plugins"),
    [("auto", [EfficientInit()]), ("efficient_init", [EfficientInit()]), ("efficient_init", None)],
)
def test_what_nobody_loads_is_initialized_also_where_the_class_has_been_compiled_before(
    compiling, stage, strategy, plugins
):
    states = []
    for empty in (False, True):
        trainer = quiet_trainer(strategy=strategy, plugins=plugins)
        torch.manual_seed(8)
        with trainer.init_module(empty_init=empty):
            model = Compilable()
        expectation = pytest.warns(UninitializedParameterWarning) if empty else contextlib.nullcontext()
        with expectation:
            getattr(trainer, stage)(torch.compile(model, backend="eager"), loader())
        states.append(dict(model.named_parameters()))
    assert_equal_states(*states)


def test_loading_between_init_and_fit_does_not_warn(checkpoint):
    trainer = our_trainer("bf16-true")
    with trainer.init_module(empty_init=True):
        model = Regression(width=24)
    load_checkpoint(model, checkpoint)
    trainer.fit(model, loader())


def test_configure_model_builds_on_the_device_in_the_precision(checkpoint):
    class Late(Regression):
        def __init__(self, width=16, lr=0.1):
            super().__init__(width, lr)
            self.late = None

        def configure_model(self):
            if self.late is None:
                self.late = torch.nn.Linear(3, 3)

    model = Late(width=24)
    our_trainer("bf16-true").validate(model, loader(), verbose=False)
    assert model.late.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("strategy", ["efficient_init", "auto"])
def test_an_average_of_weights_that_nobody_loaded_is_that_of_initialized_ones(strategy):
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging", reason="came with Lightning 2.6")
    models = []
    for trainer, empty in ((quiet_trainer, False), (our_trainer, True)):
        options = {} if trainer is quiet_trainer else {"strategy": strategy}
        torch.manual_seed(3)
        made = trainer(max_epochs=2, callbacks=[averaging.EMAWeightAveraging(decay=0.9)], **options)
        with made.init_module(empty_init=empty):
            models.append(Regression())
        with pytest.warns(UninitializedParameterWarning) if empty else contextlib.nullcontext():
            made.fit(models[-1], loader(), loader())  # the sanity check swaps weights with their average
    assert_equal_states(models[1].state_dict(), models[0].state_dict())
