from __future__ import annotations

import contextlib
import copy
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning_models import ADVICE, Configured, Regression, assert_equal_states, loader, quiet_trainer
from ranks import run_ranks
from sharded_models import RUN_ENGINES, whole_state
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lightning_efficient_init import ConfigureModelMixin, EfficientInit
from lightning_efficient_init.deferred import UninitializedParameterWarning
from lightning_efficient_init.errors import StateDictMismatchError
from lightning_efficient_init.strategies.deepspeed import initializing, use_cpu

pytestmark = ADVICE


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(5)
    torch.save(Regression(24).state_dict(), tmp_path / "raw.pth")
    return tmp_path / "raw.pth"


@pytest.fixture
def checkpoint(tmp_path):
    trainer = quiet_trainer()
    trainer.fit(Configured(24), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize("strategy", ["auto", "efficient_init"])
def test_the_model_is_built_once_and_keeps_its_weights_from_fit_to_test(strategy):
    model, trainer = Configured(24), quiet_trainer(strategy=strategy)
    trainer.fit(model, loader())
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for stage in (trainer.validate, trainer.test, trainer.predict):
        stage(model, loader())
    assert model.built == 1
    assert_equal_states(model.state_dict(), trained)


def test_stock_lightning_builds_it_again_for_each_stage():
    class Stock(Regression):
        built = 0

        def configure_model(self):
            self.built += 1

    model, trainer = Stock(), quiet_trainer()
    trainer.fit(model, loader())
    trainer.test(model, loader(), verbose=False)
    assert model.built == 2


def test_subclasses_may_build_on_what_they_inherit():
    class More(Configured):
        def configure_model(self):
            super().configure_model()
            self.more = torch.nn.Linear(2, 2)

    model = More()
    model.configure_model()
    more, net = model.more, model.net
    model.configure_model()
    assert (model.built, model.more, model.net) == (1, more, net)


def test_the_mixin_also_tames_a_finished_class():
    class Finished(L.LightningModule):
        def configure_model(self):
            self.net = torch.nn.Linear(2, 2)

    class Tamed(ConfigureModelMixin, Finished):
        pass

    model = Tamed()
    model.configure_model()
    net = model.net
    model.configure_model()
    assert model.net is net


def test_after_an_exception_it_is_built_again():
    class Fails(ConfigureModelMixin, L.LightningModule):
        fails = True

        def configure_model(self):
            if self.fails:
                raise OSError("no")
            self.net = torch.nn.Linear(2, 2)

    model = Fails()
    with pytest.raises(OSError, match="no"):
        model.configure_model()
    model.fails = False
    model.configure_model()
    assert model.net.weight.shape == (2, 2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_it_is_built_in_the_trainers_precision(precision):
    model, trainer = Configured(24), quiet_trainer(plugins=[EfficientInit(precision)])
    trainer.validate(model, loader(), verbose=False)
    expected = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_from_checkpoint_gives_the_dtype_of_the_checkpoint(tmp_path, dtype):
    trainer = quiet_trainer(plugins=[EfficientInit("bf16-true" if dtype == torch.bfloat16 else "32-true")])
    trainer.fit(Configured(24), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    model = Configured.load_from_checkpoint(tmp_path / "a.ckpt")
    assert model.built == 1
    assert model.net[0].weight.dtype == dtype
    assert model.frequencies.dtype == torch.load(tmp_path / "a.ckpt")["state_dict"]["frequencies"].dtype
    assert_equal_states(model.state_dict(), torch.load(tmp_path / "a.ckpt")["state_dict"])
    trainer.test(model, loader(), verbose=False)
    assert model.built == 1


@pytest.mark.parametrize("plugins", [None, [EfficientInit("bf16-true")]])
def test_load_from_checkpoint_in_init_module_follows_the_trainer(checkpoint, plugins):
    trainer = quiet_trainer(plugins=plugins, precision=None if plugins else "bf16-true")
    with trainer.init_module(empty_init=True):
        model = Configured.load_from_checkpoint(checkpoint)
    assert model.net[0].weight.dtype == torch.bfloat16
    expected = torch.load(checkpoint)["state_dict"]
    assert torch.equal(model.scale, expected["scale"].bfloat16())


def test_load_from_checkpoint_does_not_read_pretrained_weights(checkpoint, tmp_path):
    model = Configured.load_from_checkpoint(checkpoint, pretrained=str(tmp_path / "is not there"))
    assert model.pretrained is not None
    quiet_trainer().validate(model, loader(), verbose=False)
    assert_equal_states(model.state_dict(), torch.load(checkpoint)["state_dict"])


def test_load_from_checkpoint_initializes_what_a_partial_checkpoint_lacks(checkpoint):
    content = torch.load(checkpoint)
    del content["state_dict"]["scale"]
    torch.save(content, checkpoint)
    with pytest.warns(UserWarning, match="scale"):
        model = Configured.load_from_checkpoint(checkpoint, strict=False)
    assert ((model.scale - 1).abs() < 0.2).all()


@pytest.mark.parametrize("strategy", ["auto", "efficient_init"])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_pretrained_weights_are_loaded_when_the_first_loop_starts(weights, stage, strategy):
    class Starts(Configured):
        pretrained = weights

        def on_train_start(self):
            self.start = {name: tensor.clone() for name, tensor in self.state_dict().items()}

        on_validation_start = on_test_start = on_predict_start = on_train_start

    model = Starts(24)
    getattr(quiet_trainer(strategy=strategy), stage)(model, loader())
    assert_equal_states(model.start, torch.load(weights))


def test_pretrained_weights_are_not_loaded_again(weights):
    model, trainer = Configured(24, pretrained=str(weights)), quiet_trainer()
    trainer.fit(model, loader())
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.test(model, loader(), verbose=False)
    assert_equal_states(model.state_dict(), trained)


@pytest.mark.parametrize("strategy", ["auto", "efficient_init"])
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_pretrained_weights_are_not_read_when_ckpt_path_brings_others(checkpoint, tmp_path, stage, strategy):
    class Starts(Configured):
        def on_train_start(self):
            self.start = {name: tensor.clone() for name, tensor in self.state_dict().items()}

        on_validation_start = on_train_start

    model = Starts(24, pretrained=str(tmp_path / "is not there"))
    getattr(quiet_trainer(strategy=strategy, max_epochs=2), stage)(model, loader(), ckpt_path=checkpoint)
    assert_equal_states(model.start, torch.load(checkpoint)["state_dict"])


class Curious(Configured):
    """Looks at its weights before the first loop starts."""

    def configure_optimizers(self):
        self.seen = [{name: tensor.clone() for name, tensor in self.state_dict().items()}]
        return super().configure_optimizers()

    def on_fit_start(self):
        self.seen.append(copy.deepcopy(self.net).state_dict())


@pytest.mark.parametrize(
    "options", [{}, {"plugins": [EfficientInit()]}, {"strategy": "efficient_init"}], ids=["stock", "plugin", "strategy"]
)
def test_pretrained_weights_are_there_before_anybody_looks(weights, options):
    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    model = Curious(24, pretrained=str(weights))
    trainer = quiet_trainer(callbacks=[finder, Starts()], **options)
    trainer.fit(model, loader())
    state = torch.load(weights)
    assert_equal_states(model.seen[0], state)
    assert_equal_states(
        {f"net.{name}": tensor for name, tensor in model.seen[1].items()},
        {k: state[k] for k in state if k.startswith("net.")},
    )
    assert_equal_states(model.start, state)


class Starts(L.Callback):
    """Notes the weights that training starts from."""

    def on_train_start(self, trainer, module):
        module.start = {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("strategy", ["auto", "efficient_init"])
def test_pretrained_weights_are_loaded_by_the_next_trainer_if_the_first_fails(weights, strategy):
    class Failing(Configured):
        attempts = 0

        def configure_optimizers(self):
            self.attempts += 1
            if self.attempts == 1:
                raise RuntimeError("no")
            return super().configure_optimizers()

    model = Failing(24, pretrained=str(weights))
    for _ in range(2):
        trainer = quiet_trainer(callbacks=[Starts()], strategy=strategy)
        with contextlib.suppress(RuntimeError):
            trainer.fit(model, loader())
    assert_equal_states(model.start, torch.load(weights))


def test_pretrained_weights_of_a_module_in_a_module_are_loaded(weights):
    class Outer(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = Configured(24, pretrained=str(weights))

        def configure_model(self):
            self.inner.configure_model()

        def training_step(self, batch, _):
            return self.inner(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    model = Outer()
    quiet_trainer(callbacks=[Starts()]).fit(model, loader())
    assert_equal_states({n.removeprefix("inner."): t for n, t in model.start.items()}, torch.load(weights))


def test_pretrained_weights_that_do_not_fit_are_an_error(weights):
    with pytest.raises(StateDictMismatchError, match="Shapes differ"):
        quiet_trainer().fit(Configured(16, pretrained=str(weights)), loader())


def test_weights_that_nothing_brings_are_initialized(weights):
    state = torch.load(weights)
    del state["scale"]
    torch.save(state, weights)
    model = Configured(24, pretrained=str(weights))
    model.strict_loading = False
    quiet_trainer().validate(model, loader(), verbose=False)
    assert ((model.scale - 1).abs() < 0.2).all()


def _pretrained_on_ranks(rank, world_size, strategy, path):
    torch.manual_seed(rank)
    model = Configured(24, pretrained=path)
    trainer = quiet_trainer(devices=world_size, strategy=strategy)
    trainer.validate(model, loader(), verbose=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.fit(model, loader())
    trainer.test(model, loader(), verbose=False)
    return before, model.built, model.state_dict()


@pytest.mark.parametrize("strategy", ["ddp", "efficient_init_ddp"])
def test_it_runs_unchanged_on_several_devices(weights, strategy):
    first, second = run_ranks(_pretrained_on_ranks, 2, 2, strategy, str(weights))
    for before, built, _ in (first, second):
        assert_equal_states(before, torch.load(weights))
        assert built == 1
    trained = [
        {name: tensor for name, tensor in state.items() if "running" not in name} for *_, state in (first, second)
    ]
    assert_equal_states(trained[0], trained[1])


class _FSDPOnCPU(FSDPStrategy):
    """Lightning's: it leaves it to torch to find the device, and torch looks for GPUs alone."""

    def _setup_model(self, model):
        policy = {"mixed_precision": self.mixed_precision_config, "sharding_strategy": self.sharding_strategy}
        return FullyShardedDataParallel(model, device_id=self.root_device, **policy, **self.kwargs)


class _DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning's, which refuses the CPU before it starts; with what DeepSpeed needs there."""

    def setup_environment(self):
        use_cpu()
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer):
        with initializing():
            super().setup(trainer)


STOCK = {
    "ddp": lambda: "ddp",
    "fsdp": _FSDPOnCPU,
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    "deepspeed_stage_2": lambda: _DeepSpeedOnCPU(stage=2),
    "deepspeed_stage_3": lambda: _DeepSpeedOnCPU(stage=3),
}


class Anywhere(Configured):
    """Without statistics of batches; under ``ModelParallelStrategy`` it shards itself, as that leaves it to modules.

    What it does not shard is frozen there: nobody would add up its gradients.
    """

    def configure_model(self):
        super().configure_model()
        self.net[1] = torch.nn.LayerNorm(24)
        self.scale.requires_grad_(False)
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def on_train_start(self):
        self.states = [self.whole()]

    def on_train_end(self):
        self.states.append(self.whole())

    def on_test_start(self):
        self.states.append(self.whole())

    def whole(self):
        if "deepspeed" not in type(self.trainer.strategy).__name__.lower():
            is_ddp = isinstance(self.trainer.strategy, DDPStrategy)
            return whole_state(self if is_ddp else self.trainer.strategy.model)
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.parameters())):
            return whole_state(self)


def _fit_and_test(rank, strategy, path):
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    torch.manual_seed(rank)
    model = Anywhere(24, pretrained=path)
    trainer = quiet_trainer(devices=2, strategy=STOCK[strategy]() if strategy in STOCK else strategy)
    trainer.fit(model, loader())
    if strategy == "fsdp":  # Lightning wraps it anew for each stage, and loses what was in the outermost unit
        return model.built, [*model.states, model.states[1]]
    trainer.test(model, loader(), verbose=False)
    return model.built, model.states


OURS = ["efficient_init_ddp", "efficient_init_fsdp", "efficient_init_fsdp2", "efficient_init_deepspeed_stage_3"]
NEEDS_TO_RUN = {"fsdp2": RUN_ENGINES[0].marks, "efficient_init_fsdp2": RUN_ENGINES[0].marks}


@pytest.mark.parametrize("strategy", [pytest.param(name, marks=NEEDS_TO_RUN.get(name, ())) for name in (*STOCK, *OURS)])
def test_one_module_runs_unchanged_under_every_strategy_of_ours_and_of_lightning(weights, strategy):
    raw = torch.load(weights)
    for name, value in torch.nn.LayerNorm(24).state_dict().items():
        raw[f"net.1.{name}"] = value + 0.25
    raw = {name: value for name, value in raw.items() if not name.startswith("net.1.") or name in LAYER_NORM}
    torch.save(raw, weights)
    expected = None
    for built, (start, trained, tested) in run_ranks(_fit_and_test, 2, strategy, str(weights)):
        assert built == 1
        for name, value in raw.items():
            assert torch.equal(start[name], value), name
        assert not torch.equal(trained["net.0.weight"], start["net.0.weight"])
        assert trained["net.0.weight"].isfinite().all()
        expected = trained if expected is None else expected
        for state in (trained, tested):
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(state[name], value), name


LAYER_NORM = {"net.1.weight", "net.1.bias"}


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # of Lightning 2.6
def test_it_runs_under_the_command_line(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cli"])
    quiet = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    cli = LightningCLI(
        Configured,
        run=False,
        save_config_callback=None,
        seed_everything_default=7,
        trainer_defaults=quiet,
        args=["--model.width=24", f"--model.pretrained={weights}"],
    )
    cli.trainer.fit(cli.model, loader())
    cli.trainer.test(cli.model, loader(), verbose=False)
    assert cli.model.built == 1


def test_weights_nobody_provided_are_reported_at_first_use(checkpoint):
    model = Configured(24)
    trainer = quiet_trainer(strategy="efficient_init")
    with trainer.init_module(empty_init=True):
        model.configure_model()
    with pytest.warns(UninitializedParameterWarning):
        trainer.validate(model, loader(), verbose=False)
