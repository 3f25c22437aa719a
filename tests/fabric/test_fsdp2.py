"""FSDP2 under Fabric, by real processes."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from ranks import run_ranks
from sharded_models import TinyLM, assert_equal_states, eager_model, loss_of, tokens, whole_state

from lightning_efficient_init import EfficientInit, load_checkpoint, uninitialized_parameters
from lightning_efficient_init.fabric import EfficientFSDP2Strategy


def fabric_of(world_size, strategy=None, **kwargs):
    kwargs = {"precision": "32-true", **kwargs} if "plugins" not in kwargs else kwargs
    fabric = L.Fabric(accelerator="cpu", devices=world_size, strategy=strategy or EfficientFSDP2Strategy(), **kwargs)
    fabric.launch()
    return fabric


def built(fabric, *, empty=False):
    torch.manual_seed(1 + fabric.global_rank)
    with fabric.init_module(empty_init=empty):
        return TinyLM()


def _init(rank, world_size):
    fabric = fabric_of(world_size)
    model = fabric.setup(built(fabric))
    assert not uninitialized_parameters(model)
    assert model.head.weight is model.embed.weight
    return whole_state(model.module)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parameters_and_buffers_are_those_of_one_device(world_size):
    for state in run_ranks(_init, world_size, world_size):
        assert_equal_states(state, whole_state(eager_model()))


def _load(rank, world_size, path, when, empty):
    fabric = fabric_of(world_size)
    model = built(fabric, empty=empty)
    if when == "before":
        fabric.load_raw(path, model)
    if when == "before, by function":
        report = load_checkpoint(model, path)
        assert report.num_bytes == 0
        assert "blocks.1.up.weight" in report.loaded
    model = fabric.setup(model)
    if when == "after":
        fabric.load_raw(path, model)
    model(tokens())  # warns, which is an error, if anything were not initialized
    return whole_state(model.module)


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("when", ["before", "before, by function", "after"])
def test_loading_before_and_after_setup_gives_the_checkpoint(tmp_path, when, empty):
    expected = eager_model(7)
    torch.save(expected.state_dict(), tmp_path / "a.pth")
    for state in run_ranks(_load, 3, 3, tmp_path / "a.pth", when, empty):
        assert_equal_states(state, whole_state(expected))


def _train(fabric, model, optimizer, steps):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, tokens(10 * step + fabric.global_rank))
        fabric.backward(loss)
        optimizer.step()
        losses.append(fabric.all_reduce(loss.detach()).item())
    return losses


def trainable(model):
    return [param for param in model.parameters() if param.requires_grad]


def setup_for_training(fabric):
    model = fabric.setup(built(fabric))
    optimizer = fabric.setup_optimizers(torch.optim.Adam(trainable(model), lr=1e-2))
    return model, optimizer


def _losses(rank, world_size, name):
    strategy = name if name == "ddp" else None
    fabric = fabric_of(world_size, strategy)
    torch.manual_seed(1)
    if name == "ddp":
        model = fabric.setup(TinyLM())
        optimizer = fabric.setup_optimizers(torch.optim.Adam(trainable(model), lr=1e-2))
    else:
        model, optimizer = setup_for_training(fabric)
    return _train(fabric, model, optimizer, 3)


def test_training_losses_are_those_of_ddp():
    ours, theirs = run_ranks(_losses, 2, 2, None), run_ranks(_losses, 2, 2, "ddp")
    for found, expected in zip(ours, theirs):
        assert found == pytest.approx(expected, rel=1e-4)


def _save_and_resume(rank, world_size, path, is_distributed):
    strategy = EfficientFSDP2Strategy(save_distributed_checkpoint=is_distributed)
    fabric = fabric_of(world_size, strategy)
    model, optimizer = setup_for_training(fabric)
    _train(fabric, model, optimizer, 2)
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 2})
    expected = _train(fabric, model, optimizer, 2)
    model, optimizer = setup_for_training(fabric)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    assert fabric.load(path, state) == {}
    assert state["step"] == 2
    assert _train(fabric, model, optimizer, 2) == expected


def test_what_is_saved_in_one_file_resumes_with_the_same_losses(tmp_path):
    run_ranks(_save_and_resume, 2, 2, tmp_path / "a.ckpt", False)


def _bytes_read(rank, path, dim):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def shard(model, mesh):
        return fully_shard(model, mesh=mesh["data_parallel"], shard_placement_fn=lambda param: Shard(dim))

    fabric = fabric_of(2, EfficientFSDP2Strategy(shard, data_parallel_size=2, tensor_parallel_size=1))
    with fabric.init_module(empty_init=True):
        model = torch.nn.Sequential(*[torch.nn.Linear(512, 2048, bias=False) for _ in range(4)])
    model = fabric.setup(model)
    with open("/proc/self/io") as io:
        before = int(io.readline().split()[1])
    report = load_checkpoint(model, path)
    with open("/proc/self/io") as io:
        rchar = int(io.readline().split()[1]) - before
    region = sum(p.to_local().nbytes for p in model.parameters())
    assert report.num_bytes == region
    assert report.bytes_per_rank == (region, region)
    assert rchar <= 1.05 * region
    return {name: t.full_tensor() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("dim", [0, 1])
def test_each_rank_reads_its_part_and_no_more(tmp_path, dim):
    expected = {f"{i}.weight": torch.randn(2048, 512) for i in range(4)}
    torch.save(expected, tmp_path / "a.pth")
    for state in run_ranks(_bytes_read, 2, tmp_path / "a.pth", dim):
        assert_equal_states(state, expected)


def _fail(rank, path, how):
    fabric = fabric_of(2)
    model = fabric.setup(built(fabric))
    before = whole_state(model.module)
    path = f"{path}-{rank}.pth" if how == "plan" else path
    with pytest.raises(Exception) as caught:
        fabric.load_raw(path, model)
    assert how != "plan" or all(torch.equal(now, before[name]) for name, now in whole_state(model.module).items())
    return type(caught.value).__name__, str(caught.value)


def test_what_does_not_fit_on_one_rank_is_raised_on_all_and_nothing_changes(tmp_path):
    state = eager_model().state_dict()
    torch.save(state, tmp_path / "a-0.pth")
    del state["norm.scale"]
    torch.save(state, tmp_path / "a-1.pth")
    first, second = run_ranks(_fail, 2, tmp_path / "a", "plan")
    assert first == second
    assert first[0] == "StateDictMismatchError"
    assert "norm.scale" in first[1]


def _precisions(rank, path, precision, is_ours):
    kwargs = {"plugins": [EfficientInit(precision)]} if is_ours else {"precision": precision}
    fabric = fabric_of(2, **kwargs)
    model = built(fabric)
    fabric.load_raw(path, model)
    model = fabric.setup(model)
    loss = loss_of(model, tokens())
    fabric.backward(loss)
    assert loss.isfinite()
    return {name: value for name, value in whole_state(model.module).items() if "metric" not in name}


@pytest.mark.parametrize(
    ("precision", "is_ours"), [("bf16-true", True), ("64-true", True), ("bf16-mixed", True), ("bf16-true", False)]
)
def test_every_precision_takes_parts(tmp_path, precision, is_ours):
    expected = eager_model(7)
    torch.save(expected.state_dict(), tmp_path / "a.pth")
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    for state in run_ranks(_precisions, 2, tmp_path / "a.pth", precision, is_ours):
        for name, value in expected.named_parameters():
            assert torch.equal(state[name], value.to(dtype)), name


def _load_2d(rank, path):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def parallelize(model, mesh):
        for layer in model:
            parallelize_module(layer, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
            fully_shard(layer, mesh=mesh["data_parallel"])
        return fully_shard(model, mesh=mesh["data_parallel"])

    fabric = fabric_of(4, EfficientFSDP2Strategy(parallelize, data_parallel_size=2, tensor_parallel_size=2))
    with fabric.init_module(empty_init=True):
        model = two_layers()
    model = fabric.setup(model)
    report = load_checkpoint(model, path)
    values = {name: t.full_tensor() for name, t in model.state_dict().items()}
    model(torch.ones(2, 8))
    return values, report.num_bytes


def two_layers():
    return torch.nn.Sequential(
        *[torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)) for _ in range(2)]
    )


def test_tensor_parallel_and_sharded_parameters_are_loaded(tmp_path):
    expected = two_layers().state_dict()
    torch.save(expected, tmp_path / "a.pth")
    for state, num_bytes in run_ranks(_load_2d, 4, tmp_path / "a.pth"):
        assert_equal_states(state, expected)
        assert num_bytes < 0.4 * sum(value.nbytes for value in expected.values())
