"""ZeRO-3 under Fabric, by real processes."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import nullcontext
from copy import deepcopy

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.precision import DeepSpeedPrecision
from ranks import RanksFailedError, run_ranks
from sharded_models import TinyLM, assert_equal_states, built, eager_model, loss_of, tokens, trainable, whole_state
from torch import nn

from lightning_efficient_init import EfficientInit, load_checkpoint, uninitialized_parameters
from lightning_efficient_init.deferred import UninitializedParameterWarning
from lightning_efficient_init.errors import (
    CheckpointError,
    DeferredParameterError,
    StateDictMismatchError,
    UnsupportedCheckpointError,
)
from lightning_efficient_init.fabric import EfficientDeepSpeedStrategy

NAME = "efficient_init_deepspeed_stage_3"


def fabric_of(world_size, strategy=NAME, precision="32-true", **kwargs):
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    options = kwargs or {"plugins": [EfficientInit(precision)]}
    fabric = L.Fabric(accelerator="cpu", devices=world_size, strategy=strategy, **options)
    fabric.launch()
    return fabric


def gathered(model):
    """All values of a partitioned model, whole."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.clone() for name, tensor in whole_state(model).items()}


def _init(rank, world_size, strategy, precision):
    fabric = fabric_of(world_size, strategy, precision)
    model = fabric.setup(built(fabric))
    assert not uninitialized_parameters(model)
    inner = model.module
    assert inner.head.weight is inner.embed.weight
    assert sum(p.numel() for p in inner.parameters()) == 0
    return gathered(inner)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parameters_and_buffers_are_those_of_one_device(world_size):
    for state in run_ranks(_init, world_size, world_size, NAME, "32-true"):
        assert_equal_states(state, whole_state(eager_model()))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_partitions_have_the_dtype_that_deepspeed_computes_in(precision):
    torch.set_default_dtype(torch.bfloat16)
    try:
        expected = whole_state(eager_model())
    finally:
        torch.set_default_dtype(torch.float32)
    for state in run_ranks(_init, 2, 2, NAME, precision):
        assert_equal_states(state, expected)


def _train_mixed(rank, is_deferred):
    fabric = fabric_of(2, plugins=[DeepSpeedPrecision("bf16-mixed")])
    torch.manual_seed(1 + rank)
    with fabric.init_module() if is_deferred else nullcontext():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64))
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters()))
    state = gathered(model.module)
    fabric.backward(model(torch.ones(2, 4)).float().sum())
    optimizer.step()
    return state


@pytest.mark.parametrize("is_deferred", [False, True])
def test_what_lightnings_own_mixed_precision_trains_is_cast_wherever_it_was_built(is_deferred):
    torch.manual_seed(1)
    expected = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64)).bfloat16()
    for state in run_ranks(_train_mixed, 2, is_deferred):
        assert_equal_states(state, whole_state(expected))


def test_offloaded_partitions_are_those_of_one_device():
    for state in run_ranks(_init, 2, 2, f"{NAME}_offload", "32-true"):
        assert_equal_states(state, whole_state(eager_model()))


def _set_up_empty(rank):
    torch.manual_seed(1 + rank)
    with fabric_of(1, "efficient_init").init_module(empty_init=True):
        model = TinyLM()
    nn.init.ones_(model.frozen)
    copy = deepcopy(model.norm)
    model = fabric_of(2).setup(model)
    assert not uninitialized_parameters(model)
    return {**gathered(model.module), "copy": copy.scale.detach()}


def test_what_another_fabric_has_built_empty_has_the_values_of_one_device():
    expected = eager_model()
    nn.init.ones_(expected.frozen)
    for state in run_ranks(_set_up_empty, 2):
        assert_equal_states(state, {**whole_state(expected), "copy": expected.norm.scale.detach()})


def _set_up_lost(rank):
    with fabric_of(1, "efficient_init").init_module(empty_init=True):
        model = nn.Linear(3, 3)
    model.weight = nn.Parameter(model.weight.detach().clone())
    with pytest.raises(DeferredParameterError, match="'weight': the memory of these parameters has never been"):
        fabric_of(2).setup(model)


def test_empty_memory_without_a_recipe_is_refused():
    run_ranks(_set_up_lost, 2)


class Remembers(nn.Module):
    """Keeps what shows its parameters' memory, registered and not, and a buffer that requires gradients."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("first", self.linear.weight.detach())
        self.register_buffer("learned", torch.rand(3).requires_grad_())
        self.start = self.linear.bias.detach()

    def forward(self, x):
        return self.linear(x) @ self.first + self.start + self.learned


def _remember(rank, world_size, empty):
    fabric = fabric_of(world_size)
    torch.manual_seed(1 + rank)
    with fabric.init_module(empty_init=empty):
        model = Remembers()
    wrapped = fabric.setup(model)
    return {**dict(model.named_buffers()), "start": model.start, "output": wrapped(torch.ones(2, 3)).detach()}


@pytest.mark.parametrize("empty", [False, True])
def test_what_shares_memory_with_a_parameter_has_the_values_of_one_device(empty):
    torch.manual_seed(1)
    model = Remembers()
    expected = {**dict(model.named_buffers()), "start": model.start, "output": model(torch.ones(2, 3)).detach()}
    for found in run_ranks(_remember, 2, 2, empty):
        assert_equal_states(found, expected)


def _set_up_on_meta(rank, world_size):
    fabric = fabric_of(world_size)
    with fabric.init_module():
        model = nn.Linear(3, 3)
        model.register_buffer("scale", torch.ones(3, device="meta"))
    with pytest.raises(DeferredParameterError, match="'scale': on the meta device without a recipe"):
        fabric.setup(model)


def test_what_has_no_values_and_no_recipe_is_refused():
    run_ranks(_set_up_on_meta, 1, 1)


def _load(rank, world_size, path, when):
    fabric = fabric_of(world_size)
    model = built(fabric, empty=True)
    if when == "before":
        fabric.load_raw(path, model)
    if when == "before, by function":
        load_checkpoint(model, path)
    model = fabric.setup(model)
    if when == "after":
        fabric.load_raw(path, model)
    if when == "after, by function":
        load_checkpoint(model, path)
    inner = model.module
    assert not uninitialized_parameters(inner)
    loss_of(model, tokens())
    return gathered(inner)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("when", ["before", "before, by function", "after", "after, by function"])
def test_loading_before_and_after_setup_gives_the_checkpoint(tmp_path, when, world_size):
    torch.save(eager_model(7).state_dict(), tmp_path / "a.pth")
    for state in run_ranks(_load, world_size, world_size, tmp_path / "a.pth", when):
        assert_equal_states(state, whole_state(eager_model(7)))


def _map(rank, path):
    fabric = fabric_of(2)
    model = fabric.setup(built(fabric))
    before = gathered(model.module)
    with pytest.raises(CheckpointError, match=r"norm\.scale: it is sharded, and this rank has its part"):
        load_checkpoint(model, path, mmap=True)
    assert_equal_states(gathered(model.module), before)


def test_partitions_cannot_be_the_files_own_memory(tmp_path):
    torch.save(eager_model(7).state_dict(), tmp_path / "a.pth")
    run_ranks(_map, 2, tmp_path / "a.pth")


def _late(rank, world_size):
    fabric = fabric_of(world_size)
    model = fabric.setup(built(fabric, empty=True))
    with pytest.warns(UninitializedParameterWarning):
        loss_of(model, tokens())
    return gathered(model.module)


def test_what_nobody_loads_is_initialized_at_first_use():
    for state in run_ranks(_late, 2, 2):
        assert_equal_states(state, whole_state(eager_model()))


def _count_bytes(rank, world_size, path):
    fabric = fabric_of(world_size)
    torch.manual_seed(rank)
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(999, 1001), nn.Linear(1001, 1000, bias=False))
    model = fabric.setup(model)
    before = _rchar()
    report = load_checkpoint(model, path)
    return _rchar() - before, report.num_bytes, report.bytes_per_rank


def _rchar():
    with open("/proc/self/io", "rb") as io:
        return int(next(line for line in io if line.startswith(b"rchar:")).split()[1])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_reads_the_bytes_of_its_partition(tmp_path, world_size):
    model = nn.Sequential(nn.Linear(999, 1001), nn.Linear(1001, 1000, bias=False))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    total = sum(p.nbytes for p in model.parameters())
    results = run_ranks(_count_bytes, world_size, world_size, tmp_path / "a.pth")
    assert sum(reported for _, reported, _ in results) == total
    for read, reported, per_rank in results:
        assert reported == pytest.approx(total / world_size, rel=0.001)
        assert reported <= read <= 1.05 * reported + 120_000
        assert per_rank == tuple(number for _, number, _ in results)


def _misfit(rank, world_size, path, strict):
    fabric = fabric_of(world_size)
    model = fabric.setup(built(fabric))
    before = gathered(model.module)
    if not strict:
        fabric.load_raw(path, model, strict=False)
        return gathered(model.module)
    with pytest.raises(StateDictMismatchError) as caught:
        fabric.load_raw(path, model)
    assert_equal_states(gathered(model.module), before)
    return caught.value.missing, caught.value.unexpected, dict(caught.value.mismatched)


def test_strict_is_strict_where_stock_returns_silently(tmp_path):
    state = eager_model(7).state_dict()
    del state["shift"]
    state["more"] = torch.ones(1)
    state["norm.scale"] = torch.ones(9)
    torch.save(state, tmp_path / "a.pth")
    first, second = run_ranks(_misfit, 2, 2, tmp_path / "a.pth", True)
    assert first == second == (("shift",), ("more",), {"norm.scale": ((8,), (9,))})


def test_what_a_partial_checkpoint_lacks_keeps_its_values(tmp_path):
    state = eager_model(7).state_dict()
    del state["shift"]
    torch.save(state, tmp_path / "a.pth")
    expected = {**whole_state(eager_model(7)), "shift": eager_model().shift.detach()}
    for state in run_ranks(_misfit, 2, 2, tmp_path / "a.pth", False):
        assert_equal_states(state, expected)


def _fail_on_one(rank, world_size, path):
    fabric = fabric_of(world_size)
    model = fabric.setup(built(fabric))
    fabric.load_raw(path if rank else f"{path}.missing", model)


def test_a_rank_that_fails_takes_the_others_down_with_its_message(tmp_path):
    torch.save(eager_model(7).state_dict(), tmp_path / "a.pth")
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(_fail_on_one, 2, 2, tmp_path / "a.pth")
    lines = [line for line in str(failed.value).splitlines() if "errors.CheckpointNotFoundError" in line]
    assert len(lines) == 2
    assert len(set(lines)) == 1


def _losses(rank, world_size, strategy, path=None, load=None, weights=None):
    fabric = fabric_of(world_size, strategy, **({"precision": "32-true"} if strategy == "ddp" else {}))
    torch.manual_seed(1)
    with fabric.init_module():
        model = TinyLM()
    optimizer = torch.optim.Adam(trainable(model), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    if weights is not None:
        fabric.load_raw(weights, model)
    if load is not None:
        fabric.load(load, {"model": model, "optimizer": optimizer})
    losses = [_step(fabric, model, optimizer, step) for step in range(2)]
    if path is not None:
        fabric.save(path, {"model": model, "optimizer": optimizer})
        losses = [_step(fabric, model, optimizer, step) for step in range(2)]
    return losses


def _step(fabric, model, optimizer, step):
    loss = loss_of(model, tokens(10 * step + fabric.global_rank))
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return fabric.all_reduce(loss.detach()).item()


def test_training_losses_are_those_of_ddp():
    ours, theirs = run_ranks(_losses, 2, 2, NAME), run_ranks(_losses, 2, 2, "ddp")
    for found, expected in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_training_goes_on_from_weights_that_were_loaded_after_setup(tmp_path):
    torch.save(eager_model(7).state_dict(), tmp_path / "a.pth")
    ours = run_ranks(_losses, 2, 2, NAME, None, None, tmp_path / "a.pth")
    theirs = run_ranks(_losses, 2, 2, "ddp", None, None, tmp_path / "a.pth")
    for found, expected in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_training_goes_on_after_a_resume_as_without(tmp_path):
    whole = run_ranks(_losses, 2, 2, NAME, str(tmp_path / "saved"))
    assert os.path.isdir(tmp_path / "saved")
    assert run_ranks(_losses, 2, 2, NAME, None, str(tmp_path / "saved")) == whole


def _load_optimizer(rank, world_size, path, found):
    fabric = fabric_of(world_size)
    model = built(fabric)
    model, optimizer = fabric.setup(model, torch.optim.Adam(trainable(model)))
    with pytest.raises(UnsupportedCheckpointError, match=f"that DeepSpeed has saved with .*found {found};"):
        fabric.load(path, {"model": model, "optimizer": optimizer})
    fabric.load(path, {"model": model})
    return gathered(model.module)


def test_an_optimizer_state_that_deepspeed_cannot_take_over_is_refused(tmp_path):
    model = eager_model(7)
    torch.save({"model": model.state_dict(), "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "a.ckpt")
    for state in run_ranks(_load_optimizer, 2, 2, tmp_path / "a.ckpt", "another checkpoint"):
        assert_equal_states(state, whole_state(model))


def test_a_folder_of_another_number_of_ranks_gives_weights_but_no_optimizer_state(tmp_path):
    path, model = str(tmp_path / "saved"), eager_model(7)
    run_ranks(_losses, 2, 2, NAME, path)
    load_checkpoint(model, path)
    for state in run_ranks(_load_optimizer, 3, 3, path, "one of 2"):
        assert_equal_states(state, whole_state(model))
    for state in run_ranks(_load, 2, 2, path, "after"):
        assert_equal_states(state, whole_state(model))


def test_other_stages_are_refused():
    with pytest.raises(ValueError, match="stage 3 of ZeRO; found stage 2"):
        EfficientDeepSpeedStrategy(stage=2)


def _compilers(rank, world_size, accelerator, compiles):
    """Whether DeepSpeed's compiler was imported when a model was set up, and when a pass was registered later."""
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    strategy = EfficientDeepSpeedStrategy(config={**config, "compile": {"deepcompile": compiles}})
    fabric = L.Fabric(accelerator=accelerator, devices=world_size, strategy=strategy, plugins=[EfficientInit()])
    fabric.launch()
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    engine = fabric.setup(built(fabric))._forward_module
    at_setup = "deepspeed.compile.backend" in sys.modules
    engine.register_compile_pass("mine", print)
    return at_setup, sys.modules["deepspeed.compile.backend"].opt_passes["mine"] is print


@pytest.mark.parametrize("compiles", [False, True])
def test_the_compiler_is_imported_by_a_setup_that_asks_for_it(compiles, device):
    needs_it = compiles and device.type == "cuda"  # DeepCompile is for GPUs
    assert run_ranks(_compilers, 1, 1, device.type, compiles) == [(needs_it, True)]
