"""FSDP that cuts parameters along one axis of a mesh, and repeats them along the other, by real processes."""

from __future__ import annotations

import resource

import lightning as L
import pytest
import torch
from ranks import run_ranks
from sharded_models import (
    Block,
    TinyLM,
    assert_equal_states,
    built,
    eager_model,
    setup_for_training,
    tokens,
    train,
    trainable,
    whole_state,
)
from torch import distributed

from lightning_efficient_init import load_checkpoint, uninitialized_parameters
from lightning_efficient_init.errors import CheckpointError
from lightning_efficient_init.fabric import EfficientFSDPStrategy
from lightning_efficient_init.sharding import part_of

SIZES = [(2, 1), (2, 2)]


def fabric_of(sizes, kind="HYBRID_SHARD", **kwargs):
    strategy = EfficientFSDPStrategy(sharding_strategy=kind, device_mesh=sizes, **kwargs)
    fabric = L.Fabric(accelerator="cpu", devices=sizes[0] * sizes[1], strategy=strategy, precision="32-true")
    fabric.launch()
    return fabric


def local_elements(module):
    """Elements of parameters that this rank keeps."""
    return sum(part_of(param).memory.numel() for param in module.parameters())


def _init(rank, sizes, kind):
    fabric = fabric_of(sizes, kind)
    model = fabric.setup(built(fabric))
    assert not uninitialized_parameters(model)
    assert model.head.weight is model.embed.weight
    return local_elements(model), whole_state(model._forward_module)


@pytest.mark.parametrize(
    ("sizes", "kind"), [*((size, "HYBRID_SHARD") for size in SIZES), ((2, 2), "_HYBRID_SHARD_ZERO2")]
)
def test_parameters_and_buffers_are_those_of_one_device(sizes, kind):
    expected = eager_model()
    total = sum(param.numel() for param in expected.parameters())
    for num_elements, state in run_ranks(_init, sizes[0] * sizes[1], sizes, kind):
        assert_equal_states(state, whole_state(expected))
        assert num_elements == pytest.approx(total / sizes[1], abs=8)  # units are filled up to equal shards


def _load(rank, path, sizes, when):
    fabric = fabric_of(sizes)
    model = built(fabric, empty=when == "before")
    if when == "before":
        fabric.load_raw(path, model)
    model = fabric.setup(model)
    if when == "after":
        fabric.load_raw(path, model)
    model(tokens())  # warns, which is an error, if anything were not initialized
    return whole_state(model._forward_module)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_loading_before_and_after_setup_gives_the_checkpoint(tmp_path, sizes, when):
    expected = eager_model(7)
    torch.save(expected.state_dict(), tmp_path / "a.pth")
    for state in run_ranks(_load, sizes[0] * sizes[1], tmp_path / "a.pth", sizes, when):
        assert_equal_states(state, whole_state(expected))


def bytes_read():
    with open("/proc/self/io") as io:
        return int(io.readline().split()[1])


def _bytes_read(rank, path, sizes, use_orig_params):
    fabric = fabric_of(sizes, use_orig_params=use_orig_params)
    with fabric.init_module(empty_init=True):
        model = torch.nn.Sequential(*[torch.nn.Linear(512, 2048, bias=False) for _ in range(4)])
    model = fabric.setup(model)
    before = bytes_read()
    report = load_checkpoint(model, path)
    read = bytes_read() - before
    state = whole_state(model._forward_module)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def use_up_files(key):
        if rank == 1:  # when the file has been found to be in order, no more can be opened
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        return key

    with pytest.raises(CheckpointError, match="Too many open files"):  # on all: also those with other parts than rank 1
        load_checkpoint(model, path, key_map=use_up_files)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return state, read, report


@pytest.mark.parametrize(("sizes", "use_orig_params"), [*((size, True) for size in SIZES), ((2, 2), False)])
def test_what_one_axis_of_a_mesh_repeats_is_read_once(tmp_path, sizes, use_orig_params):
    expected = {f"{i}.weight": torch.randn(2048, 512) for i in range(4)}
    torch.save(expected, tmp_path / "a.pth")
    total = sum(value.nbytes for value in expected.values())
    world_size = sizes[0] * sizes[1]
    for state, read, report in run_ranks(_bytes_read, world_size, str(tmp_path / "a.pth"), sizes, use_orig_params):
        assert_equal_states(state, expected)
        assert read <= 1.05 * total / world_size
        assert report.num_bytes == pytest.approx(total / world_size, rel=0.001)  # cuts are on pages
        assert sum(report.bytes_per_rank) == total


def _losses(rank, sizes, kind):
    if kind == "ddp":
        fabric = L.Fabric(accelerator="cpu", devices=sizes[0] * sizes[1], strategy="ddp")
        fabric.launch()
        torch.manual_seed(1)
        model = fabric.setup(TinyLM())
        optimizer = fabric.setup_optimizers(torch.optim.Adam(trainable(model), lr=1e-2))
    else:
        fabric = fabric_of(sizes, kind)
        model, optimizer = setup_for_training(fabric)
    return train(fabric, model, optimizer, 3)


@pytest.mark.parametrize(
    ("sizes", "kind"), [((2, 1), "HYBRID_SHARD"), ((2, 2), "HYBRID_SHARD"), ((2, 2), "_HYBRID_SHARD_ZERO2")]
)
def test_training_losses_are_those_of_ddp(sizes, kind):
    world_size = sizes[0] * sizes[1]
    ours, theirs = run_ranks(_losses, world_size, sizes, kind), run_ranks(_losses, world_size, sizes, "ddp")
    for found, expected in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def _save_and_resume(rank, path, sizes, kind):
    fabric = fabric_of(sizes, state_dict_type=kind)
    model, optimizer = setup_for_training(fabric)
    train(fabric, model, optimizer, 2)
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 2})
    saved = whole_state(model._forward_module)
    expected = train(fabric, model, optimizer, 2)
    torch.manual_seed(100)
    model, optimizer = setup_for_training(fabric)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    assert fabric.load(path, state) == {}
    assert state["step"] == 2
    assert train(fabric, model, optimizer, 2) == expected
    return saved


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_what_is_saved_resumes_with_the_same_losses_and_loads_on_one_device(tmp_path, sizes, kind):
    saved, *_ = run_ranks(_save_and_resume, sizes[0] * sizes[1], tmp_path / "a.ckpt", sizes, kind)
    model = TinyLM()
    load_checkpoint(model, tmp_path / "a.ckpt")
    for name, value in model.named_parameters():
        assert torch.equal(value, saved[name]), name


def _repeats_only(rank, groups_are_given):
    """Groups of one rank each, without a mesh: given, or as many as a machine of one device (a CPU) makes."""
    if groups_are_given:
        distributed.init_process_group("gloo")
        alone = [distributed.new_group([0]), distributed.new_group([1])][rank]
        how = {"process_group": (alone, distributed.group.WORLD)}
    else:
        how = {"auto_wrap_policy": {Block}}
    strategy = EfficientFSDPStrategy(sharding_strategy="HYBRID_SHARD", **how)
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = fabric.setup(built(fabric))
    before = whole_state(model._forward_module)
    optimizer = fabric.setup_optimizers(torch.optim.Adam(trainable(model), lr=1e-2))
    return before, train(fabric, model, optimizer, 2), whole_state(model._forward_module)


@pytest.mark.parametrize("groups_are_given", [True, False])
def test_copies_that_are_not_cut_at_all_stay_equal_while_they_are_trained(groups_are_given):
    first, second = run_ranks(_repeats_only, 2, groups_are_given)
    assert_equal_states(first[0], whole_state(eager_model()))
    assert first[1] == second[1]
    assert_equal_states(second[2], first[2])
    assert not torch.equal(first[0]["embed.weight"], first[2]["embed.weight"])


def _given_groups(rank, path):
    """The other way to say it: a pair of process groups."""
    distributed.init_process_group("gloo")
    inner = [distributed.new_group([0, 1]), distributed.new_group([2, 3])][rank // 2]
    outer = [distributed.new_group([0, 2]), distributed.new_group([1, 3])][rank % 2]
    strategy = EfficientFSDPStrategy(sharding_strategy="HYBRID_SHARD", process_group=(inner, outer))
    fabric = L.Fabric(accelerator="cpu", devices=4, strategy=strategy)
    fabric.launch()
    model = fabric.setup(built(fabric))
    before = whole_state(model._forward_module)
    report = load_checkpoint(model, path)
    return before, whole_state(model._forward_module), report.bytes_per_rank


def test_groups_in_place_of_a_mesh_work_as_well(tmp_path):
    expected = eager_model(7)
    torch.save(expected.state_dict(), tmp_path / "a.pth")
    for before, after, bytes_per_rank in run_ranks(_given_groups, 4, tmp_path / "a.pth"):
        assert_equal_states(before, whole_state(eager_model()))
        assert_equal_states(after, whole_state(expected))
        total = sum(value.nbytes for value in expected.state_dict().values())
        assert sum(bytes_per_rank) < 1.5 * total
