"""FSDP2 and FSDP under Fabric, by real processes."""

from __future__ import annotations

import gc
import os
import resource

import lightning as L
import pytest
import torch
from lightning_models import same_losses
from ranks import run_ranks
from sharded_models import (
    RUN_ENGINES,
    TinyLM,
    assert_equal_states,
    built,
    eager_model,
    loss_of,
    setup_for_training,
    tokens,
    train,
    trainable,
    whole_state,
)
from torchmetrics import MeanMetric

from lightning_efficient_init import EfficientInit, load_checkpoint, uninitialized_parameters
from lightning_efficient_init.deferred import UninitializedParameterWarning
from lightning_efficient_init.errors import (
    CheckpointError,
    CheckpointReadError,
    DeferredParameterError,
    StateDictMismatchError,
    UnsupportedCheckpointError,
)
from lightning_efficient_init.fabric import EfficientFSDP2Strategy, EfficientFSDPStrategy
from lightning_efficient_init.memory import PeakMemory
from lightning_efficient_init.sharding import part_of

ENGINES = {"fsdp2": EfficientFSDP2Strategy, "fsdp": EfficientFSDPStrategy}
engines = pytest.mark.parametrize("engine", list(ENGINES))
running_engines = pytest.mark.parametrize("engine", RUN_ENGINES)


def fabric_of(world_size, strategy, accelerator="cpu", **kwargs):
    kwargs = {"precision": "32-true", **kwargs} if "plugins" not in kwargs else kwargs
    strategy = ENGINES[strategy]() if strategy in ENGINES else strategy
    fabric = L.Fabric(accelerator=accelerator, devices=world_size, strategy=strategy, **kwargs)
    fabric.launch()
    return fabric


def _init(rank, world_size, engine):
    fabric = fabric_of(world_size, engine)
    model = fabric.setup(built(fabric))
    assert not uninitialized_parameters(model)
    assert model.head.weight is model.embed.weight
    return whole_state(model._forward_module)


@engines
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parameters_and_buffers_are_those_of_one_device(world_size, engine):
    for state in run_ranks(_init, world_size, world_size, engine):
        assert_equal_states(state, whole_state(eager_model()))


def _set_up_empty(rank, engine):
    torch.manual_seed(1 + rank)
    with fabric_of(1, "efficient_init").init_module(empty_init=True):
        model = TinyLM()
    torch.nn.init.ones_(model.frozen)
    model = fabric_of(2, engine).setup(model)
    assert not uninitialized_parameters(model)
    return whole_state(model._forward_module)


@engines
def test_what_another_fabric_has_built_empty_has_the_values_of_one_device(engine):
    expected = eager_model()
    torch.nn.init.ones_(expected.frozen)
    for state in run_ranks(_set_up_empty, 2, engine):
        assert_equal_states(state, whole_state(expected))


def _load(rank, world_size, path, when, empty, engine, accelerator):
    fabric = fabric_of(world_size, engine, accelerator)
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
    model(tokens().to(fabric.device))  # warns, which is an error, if anything were not initialized
    return whole_state(model._forward_module)


@running_engines
@pytest.mark.parametrize(
    ("when", "empty"), [("before", True), ("before, by function", False), ("after", True), ("after", False)]
)
def test_loading_before_and_after_setup_gives_the_checkpoint(tmp_path, when, empty, engine, accelerator):
    expected = eager_model(7)
    torch.save(expected.state_dict(), tmp_path / "a.pth")
    world_size = 3 if accelerator == "cpu" else 2
    for state in run_ranks(_load, world_size, world_size, tmp_path / "a.pth", when, empty, engine, accelerator):
        assert_equal_states(state, whole_state(expected))


def _map(rank, path, engine):
    fabric = fabric_of(2, engine)
    model = fabric.setup(built(fabric))
    before = whole_state(model._forward_module)
    with pytest.raises(CheckpointError, match=r"norm\.scale: it is sharded(.|\n)*mmap=False"):
        load_checkpoint(model, path, mmap=True)
    assert_equal_states(whole_state(model._forward_module), before)


@engines
def test_parts_of_tensors_cannot_be_the_files_own_memory(tmp_path, engine):
    torch.save(eager_model(7).state_dict(), tmp_path / "a.pth")
    run_ranks(_map, 2, tmp_path / "a.pth", engine)


def _set_up_after_the_file_was_replaced(rank, path, engine):
    fabric = fabric_of(2, engine)
    model = built(fabric, empty=True)
    fabric.load_raw(path, model)
    if rank == 1:
        torch.save({"padding": torch.zeros(99), **eager_model(8).state_dict()}, f"{path}.new")
        os.replace(f"{path}.new", path)
    fabric.barrier()
    with pytest.raises(CheckpointReadError, match=r"a\.pth': expected the file as it was when its header was read"):
        fabric.setup(model)


@engines
def test_a_file_that_was_replaced_before_sharding_is_noticed(tmp_path, engine):
    torch.save(eager_model(7).state_dict(), tmp_path / "a.pth")
    run_ranks(_set_up_after_the_file_was_replaced, 2, tmp_path / "a.pth", engine)


def _as_one(model, mesh):
    """Nothing is a part by itself."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh["data_parallel"])


class BlocksAndGain(torch.nn.Module):
    """Has blocks, a layer beside them, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.blocks = two_layers()
        self.gain = torch.nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.blocks(self.first(x)) * self.gain


def _load_after_evaluations(rank, paths, engine, options, accelerator):
    fabric = fabric_of(2, ENGINES[engine](**options), accelerator)
    with fabric.init_module():
        model = BlocksAndGain()
    model = fabric.setup(model)
    x = torch.ones(2, 8, device=fabric.device)
    with torch.no_grad():
        model(x)
        fabric.load_raw(paths[0], model)
        model(x)
        first = whole_state(model._forward_module)
        model(x)
        report = load_checkpoint(model, paths[1])
        model(x)
    assert len(report.bytes_per_rank) == 2  # it is known that there are parts
    return first, whole_state(model._forward_module)


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        pytest.param("fsdp2", {}, marks=RUN_ENGINES[0].marks),
        pytest.param(
            "fsdp2",
            {"parallelize_fn": _as_one, "data_parallel_size": 2, "tensor_parallel_size": 1},
            marks=RUN_ENGINES[0].marks,
        ),
        ("fsdp", {}),
        ("fsdp", {"use_orig_params": False}),
        ("fsdp", {"sharding_strategy": "SHARD_GRAD_OP"}),
    ],
)
def test_what_is_loaded_after_an_evaluation_is_what_the_next_one_uses(tmp_path, engine, options, accelerator):
    expected = [BlocksAndGain().state_dict(), BlocksAndGain().state_dict()]
    expected[1]["gain"] += 1
    paths = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for path, state in zip(paths, expected, strict=True):
        torch.save(state, path)
    for states in run_ranks(_load_after_evaluations, 2, paths, engine, options, accelerator):
        for found, state in zip(states, expected, strict=True):
            assert_equal_states(found, state)


class OwnLoadingCode(torch.nn.Module):
    """Layers that torch loads by code of their own."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(8)
        self.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 8))
        self.last = torch.nn.Linear(8, 8)


class Fused(OwnLoadingCode):
    """Reads a weight in two parts."""

    def __init__(self):
        super().__init__()
        self.last.register_load_state_dict_pre_hook(self._fuse)

    @staticmethod
    def _fuse(module, state, prefix, *_):
        if f"{prefix}top" in state:
            state[f"{prefix}weight"] = torch.cat([state.pop(f"{prefix}top"), state.pop(f"{prefix}bottom")])


def _load_by_own_code(rank, make, path, when, engine):
    fabric = fabric_of(2, engine)
    with fabric.init_module(empty_init=True):
        model = make()
    if when == "before":
        fabric.load_raw(path, model)
    wrapped = fabric.setup(model)
    if when == "after":
        fabric.load_raw(path, wrapped)
    return whole_state(wrapped._forward_module)


@engines
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("layout", ["today's", "BatchNorm's of old"])
def test_layers_with_loading_code_of_their_own_are_loaded(tmp_path, when, engine, layout):
    torch.manual_seed(7)
    expected = OwnLoadingCode()
    expected.norm.running_mean.normal_()
    state = expected.state_dict()
    if layout == "BatchNorm's of old":
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "a.pth")
    for found in run_ranks(_load_by_own_code, 2, OwnLoadingCode, tmp_path / "a.pth", when, engine):
        assert_equal_states(found, whole_state(expected))


@engines
def test_code_that_computes_what_it_writes_into_a_part_is_refused_before_anything_is_read(tmp_path, engine):
    state = OwnLoadingCode().state_dict()
    state["last.top"], state["last.bottom"] = state.pop("last.weight").chunk(2)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(AssertionError, match="last: has loading code of its own that computes what it writes"):
        run_ranks(_load_by_own_code, 2, Fused, tmp_path / "a.pth", "after", engine)


class Counts(torch.nn.Module):
    """Sets an attribute when it is loaded."""

    def __init__(self, count=0):
        super().__init__()
        self.count = count

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


class ParameterBesideCode(torch.nn.Module):
    """Its own parameters load in the standard way, what is in it does not."""

    def __init__(self, count=0):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.randn(8))
        self.counts = Counts(count)
        self.metric = MeanMetric()
        self.metric.persistent(True)
        self.metric(count)


def _load_beside_code(rank, path, engine):
    fabric = fabric_of(2, engine)
    with fabric.init_module(empty_init=True):
        model = ParameterBesideCode()
    model = fabric.setup(model)
    fabric.load_raw(path, model)
    return model.counts.count, model.metric.compute().item(), whole_state(model._forward_module)["gain"]


@engines
def test_a_parameter_beside_modules_whose_code_sets_attributes_is_loaded(tmp_path, engine):
    expected = ParameterBesideCode(count=3)
    torch.save(expected.state_dict(), tmp_path / "a.pth")
    for count, mean, gain in run_ranks(_load_beside_code, 2, tmp_path / "a.pth", engine):
        assert (count, mean) == (3, 3.0)
        assert torch.equal(gain, expected.gain)


def _losses(rank, world_size, name):
    fabric = fabric_of(world_size, name)
    torch.manual_seed(1)
    if name == "ddp":
        model = fabric.setup(TinyLM())
        optimizer = fabric.setup_optimizers(torch.optim.Adam(trainable(model), lr=1e-2))
    else:
        model, optimizer = setup_for_training(fabric)
    return train(fabric, model, optimizer, 3)


@running_engines
def test_training_losses_are_those_of_ddp(engine):
    ours, theirs = run_ranks(_losses, 2, 2, engine), run_ranks(_losses, 2, 2, "ddp")
    for found, expected in zip(ours, theirs):
        assert found == pytest.approx(expected, rel=1e-4)


def saving(engine, kind):
    if engine == "fsdp2":
        return EfficientFSDP2Strategy(save_distributed_checkpoint=kind == "sharded")
    return EfficientFSDPStrategy(state_dict_type=kind)


def _save_and_resume(rank, path, engine, kind, accelerator):
    fabric = fabric_of(2, saving(engine, kind), accelerator)
    model, optimizer = setup_for_training(fabric)
    train(fabric, model, optimizer, 2)
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 2})
    expected = train(fabric, model, optimizer, 2)
    model, optimizer = setup_for_training(fabric)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    assert fabric.load(path, state) == {}
    assert state["step"] == 2
    assert train(fabric, model, optimizer, 2) == same_losses(expected, accelerator)


@running_engines
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_what_is_saved_resumes_with_the_same_losses(tmp_path, engine, kind, accelerator):
    run_ranks(_save_and_resume, 2, tmp_path / "a.ckpt", engine, kind, accelerator)


def _resume_without_state(rank, path, engine, kind, make):
    fabric = fabric_of(2, saving(engine, kind))
    model, optimizer = _setup_with(fabric, make)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    saved = whole_state(model._forward_module)
    expected = train(fabric, model, optimizer, 2)
    model, optimizer = _setup_with(fabric, make)
    optimizer.param_groups[0]["lr"] = 1.0
    fabric.load(path, {"model": model, "optimizer": optimizer})
    assert_equal_states(whole_state(model._forward_module), saved)
    assert train(fabric, model, optimizer, 2) == expected


def _setup_with(fabric, make):
    model = fabric.setup(built(fabric))
    return model, fabric.setup_optimizers(make(trainable(model), lr=1e-2))


@running_engines
@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_that_has_no_state_is_resumed(tmp_path, engine, kind, make):
    run_ranks(_resume_without_state, 2, tmp_path / "a.ckpt", engine, kind, make)


def _bytes_read(rank, path, engine, dim):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def shard(model, mesh):
        return fully_shard(model, mesh=mesh["data_parallel"], shard_placement_fn=lambda param: Shard(dim))

    by_dim = EfficientFSDP2Strategy(shard, data_parallel_size=2, tensor_parallel_size=1)
    fabric = fabric_of(2, by_dim if engine == "fsdp2" else engine)
    with fabric.init_module(empty_init=True):
        model = torch.nn.Sequential(*[torch.nn.Linear(512, 2048, bias=False) for _ in range(4)])
    model = fabric.setup(model)
    before = bytes_read()
    report = load_checkpoint(model, path)
    rchar = bytes_read() - before
    region = 4 * 512 * 2048 * 4 // 2
    assert report.num_bytes == region
    assert report.bytes_per_rank == (region, region)
    assert rchar <= 1.05 * region
    return whole_state(model._forward_module)


def bytes_read():
    with open("/proc/self/io") as io:
        return int(io.readline().split()[1])


@pytest.mark.parametrize(("engine", "dim"), [("fsdp2", 0), ("fsdp2", 1), ("fsdp", None)])
def test_each_rank_reads_its_part_and_no_more(tmp_path, engine, dim):
    expected = {f"{i}.weight": torch.randn(2048, 512) for i in range(4)}
    torch.save(expected, tmp_path / "a.pth")
    for state in run_ranks(_bytes_read, 2, tmp_path / "a.pth", engine, dim):
        assert_equal_states(state, expected)


def _bytes_read_hybrid(rank, path, dim):
    """Hybrid sharding: cut along one axis of the mesh, and repeated along the other."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def repeat(model, mesh):
        both = {"mesh": mesh["data_parallel", "tensor_parallel"], "shard_placement_fn": lambda param: Shard(dim)}
        for layer in model:
            fully_shard(layer, **both)
        return fully_shard(model, **both)

    fabric = fabric_of(4, EfficientFSDP2Strategy(repeat, data_parallel_size=2, tensor_parallel_size=2))
    with fabric.init_module(empty_init=True):
        model = torch.nn.Sequential(*[torch.nn.Linear(512, 2048, bias=False) for _ in range(4)])
    model = fabric.setup(model)
    before = bytes_read()
    report = load_checkpoint(model, path)
    read = bytes_read() - before
    state = whole_state(model._forward_module)

    def use_up_files(key):
        if rank == 3:  # when the file has been found to be in order, no more can be opened
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        return key

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    with pytest.raises(CheckpointError, match="Too many open files"):  # on all: also those with other parts than rank 3
        load_checkpoint(model, path, key_map=use_up_files)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return state, read, report


@pytest.mark.parametrize("dim", [0, 1])
def test_what_one_axis_of_a_mesh_repeats_is_read_once_where_it_is_in_one_piece(tmp_path, dim):
    expected = {f"{i}.weight": torch.randn(2048, 512) for i in range(4)}
    torch.save(expected, tmp_path / "a.pth")
    num_bytes = sum(value.nbytes for value in expected.values()) // (4 if dim == 0 else 2)
    for state, read, report in run_ranks(_bytes_read_hybrid, 4, str(tmp_path / "a.pth"), dim):
        assert_equal_states(state, expected)
        assert read <= 1.05 * num_bytes
        assert report.num_bytes == pytest.approx(num_bytes, rel=0.001)  # cuts are on pages
        assert sum(report.bytes_per_rank) == 4 * num_bytes


def _fail(rank, path, engine):
    fabric = fabric_of(2, engine)
    model = fabric.setup(built(fabric))
    before = whole_state(model._forward_module)
    with pytest.raises(StateDictMismatchError) as caught:
        fabric.load_raw(f"{path}-{rank}.pth", model)
    assert_equal_states(whole_state(model._forward_module), before)
    return str(caught.value)


@engines
def test_what_does_not_fit_on_one_rank_is_raised_on_all_and_nothing_changes(tmp_path, engine):
    state = eager_model().state_dict()
    torch.save(state, tmp_path / "a-0.pth")
    del state["norm.scale"]
    torch.save(state, tmp_path / "a-1.pth")
    first, second = run_ranks(_fail, 2, tmp_path / "a", engine)
    assert first == second
    assert "norm.scale" in first


def _fail_to_read(rank, path, engine, accelerator):
    fabric = fabric_of(2, engine, accelerator)
    model = fabric.setup(built(fabric))
    if rank == 1:  # the file ends early, for this rank alone
        os.truncate(f"{path}-1.pth", os.path.getsize(f"{path}-1.pth") - 9)
    with pytest.raises(CheckpointError) as caught:
        fabric.load_raw(f"{path}-{rank}.pth", model)
    return type(caught.value).__name__, str(caught.value)


@engines
def test_a_rank_that_cannot_read_takes_the_others_down_with_its_message(tmp_path, engine, accelerator):
    for rank in range(2):
        torch.save(eager_model().state_dict(), tmp_path / f"a-{rank}.pth")
    first, second = run_ranks(_fail_to_read, 2, tmp_path / "a", engine, accelerator, timeout_s=60)
    assert first == second
    assert first[0] == "CorruptCheckpointError"
    assert "a-1.pth" in first[1]


def _precisions(rank, path, precision, is_ours, engine):
    kwargs = {"plugins": [EfficientInit(precision)]} if is_ours else {"precision": precision}
    fabric = fabric_of(2, engine, **kwargs)
    model = built(fabric)
    fabric.load_raw(path, model)
    model = fabric.setup(model)
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    expected = torch.load(path)
    for wrapped_name, param in model.named_parameters():
        part = part_of(param)
        name = wrapped_name.replace("_forward_module.", "").replace("_fsdp_wrapped_module.", "")
        assert torch.equal(part.memory, part.take(expected[name]).to(dtype).view(part.memory.shape)), name
    loss = loss_of(model, tokens())
    fabric.backward(loss)
    assert loss.isfinite()


@running_engines
@pytest.mark.parametrize(
    ("precision", "is_ours"), [("bf16-true", True), ("64-true", True), ("bf16-mixed", True), ("bf16-true", False)]
)
def test_every_precision_takes_parts(tmp_path, precision, is_ours, engine):
    torch.save(eager_model(7).state_dict(), tmp_path / "a.pth")
    run_ranks(_precisions, 2, tmp_path / "a.pth", precision, is_ours, engine)


def _parallelize(model, mesh):
    """In both directions; each layer by itself."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for layer in model:
        parallelize_module(layer, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def _load_2d(rank, path):
    fabric = fabric_of(4, EfficientFSDP2Strategy(_parallelize, data_parallel_size=2, tensor_parallel_size=2))
    with fabric.init_module(empty_init=True):
        model = two_layers()
    model = fabric.setup(model)
    report = load_checkpoint(model, path)
    return {name: t.full_tensor() for name, t in model.state_dict().items()}, report.num_bytes


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


def _train_2d(rank, sizes):
    """Losses of four steps, for each of two batches; ranks that differ in their part of a layer have the same batch."""
    data, tensor = sizes
    strategy = EfficientFSDP2Strategy(_parallelize, data_parallel_size=data, tensor_parallel_size=tensor)
    fabric = fabric_of(data * tensor, strategy if tensor > 1 else "ddp")
    torch.manual_seed(1 + rank if tensor > 1 else 1)
    with fabric.init_module():
        model = two_layers()
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters(), lr=1e-2))
    generator = torch.Generator().manual_seed(rank // tensor)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(torch.randn(4, 8, generator=generator)) - 1).square().mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


@RUN_ENGINES[0].marks[0]
def test_training_losses_in_both_directions_are_those_of_ddp():
    first, second = run_ranks(_train_2d, 2, (2, 1))
    assert first[0] > first[-1]
    found = run_ranks(_train_2d, 4, (2, 2))
    for losses, expected in zip(found, (first, first, second, second), strict=True):
        assert losses == pytest.approx(expected, rel=1e-5)


def _flat(rank, path):
    """Parameters that exist in flat ones alone."""
    fabric = fabric_of(2, EfficientFSDPStrategy(use_orig_params=False))
    torch.manual_seed(1 + rank)
    with fabric.init_module():
        first, second = two_layers(), two_layers()
    first = fabric.setup(first)
    second = fabric.setup(second)
    report = load_checkpoint(second, path)
    assert report.num_bytes == report.bytes_per_rank[rank] > 0
    assert not report.missing
    return whole_state(first._forward_module), whole_state(second._forward_module), report.num_bytes


def test_parameters_that_are_flat_are_initialized_and_loaded(tmp_path):
    torch.manual_seed(1)
    initialized, loaded = two_layers().state_dict(), two_layers().state_dict()
    loaded = {name: value + 1 for name, value in loaded.items()}
    torch.save(loaded, tmp_path / "a.pth")
    results = run_ranks(_flat, 2, tmp_path / "a.pth")
    for first, second, _ in results:
        assert_equal_states(first, initialized)
        assert_equal_states(second, loaded)
    assert sum(num_bytes for _, _, num_bytes in results) == sum(value.nbytes for value in loaded.values())


def _resume_flat(rank, path):
    fabric = fabric_of(2, EfficientFSDPStrategy(use_orig_params=False))
    with fabric.init_module():
        model = two_layers()
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters()))
    with pytest.raises(UnsupportedCheckpointError, match="use_orig_params=True, its default, or load the model alone"):
        fabric.load(path, {"model": model, "optimizer": optimizer})
    fabric.load(path, {"model": model})
    return whole_state(model._forward_module)


def test_an_optimizer_of_flat_parameters_is_refused_with_the_remedy(tmp_path):
    model = two_layers()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.ckpt")
    for state in run_ranks(_resume_flat, 2, tmp_path / "a.ckpt"):
        assert_equal_states(state, model.state_dict())


BLOCK_BYTES = 32 << 20


class Blocks(torch.nn.Sequential):
    """Eight blocks of 32 MiB."""

    def __init__(self):
        super().__init__(*[torch.nn.Sequential(torch.nn.Linear(2048, 4096, bias=False)) for _ in range(8)])


class BlocksAndHead(torch.nn.Sequential):
    """Eight blocks, and two blocks' worth of what is in none."""

    def __init__(self):
        super().__init__(Blocks(), torch.nn.Linear(2048, 8192, bias=False))


def _peak(rank, engine, make, path):
    fabric = fabric_of(2, engine)
    with fabric.init_module():
        fabric.setup(two_layers())  # libraries that are imported at the first use are not what is measured
    gc.collect()
    with PeakMemory(in_background=True) as memory:
        with fabric.init_module(empty_init=path is not None):
            model = make()
        if path is not None:
            fabric.load_raw(path, model)
        model = fabric.setup(model)
    return memory.host_bytes


def peaks(engine, make, path):
    """Of the host, for each of two ranks that build, shard and, given a path, load a model."""
    if path is not None:
        torch.save(make().state_dict(), path)
    return run_ranks(_peak, 2, engine, make, path)


@engines
@pytest.mark.parametrize("is_loaded", [False, True])
def test_no_rank_ever_has_more_than_its_part_and_two_blocks(tmp_path, engine, is_loaded):
    for peak_bytes in peaks(engine, Blocks, tmp_path / "a.pth" if is_loaded else None):
        assert 3 * BLOCK_BYTES < peak_bytes <= 6 * BLOCK_BYTES + (16 << 20)  # of eight


@engines
@pytest.mark.parametrize("is_loaded", [False, True])
def test_what_is_in_no_block_is_there_no_more_than_twice_beside_what_is_sharded(tmp_path, engine, is_loaded):
    for peak_bytes in peaks(engine, BlocksAndHead, tmp_path / "a.pth" if is_loaded else None):
        assert peak_bytes <= 4 * BLOCK_BYTES + 2 * 2 * BLOCK_BYTES + (16 << 20)


class KeepsMore(TinyLM):
    """Has its parameters in a list as well, and a module that it does not register."""

    def __init__(self):
        super().__init__()
        self.groups = [{"params": list(self.parameters()), "weight_decay": 0.1}]
        self.teacher = [torch.nn.Linear(2, 2)]


def _keep_more(rank, path, engine):
    fabric = fabric_of(2, engine)
    with fabric.init_module(empty_init=True):
        model = KeepsMore()
    groups, teacher = model.groups, model.teacher[0]
    fabric.load_raw(path / "teacher.pth", teacher)
    fabric.load_raw(path / "a.pth", model)
    model = fabric.setup(model)
    model(tokens())
    with pytest.raises(DeferredParameterError, match="deferred"):
        teacher(torch.ones(1, 2))
    own = set(map(id, model.parameters()))  # under FSDP those in the list, under FSDP2 others
    return all(param.is_meta or id(param) in own for param in groups[0]["params"]), whole_state(model._forward_module)


@engines
def test_what_is_not_registered_is_left_alone_and_says_so(tmp_path, engine):
    expected = eager_model(7)
    torch.save(expected.state_dict(), tmp_path / "a.pth")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "teacher.pth")
    for is_left_alone, state in run_ranks(_keep_more, 2, tmp_path, engine):
        assert is_left_alone
        assert_equal_states(state, whole_state(expected))


def _uninitialized(rank, engine):
    """What nobody loads is initialized at first use."""
    fabric = fabric_of(2, engine)
    model = fabric.setup(built(fabric, empty=True))
    assert uninitialized_parameters(model)
    with pytest.warns(UninitializedParameterWarning, match="had not been written"):
        model(tokens())
    return whole_state(model._forward_module)


@running_engines
def test_what_nobody_loads_is_initialized_at_first_use(engine):
    expected = whole_state(eager_model())
    for state in run_ranks(_uninitialized, 2, engine):
        assert_equal_states(state, expected)
