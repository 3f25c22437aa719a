"""Quantized models on several ranks: equal bits on all of them, each byte of a file read once, adapters in step."""

from __future__ import annotations

import time

import lightning as L
import pytest
import torch
from lightning_models import ADVICE, quiet_trainer
from quantized_models import Mixed, built, quantizing_fabric
from ranks import RanksFailedError, run_ranks
from torch import nn
from torch.utils.data import DataLoader

from lightning_efficient_init import EfficientInit, load_checkpoint
from lightning_efficient_init.deferred import UninitializedParameterWarning
from lightning_efficient_init.errors import CheckpointNotFoundError, QuantizationError

PACKED = ["int8", "nf4-dq"]


def ddp_fabric(world_size, mode):
    plugin = EfficientInit("32-true", quantize=mode)
    fabric = L.Fabric(accelerator="cpu", devices=world_size, strategy="efficient_init_ddp", plugins=[plugin])
    fabric.launch()
    torch.manual_seed(17 + fabric.global_rank)
    return fabric


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def state_of(model):
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def single(mode, path=None):
    """What one device holds."""
    model = built(quantizing_fabric(mode, "32-true"), Mixed, seed=17)
    if path is not None:
        load_checkpoint(model, path)
    return state_of(model)


def _build(rank, world_size, mode, empty):
    fabric = ddp_fabric(world_size, mode)
    with fabric.init_module(empty_init=empty):
        model = Mixed()
    fabric.setup(model)
    if empty:
        with pytest.warns(UninitializedParameterWarning):
            model(torch.arange(4))
    return state_of(model)


@pytest.mark.parametrize(("mode", "empty"), [("int8", False), ("nf4-dq", False), ("nf4-dq", True)])
def test_every_rank_quantizes_the_values_of_a_single_device(mode, empty):
    for found in run_ranks(_build, 2, 2, mode, empty):
        assert_same(found, single(mode))


def _load(rank, world_size, mode, path, after_setup):
    fabric = ddp_fabric(world_size, mode)
    with fabric.init_module(empty_init=True):
        model = Mixed()
    if after_setup:
        wrapped = fabric.setup(model)
        report = load_checkpoint(wrapped, path)
    else:
        report = load_checkpoint(model, path)
        fabric.setup(model)
    return state_of(model), report.num_bytes, report.bytes_per_rank


@pytest.mark.parametrize(
    ("mode", "is_packed", "after_setup"),
    [("int8", False, True), ("int8", True, False), ("nf4-dq", False, False), ("nf4-dq", True, True)],
)
def test_ranks_read_each_byte_once_and_hold_the_bits_of_a_single_device(mode, is_packed, after_setup, tmp_path):
    torch.manual_seed(3)
    source = built(quantizing_fabric(mode, "32-true"), Mixed, seed=3) if is_packed else Mixed()
    path = tmp_path / "a.pth"
    torch.save(source.state_dict(), path)
    total = sum(value.nbytes for value in state_of(source).values()) - source.head.weight.nbytes  # tied
    results = run_ranks(_load, 2, 2, mode, path, after_setup)
    for found, num_bytes, bytes_per_rank in results:
        assert_same(found, single(mode, path))
        assert 0 < num_bytes < 0.9 * total
        assert sum(bytes_per_rank) == pytest.approx(total, rel=0.05)


class Adapted(nn.Module):
    """A frozen base, as quantization leaves it, and adapters that are trained."""

    def __init__(self):
        super().__init__()
        self.base = Mixed()
        self.down = nn.Parameter(torch.randn(65, 4) / 8)
        self.up = nn.Parameter(torch.zeros(4, 40))
        self.base.embed.requires_grad_(False)

    def forward(self, tokens):
        return self.base(tokens) + self.base.embed(tokens) @ self.down @ self.up


def _train(rank, world_size, mode, make):
    fabric = ddp_fabric(world_size, mode)
    with fabric.init_module():
        model = make()
    before = {name: value.clone() for name, value in state_of(model).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = fabric.setup(model, torch.optim.AdamW(trained, 0.01))
    torch.manual_seed(rank)  # each rank has its own batches
    tokens, losses = torch.randint(40, (6, 4)), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return before, state_of(model.module), [name for name, p in model.module.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("mode", PACKED)
def test_adapters_train_in_step_on_a_frozen_quantized_base(mode):
    (before, first, trained), (_, second, _) = run_ranks(_train, 2, 2, mode, Adapted)
    assert_same(first, second)
    frozen = first.keys() - set(trained)
    assert {"down", "up"} <= set(trained)
    assert {"base.named.weight", "base.body.0.weight", "base.body.2.weight"} <= frozen
    assert_same({name: first[name] for name in frozen}, {name: before[name] for name in frozen})
    assert not any(torch.equal(first[name], before[name]) for name in ("down", "up"))


def test_int8_training_keeps_ranks_in_step():
    (before, first, trained), (_, second, _) = run_ranks(_train, 2, 2, "int8-training", Mixed)
    assert_same(first, second)
    assert "named.weight" in trained
    assert not torch.equal(first["named.weight"], before["named.weight"])


class Late(L.LightningModule):
    """Built outside of ``init_module``: by each rank from its own seed, quantized when the model is set up."""

    def __init__(self):
        super().__init__()
        self.net = Mixed()

    def validation_step(self, batch, _):
        pass

    def training_step(self, batch, _):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.0)


def trainer_of(mode, skip_modules=()):
    plugin = EfficientInit("32-true", quantize=mode, skip_modules=skip_modules)
    return quiet_trainer(strategy="efficient_init_ddp", plugins=[plugin], devices=2, max_steps=1)


def _build_late(rank, mode, stage):
    trainer = trainer_of(mode)
    torch.manual_seed(17 + rank)
    model = Late()
    getattr(trainer, stage)(model, DataLoader(torch.arange(8).view(4, 2)))
    return state_of(model.net)


@ADVICE
@pytest.mark.parametrize(("mode", "stage"), [("int8", "fit"), ("nf4-dq", "fit"), ("nf4-dq", "validate")])
def test_what_each_rank_of_a_trainer_has_built_for_itself_becomes_that_of_a_single_device(mode, stage):
    for found in run_ranks(_build_late, 2, mode, stage):
        assert_same(found, single(mode))


def _differ(rank, mode, skip_modules, interface):
    """What is raised on this rank, and when."""
    skipped = skip_modules if rank else ()
    if interface == "fabric":
        plugin = EfficientInit("32-true", quantize=mode, skip_modules=skipped)
        fabric = L.Fabric(accelerator="cpu", devices=2, strategy="efficient_init_ddp", plugins=[plugin])
        fabric.launch()
        set_up = fabric.setup
        build = Mixed
    else:
        trainer = trainer_of(mode, skipped)
        build, fabric = Late, trainer

        def set_up(model):
            trainer.fit(model, DataLoader(torch.arange(8).view(4, 2)))

    with fabric.init_module():
        model = build()
    with pytest.raises(QuantizationError) as caught:
        set_up(model)
    return str(caught.value)


@ADVICE
@pytest.mark.parametrize(("interface", "mode"), [("fabric", "int8"), ("trainer", "nf4-dq")])
def test_ranks_that_quantize_different_weights_say_so_on_all_of_them(mode, interface):
    path = "body.2" if interface == "fabric" else "net.body.2"
    first, second = run_ranks(_differ, 2, mode, [path], interface, timeout_s=60)
    assert first == second
    assert f"'{path}.weight' is {mode} of shape (65, 33) on rank 0, and not quantized on rank 1" in first


def _cannot_load(rank, mode, path):
    """One rank fails before it is set up, where the others have got to by then."""
    fabric = ddp_fabric(2, mode)
    with fabric.init_module():
        model = Mixed()
    with pytest.raises(CheckpointNotFoundError, match=r"absent\.pth") as caught:
        load_checkpoint(model, path) if rank else fabric.setup(model)
    return str(caught.value), time.time()


def test_a_rank_that_has_failed_tells_those_that_share_quantized_weights(tmp_path):
    (first, when), (second, other_when) = run_ranks(_cannot_load, 2, "nf4", tmp_path / "absent.pth", timeout_s=60)
    assert first == second
    assert abs(when - other_when) < 20


def _quantizes_nothing(rank, mode):
    """One rank's plugin finds nothing to quantize, and raises where the others do not wait for it yet."""
    trainer = trainer_of(mode)
    torch.manual_seed(17)
    model = Late()
    if rank:
        model.net = nn.Embedding(40, 65)
    trainer.validate(model, DataLoader(torch.arange(8).view(4, 2)), verbose=False)


@ADVICE
def test_a_rank_that_cannot_quantize_takes_the_others_down():
    started = time.monotonic()
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(_quantizes_nothing, 2, "nf4", timeout_s=60)
    assert time.monotonic() - started < 40
    first, second = str(failed.value).split("rank 1 ended with exit code")
    assert "has no layer to quantize" in second
    assert "at least one of them has ended" in first
