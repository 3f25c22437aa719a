"""FSDP2 and FSDP under the Trainer, by real processes."""

from __future__ import annotations

import functools
import gc
import logging
import math
import warnings
import weakref

import lightning as L
import pytest
import torch
from lightning_models import ADVICE, same_losses
from ranks import run_ranks
from sharded_models import RUN_ENGINES, TinyLM, assert_equal_states, eager_model, loss_of, tokens, whole_state
from torch.utils.data import DataLoader

from lightning_efficient_init import EfficientInit, load_checkpoint
from lightning_efficient_init.trainer import EfficientFSDP2Strategy, EfficientFSDPStrategy

pytestmark = ADVICE
engines = pytest.mark.parametrize("engine", RUN_ENGINES)
SHARDED = {
    ("fsdp2", "sharded"): EfficientFSDP2Strategy,
    ("fsdp2", "full"): lambda: EfficientFSDP2Strategy(save_distributed_checkpoint=False),
    ("fsdp", "sharded"): lambda: EfficientFSDPStrategy(state_dict_type="sharded"),
    ("fsdp", "full"): EfficientFSDPStrategy,
}


def hybrid(sizes, kind="full"):
    """What cuts parameters in ``sizes[1]`` parts, and keeps ``sizes[0]`` copies of each."""
    return EfficientFSDPStrategy(sharding_strategy="HYBRID_SHARD", device_mesh=sizes, state_dict_type=kind)


SHARDED |= {
    (sizes, kind): functools.partial(hybrid, sizes, kind) for sizes in ((2, 1), (2, 2)) for kind in ("full", "sharded")
}


class LitLM(L.LightningModule):
    """Logs nothing, keeps its losses."""

    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.net = TinyLM(width)
        self.losses = []

    def training_step(self, batch, _):
        loss = loss_of(self.net, batch)
        self.losses.append(loss.detach().item())
        return loss

    def validation_step(self, batch, _):
        self.losses.append(loss_of(self.net, batch).item())

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class LateLM(LitLM):
    """Builds its network in ``configure_model``."""

    def __init__(self):
        L.LightningModule.__init__(self)
        self.net, self.losses = None, []

    def configure_model(self):
        if self.net is None:
            self.net = TinyLM()


class ShardsItself(LateLM):
    """Shards it there, too, as Lightning's documentation does for ``ModelParallelStrategy``."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if self.net is not None:
            return
        self.net = TinyLM()
        for block in self.net.blocks:
            parallelize_module(
                block, self.device_mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
            )
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def data():
    return DataLoader([tokens(i)[0] for i in range(8)], batch_size=2)


def trainer_of(strategy, world_size=2, accelerator="cpu", **kwargs):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {**quiet, "enable_checkpointing": False, "max_epochs": 1, "use_distributed_sampler": True, **kwargs}
    return L.Trainer(accelerator=accelerator, devices=world_size, strategy=strategy, **options)


def seeded(rank, trainer, build=LitLM, *, empty=False):
    torch.manual_seed(1 + rank)
    with trainer.init_module(empty_init=empty):
        return build()


def whole(trainer):
    state = whole_state(trainer.strategy.model)
    return {name.removeprefix("net."): value for name, value in state.items()}


def _init(rank, engine, build):
    trainer = trainer_of(f"efficient_init_{engine}")
    assert not torch.distributed.is_initialized()
    model = seeded(rank, trainer, globals()[build]) if build == "LitLM" else LateLM()
    if build == "LateLM":
        torch.manual_seed(1 + rank)
    trainer.validate(model, data(), verbose=False)
    return {name: value for name, value in whole(trainer).items() if "metric" not in name}


@engines
@pytest.mark.parametrize("build", ["LitLM", "LateLM"])
def test_a_model_has_the_values_of_one_device_whether_built_before_the_processes_meet_or_after(engine, build):
    expected = {name: value for name, value in whole_state(eager_model()).items() if "metric" not in name}
    for state in run_ranks(_init, 2, engine, build):
        assert_equal_states(state, expected)


def _shards_itself(rank):
    trainer = trainer_of(EfficientFSDP2Strategy(data_parallel_size=2, tensor_parallel_size=1))
    torch.manual_seed(1 + rank)
    model = ShardsItself()
    trainer.validate(model, data(), verbose=False)
    assert hasattr(model.net, "_get_fsdp_state")
    return {name: value for name, value in whole(trainer).items() if "metric" not in name}


@RUN_ENGINES[0].marks[0]
def test_a_module_that_shards_itself_in_configure_model_has_the_values_of_one_device():
    expected = {name: value for name, value in whole_state(eager_model()).items() if "metric" not in name}
    for state in run_ranks(_shards_itself, 2):
        assert_equal_states(state, expected)


def _load_first(rank, path, engine):
    trainer = trainer_of(f"efficient_init_{engine}", plugins=[EfficientInit("bf16-true")])
    model = seeded(rank, trainer, empty=True)
    load_checkpoint(model, path)
    trainer.validate(model, data(), verbose=False)
    return whole(trainer)


@engines
def test_a_checkpoint_loaded_before_there_are_processes_is_read_when_the_model_is_sharded(tmp_path, engine):
    expected = eager_model(7)
    torch.save({f"net.{name}": value for name, value in expected.state_dict().items()}, tmp_path / "a.pth")
    for state in run_ranks(_load_first, 2, tmp_path / "a.pth", engine):
        for name, value in expected.named_parameters():
            assert torch.equal(state[name], value.bfloat16()), name


def _hybrid(rank, path, sizes, when):
    trainer = trainer_of(hybrid(sizes), math.prod(sizes))
    model = seeded(rank, trainer, empty=when == "before")
    if when == "before":
        load_checkpoint(model, path)
    trainer.validate(model, data(), ckpt_path=path if when == "as ckpt_path" else None, verbose=False)
    return {name: value for name, value in whole(trainer).items() if "metric" not in name}


@pytest.mark.parametrize("sizes", [(2, 1), (2, 2)])
@pytest.mark.parametrize("when", ["not at all", "before", "as ckpt_path"])
def test_hybrid_sharding_has_the_values_of_one_device_and_of_checkpoints(tmp_path, sizes, when):
    expected = eager_model(1 if when == "not at all" else 7)
    single = LitLM()
    single.net.load_state_dict(expected.state_dict())
    trainer = trainer_of("auto", 1)
    trainer.strategy.connect(single)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    values = {name: value for name, value in whole_state(expected).items() if "metric" not in name}
    for state in run_ranks(_hybrid, math.prod(sizes), tmp_path / "a.ckpt", sizes, when):
        assert_equal_states(state, values)


def _from_checkpoint(rank, path, engine):
    trainer = trainer_of(f"efficient_init_{engine}")
    with trainer.init_module(empty_init=True):
        model = LitLM.load_from_checkpoint(path)
    assert model.hparams.width == 16
    trainer.validate(model, data(), verbose=False)
    return whole(trainer)


@engines
def test_load_from_checkpoint_inside_init_module_waits_for_sharding(tmp_path, engine):
    trainer = trainer_of("auto", 1)
    model = LitLM(16)
    trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for state in run_ranks(_from_checkpoint, 2, tmp_path / "a.ckpt", engine):
        for name, value in model.net.named_parameters():
            assert torch.equal(state[name], value), name


def _go_back(rank, path, engine, how):
    trainer = trainer_of(f"efficient_init_{engine}")
    model = seeded(rank, trainer)
    trainer.fit(model, data())
    trainer.validate(model, data(), verbose=False)
    trainer.save_checkpoint(path)
    saved = whole(trainer)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data())
    for _ in range(2):
        trainer.validate(model, data(), verbose=False)
    trained = whole(trainer)
    trainer.fit_loop.max_epochs = 1  # which has been, according to the checkpoint
    getattr(trainer, how)(model, data(), ckpt_path=path)
    return saved, trained, whole(trainer)


@engines
@pytest.mark.parametrize("how", ["fit", "validate"])
def test_a_model_that_has_been_evaluated_goes_back_to_a_checkpoint(tmp_path, engine, how):
    for saved, trained, restored in run_ranks(_go_back, 2, tmp_path / "a.ckpt", engine, how):
        assert not torch.equal(trained["shift"], saved["shift"])
        assert_equal_states(restored, saved)


class PutsIntoTheModule(L.Callback):
    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        pl_module.register_buffer("old", checkpoint["state_dict"]["net.embed.weight"], persistent=False)


def _callback(rank, path, engine):
    trainer = trainer_of(f"efficient_init_{engine}", callbacks=[PutsIntoTheModule()])
    model = seeded(rank, trainer)
    trainer.validate(model, data(), ckpt_path=path, verbose=False)
    assert type(model.old) is torch.Tensor
    return model.old


@engines
def test_what_callbacks_put_into_the_module_is_real(tmp_path, engine):
    trainer = trainer_of("auto", 1)
    model = LitLM()
    trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for old in run_ranks(_callback, 2, tmp_path / "a.ckpt", engine):
        assert torch.equal(old, model.net.embed.weight)


def _one_after_the_other(rank, path, engine):
    trainer = trainer_of(f"efficient_init_{engine}")
    model = seeded(rank, trainer)
    trainer.fit(model, data())
    trainer.save_checkpoint(path)
    trained, first = whole(trainer), weakref.ref(trainer.strategy)
    trainer = model.trainer = trainer_of(f"efficient_init_{engine}")
    gc.collect()
    assert first() is None
    trainer.validate(model, data(), verbose=False)
    validated = whole(trainer)
    trainer = trainer_of(f"efficient_init_{engine}")
    trainer.fit(model, data())
    trained_on = whole(trainer)
    trainer = trainer_of(f"efficient_init_{engine}")
    trainer.validate(model, data(), ckpt_path=path, verbose=False)
    return trained, validated, trained_on, whole(trainer)


@engines
def test_one_trainer_after_the_other_has_the_same_model(tmp_path, engine):
    for trained, validated, trained_on, restored in run_ranks(_one_after_the_other, 2, tmp_path / "a.ckpt", engine):
        assert_equal_states(validated, trained)
        assert not torch.equal(trained_on["embed.weight"], trained["embed.weight"])
        assert_equal_states(restored, trained)


class Wraps(LitLM):
    def __init__(self, net):
        super().__init__()
        self.save_hyperparameters()
        self.net = net


def _fit_with_a_module_among_hparams(rank, path, engine):
    trainer = trainer_of(f"efficient_init_{engine}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = seeded(rank, trainer, lambda: Wraps(TinyLM()))
        trainer.fit(model, data())
    trainer.save_checkpoint(path)
    return list(model.hparams), any("'net' removed from hparams" in str(warning.message) for warning in caught)


@engines
def test_hyperparameters_that_sharding_makes_unfit_for_a_checkpoint_are_left_out_of_it_with_a_warning(tmp_path, engine):
    found = run_ranks(_fit_with_a_module_among_hparams, 2, tmp_path / "a.ckpt", engine)
    assert found == [(["width"], True), (["width"], False)]
    assert (tmp_path / "a.ckpt").exists()


class SavesFirstEpoch(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)
            self.saved, self.num_losses = whole(trainer), len(module.losses)


def world_size_of(engine):
    return 2 if isinstance(engine, str) else math.prod(engine)


def _fit_save(rank, path, engine, kind, accelerator):
    callback = SavesFirstEpoch(path)
    strategy, size = SHARDED[engine, kind](), world_size_of(engine)
    trainer = trainer_of(strategy, size, accelerator, max_epochs=2, callbacks=[callback])
    model = seeded(rank, trainer)
    trainer.fit(model, data())
    return callback.saved, model.losses[callback.num_losses :]


def _resume(rank, path, engine, kind, accelerator):
    trainer = trainer_of(SHARDED[engine, kind](), world_size_of(engine), accelerator, max_epochs=2)
    model = seeded(5 + rank, trainer)
    trainer.fit(model, data(), ckpt_path=path)
    assert trainer.current_epoch == 2
    return model.losses


@pytest.mark.parametrize("engine", [*RUN_ENGINES, (2, 1), (2, 2)])
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_resumed_fit_has_the_next_losses_and_one_device_reads_what_was_saved(tmp_path, engine, kind, accelerator):
    size = world_size_of(engine)
    if accelerator == "cuda" and size > torch.cuda.device_count():
        pytest.skip("needs more CUDA devices")
    went_on = run_ranks(_fit_save, size, tmp_path / "a.ckpt", engine, kind, accelerator)
    resumed = run_ranks(_resume, size, tmp_path / "a.ckpt", engine, kind, accelerator)
    for (_, expected), found in zip(went_on, resumed, strict=True):
        assert found == same_losses(expected, accelerator)
    single = LitLM()
    trainer_of("efficient_init", 1).validate(single, data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    for name, value in single.net.named_parameters():
        assert torch.equal(value, went_on[0][0][name].cpu()), name
