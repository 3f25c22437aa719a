from __future__ import annotations

import copy
import os
import random
import time
import warnings
from contextlib import nullcontext

import lightning as L
import numpy as np
import pytest
import torch
from lightning_models import DTYPES, PRECISIONS, Regression, assert_equal_states, loader
from ranks import RanksFailedError, run_ranks
from torch import nn

from lightning_efficient_init import EfficientInit, load_checkpoint, uninitialized_parameters
from lightning_efficient_init.deferred import UninitializedParameterWarning
from lightning_efficient_init.errors import CorruptCheckpointError, StateDictMismatchError

WORLDS = [1, 2, 3]
WIDE = 40_000  # a model whose weights outweigh headers and pages


def ddp_fabric(world_size, efficient_init="32-true", accelerator="cpu", **kwargs):
    ours = {"strategy": "efficient_init_ddp", "plugins": [EfficientInit(efficient_init)]}
    fabric = L.Fabric(accelerator=accelerator, devices=world_size, **(kwargs or ours))
    fabric.launch()
    torch.manual_seed(17 + fabric.global_rank)
    return fabric


def eager_model(precision="32-true", width=24):
    torch.manual_seed(17)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES.get(precision, torch.float32))
    try:
        return Regression(width)
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(3)
    torch.save(Regression(24).state_dict(), tmp_path / "a.pth")
    return tmp_path / "a.pth"


def _rchar():
    with open("/proc/self/io", "rb") as io:
        return int(next(line for line in io if line.startswith(b"rchar:")).split()[1])


def _build(rank, world_size, precision):
    fabric = ddp_fabric(world_size, precision)
    with fabric.init_module():
        model = Regression(24)
    return fabric.setup(model).state_dict()


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_rank_holds_the_values_of_a_single_device(world_size):
    for found in run_ranks(_build, world_size, world_size, "32-true"):
        assert_equal_states(found, eager_model().state_dict())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_builds_in_its_dtype(precision):
    for found in run_ranks(_build, 2, 2, precision):
        assert_equal_states(found, eager_model(precision).state_dict())


def _initialize_late(rank, world_size, forward):
    fabric = ddp_fabric(world_size)
    with fabric.init_module(empty_init=True):
        model = Regression(24)
    wrapped = fabric.setup(model)
    assert uninitialized_parameters(model)
    with pytest.warns(UninitializedParameterWarning):
        wrapped(torch.ones(2, 8)) if forward else model.state_dict()
    return dict(model.named_parameters())


@pytest.mark.parametrize("forward", [True, False])
def test_what_nobody_loads_gets_the_values_of_a_single_device_at_first_use(forward):
    for found in run_ranks(_initialize_late, 2, 2, forward):
        assert_equal_states(found, dict(eager_model().named_parameters()))


class FromOutside(nn.Module):
    """Numbers that no generator of torch gives."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.from_numpy(np.random.randn(8)).float())
        self.net = nn.Linear(8, 1)
        nn.init.constant_(self.net.bias, random.random())

    def forward(self, x):
        return self.net(x * self.scale)


class Varied(nn.Module):
    """Which initializer runs is a matter of chance."""

    def __init__(self, rank):
        super().__init__()
        self.net = nn.Linear(8, 1)
        if rank:
            torch.rand(5)
            nn.init.normal_(self.net.weight)

    def forward(self, x):
        return self.net(x)


class Turned(nn.Module):
    """The order in which parts are made, one recording each, is a matter of chance."""

    def __init__(self, rank, init):
        super().__init__()
        made = {}
        for name in ("first", "second")[:: -1 if rank else 1]:
            with init():
                made[name] = nn.Linear(8, 8)
        self.first, self.second = made["first"], made["second"]

    def forward(self, x):
        return self.second(self.first(x))


def _differ(rank, world_size, kind):
    fabric = ddp_fabric(world_size)
    random.seed(rank)
    np.random.seed(rank)
    if kind == "in another order":
        model = Turned(rank, lambda: fabric.init_module(empty_init=True))
    else:
        with fabric.init_module(empty_init=True):
            model = FromOutside() if kind == "by numbers from outside" else Varied(rank)
    wrapped = fabric.setup(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UninitializedParameterWarning)
        wrapped(torch.ones(2, 8))
    return dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["by numbers from outside", "in other ways", "in another order"])
def test_what_ranks_initialize_differently_is_as_rank_0_has_it(kind):
    torch.manual_seed(17)
    random.seed(0)
    np.random.seed(0)
    models = {"in another order": lambda: Turned(0, nullcontext), "in other ways": lambda: Varied(0)}
    expected = dict(models.get(kind, FromOutside)().named_parameters())
    for found in run_ranks(_differ, 2, 2, kind):
        assert_equal_states(found, expected)


def _initialize_on_some(rank, world_size, path, how):
    """What is left on this rank as the model is set up."""
    fabric = ddp_fabric(world_size)
    weights = torch.load(path)
    if how != "all of it":
        weights = {name: value for name, value in weights.items() if not name.startswith("net.0")}
    has_values = {"rank 0 is built": rank == 0, "rank 1 is built": rank == 1}.get(how, False)
    with fabric.init_module(empty_init=not has_values):
        model = Regression(24)
        if rank == 0 and not how.endswith("is built"):
            model.load_state_dict(weights, strict=False)
    average = copy.deepcopy(model)
    wrapped = fabric.setup(model)
    left = uninitialized_parameters(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UninitializedParameterWarning)
        wrapped(torch.ones(2, 8))
    told = [str(w.message) for w in caught if w.category is UninitializedParameterWarning]
    return left, told, dict(model.named_parameters()), dict(average.named_parameters())


@pytest.mark.parametrize("how", ["rank 0 is built", "rank 1 is built", "all of it", "a part of it"])
def test_what_only_some_ranks_have_left_is_as_rank_0_has_it(checkpoint, how):
    expected = dict(eager_model().named_parameters())
    if not how.endswith("is built"):
        loaded = [name for name in expected if how == "all of it" or not name.startswith("net.0")]
        expected |= {name: torch.load(checkpoint)[name] for name in loaded}
    results = run_ranks(_initialize_on_some, 2, 2, checkpoint, how)
    for left, told, found, _ in results:
        assert left == (["net.0.weight", "net.0.bias"] if how == "a part of it" else [])
        assert len(told) == (how == "a part of it")
        assert_equal_states(found, expected)
    assert_equal_states(results[0][3], expected)


def _record(rank, world_size):
    from lightning_efficient_init import deferred_init

    fabric = ddp_fabric(world_size)
    with deferred_init():
        model = Regression(24)
    return fabric.setup(model).state_dict()


def test_a_deferred_model_is_built_at_setup():
    for found in run_ranks(_record, 2, 2):
        assert_equal_states(found, eager_model().state_dict())


def _load(rank, world_size, path, how, precision="32-true"):
    fabric = ddp_fabric(world_size, precision)
    with fabric.init_module(empty_init=True):
        model = Regression(24)
    if how == "load_raw, then setup":
        fabric.load_raw(path, model)
        model = fabric.setup(model)
    elif how == "setup, then load_raw":
        model = fabric.setup(model)
        fabric.load_raw(path, model)
    elif how == "load_checkpoint, then setup":
        load_checkpoint(model, path)
        model = fabric.setup(model)
    else:
        model = fabric.setup(model)
        load_checkpoint(model, path)
    return model.state_dict()


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    "how",
    ["load_raw, then setup", "setup, then load_raw", "load_checkpoint, then setup", "setup, then load_checkpoint"],
)
def test_every_rank_holds_what_the_checkpoint_has_whichever_way_it_is_loaded(checkpoint, world_size, how):
    for found in run_ranks(_load, world_size, world_size, checkpoint, how):
        assert_equal_states(found, torch.load(checkpoint))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_what_is_loaded_is_cast(checkpoint, precision):
    expected = Regression(24).to(DTYPES[precision])
    expected.load_state_dict(torch.load(checkpoint))
    for found in run_ranks(_load, 2, 2, checkpoint, "load_raw, then setup", precision):
        for name, parameter in expected.named_parameters():
            assert torch.equal(found[name], parameter)


def _count_bytes(rank, world_size, path, with_setup):
    fabric = ddp_fabric(world_size)
    with fabric.init_module(empty_init=True):
        model = Regression(WIDE)
    if with_setup:
        model = fabric.setup(model)
    before = _rchar()
    report = load_checkpoint(model, path)
    return _rchar() - before, report.num_bytes, report.bytes_per_rank


@pytest.mark.parametrize("with_setup", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_node_reads_each_byte_once_and_each_rank_an_even_share(tmp_path, world_size, with_setup):
    weights = Regression(WIDE).state_dict()
    torch.save(weights, tmp_path / "a.pth")
    total = sum(tensor.nbytes for tensor in weights.values())
    results = run_ranks(_count_bytes, world_size, world_size, tmp_path / "a.pth", with_setup)
    headers = 120_000
    assert sum(read for read, _, _ in results) <= 1.05 * total + headers * world_size
    for read, reported, _ in results:
        assert reported <= read <= 1.05 * reported + headers
        assert reported == pytest.approx(total / world_size, rel=0.05)
    assert {per_rank for _, _, per_rank in results} == {tuple(reported for _, reported, _ in results)}
    assert sum(reported for _, reported, _ in results) == total


def _count_optimizer_bytes(rank, world_size, path):
    fabric = ddp_fabric(world_size)
    with fabric.init_module(empty_init=True):
        model = Regression(WIDE)
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters()))
    before = _rchar()
    fabric.load(path, {"model": model, "optimizer": optimizer})
    read = _rchar() - before
    return read, optimizer.state_dict()["state"]


def test_optimizer_states_are_read_once_on_a_node_too(tmp_path):
    model = Regression(WIDE)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3, 8)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.ckpt")
    results = run_ranks(_count_optimizer_bytes, 2, 2, tmp_path / "a.ckpt")
    assert sum(read for read, _ in results) <= 1.05 * os.path.getsize(tmp_path / "a.ckpt") + 300_000
    for _, state in results:
        for index, expected in optimizer.state_dict()["state"].items():
            for name, value in expected.items():
                assert torch.equal(state[index][name], value)


def _several_nodes(rank, world_size, path, round_bytes):
    from lightning_efficient_init.load import replicas

    replicas.platform.node = lambda: "ab"[rank // 2]
    replicas._ROUND_BYTES = round_bytes
    fabric = ddp_fabric(world_size)
    with fabric.init_module(empty_init=True):
        model = Regression(24)
    report = load_checkpoint(model, path)
    return report.bytes_per_rank, model.state_dict()


@pytest.mark.parametrize("round_bytes", [700, 1 << 20])
def test_each_node_reads_for_itself(checkpoint, round_bytes):
    expected = torch.load(checkpoint)
    total = sum(tensor.nbytes for tensor in expected.values())
    for per_rank, found in run_ranks(_several_nodes, 3, 3, checkpoint, round_bytes):
        assert per_rank[0] + per_rank[1] == per_rank[2] == total
        assert_equal_states(found, expected)


class Awkward(nn.Module):
    """Tensors of no elements, of one, in other orders, overlapping in the file, of dtypes that few backends send."""

    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.rand(0, 3))
        self.scalar = nn.Parameter(torch.rand(()))
        self.complex = nn.Parameter(torch.rand(33, dtype=torch.complex64))
        self.turned = nn.Parameter(torch.rand(50, 30).T)
        self.tied = nn.Linear(30, 50)
        self.head = nn.Linear(30, 50, bias=False)
        self.head.weight = self.tied.weight
        self.large = nn.Parameter(torch.rand(1_100_000))
        self.register_buffer("fp8", torch.rand(1001).to(torch.float8_e4m3fn))
        self.register_buffer("flags", torch.rand(77) > 0.5)
        self.register_buffer("codes", torch.arange(300).to(torch.uint16))


def _load_awkward(rank, world_size, path, round_bytes):
    from lightning_efficient_init.load import replicas

    replicas._ROUND_BYTES = round_bytes
    fabric = ddp_fabric(world_size)
    with fabric.init_module(empty_init=True):
        model = Awkward()
    fabric.load_raw(path, model)
    return model.state_dict()


@pytest.mark.parametrize("round_bytes", [100_000, 1 << 30])
@pytest.mark.parametrize("world_size", [2, 3])
def test_tensors_of_every_kind_are_shared(tmp_path, world_size, round_bytes):
    expected = Awkward().state_dict()
    expected["large"] = torch.rand(2, 1_100_000)[1]
    expected["tied.bias"] = expected["large"][7:57]
    torch.save(expected, tmp_path / "a.pth")
    for found in run_ranks(_load_awkward, world_size, world_size, tmp_path / "a.pth", round_bytes):
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(
                found[name].view(-1).view(torch.uint8) if name == "fp8" else found[name],
                value.view(torch.uint8) if name == "fp8" else value,
            ), name


class Cast(nn.Module):
    """Small tensors that travel together: one as it is in the file, and one that is cast from bytes."""

    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.rand(1000))
        self.register_buffer("fp8", torch.zeros(1000).to(torch.float8_e4m3fn))


def _load_cast(rank, world_size, path):
    fabric = ddp_fabric(world_size)
    with fabric.init_module(empty_init=True):
        model = Cast()
    fabric.load_raw(path, model)
    return model.state_dict()


def test_bytes_that_are_cast_on_the_way_are_shared_as_what_they_became(tmp_path):
    values = {"raw": torch.rand(1000), "fp8": torch.randint(0, 16, (1000,), dtype=torch.uint8)}
    torch.save(values, tmp_path / "a.pth")
    for found in run_ranks(_load_cast, 2, 2, tmp_path / "a.pth"):
        assert torch.equal(found["raw"], values["raw"])
        assert torch.equal(found["fp8"].float(), values["fp8"].float())


def _read_while_sharing(rank, world_size, path):
    """How much this rank has read by the end of a first sharing that takes its time, and how much in all."""
    from lightning_efficient_init.load import load, replicas

    replicas._ROUND_BYTES = 1 << 18
    share, in_first = replicas.Replicas.share, []
    fabric = ddp_fabric(world_size)
    with fabric.init_module(empty_init=True):
        model = Regression(WIDE)
    before = _rchar()

    def share_slowly(self, done):
        ahead = load.max_batches("cpu") * (1 << 18) // world_size
        deadline = time.monotonic() + 20
        while not in_first and _rchar() - before < ahead and time.monotonic() < deadline:
            time.sleep(0.01)
        in_first.append(_rchar() - before)
        share(self, done)

    replicas.Replicas.share = share_slowly
    report = load_checkpoint(model, path)
    return in_first, load.max_batches("cpu") * (1 << 18) // world_size, report.bytes_per_rank, model.state_dict()


def test_threads_read_on_while_what_was_read_is_shared(tmp_path):
    expected = Regression(WIDE).state_dict()
    torch.save(expected, tmp_path / "a.pth")
    total = sum(tensor.nbytes for tensor in expected.values())
    for read, ahead, per_rank, found in run_ranks(_read_while_sharing, 2, 2, tmp_path / "a.pth"):
        assert len(read) == -(-total // (1 << 18))
        assert (1 << 18) / 2 < ahead <= read[0] < total / 2  # as far ahead as it may, no further
        assert sum(per_rank) == total
        assert_equal_states(found, expected)


def _load_in_rounds(rank, world_size, path, accelerator, precision):
    from lightning_efficient_init.load import replicas

    replicas._ROUND_BYTES = 4 << 20
    fabric = ddp_fabric(world_size, precision, accelerator)
    with fabric.init_module(empty_init=True):
        model = _wide_linears()
    load_checkpoint(model, path)
    first = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    load_checkpoint(model, path)  # into memory that the device still writes to
    return first, {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def _wide_linears():
    return nn.ModuleList(nn.Linear(1024, 1024) for _ in range(16))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_what_is_shared_in_many_rounds_is_what_the_file_has(tmp_path, accelerator, precision):
    expected = _wide_linears().state_dict()
    torch.save(expected, tmp_path / "a.pth")
    expected = {name: value.to(DTYPES.get(precision, torch.float32)) for name, value in expected.items()}
    for states in run_ranks(_load_in_rounds, 2, 2, tmp_path / "a.pth", accelerator, precision):
        for found in states:
            assert_equal_states(found, expected)


def _hold_scratch(rank, world_size, path, accelerator):
    from lightning_efficient_init.load import load
    from lightning_efficient_init.sinks import plain

    load.BATCH_BYTES = 1 << 16
    held, peaks = [], []

    class Watched(plain.ScratchSink):
        def segments(self):
            held.append(self.scratch_bytes)
            peaks.append(sum(held))
            return super().segments()

        def finish(self):
            super().finish()
            held.remove(self.scratch_bytes)

    plain.ScratchSink = Watched
    fabric = ddp_fabric(world_size, accelerator=accelerator)
    with fabric.init_module(empty_init=True):
        model = _linears()
    load_checkpoint(model, path)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    return max(peaks), load.max_batches(accelerator) * load.BATCH_BYTES, state


def test_scratch_memory_is_bounded_while_ranks_share(tmp_path, accelerator):
    expected = _linears().state_dict()
    expected |= {name: value.mT.contiguous().mT for name, value in expected.items() if value.ndim == 2}
    torch.save(expected, tmp_path / "a.pth")
    for peak, bound, found in run_ranks(_hold_scratch, 2, 2, tmp_path / "a.pth", accelerator):
        assert bound / 2 < peak <= bound
        assert_equal_states(found, expected)


def _linears():
    return nn.ModuleList(nn.Linear(64, 96) for _ in range(32))


def _different_models(rank, world_size, path):
    fabric = ddp_fabric(world_size)
    with fabric.init_module(empty_init=True):
        model = Regression(24)
    report = load_checkpoint(model, path, key_map={"scale": None} if rank else None, strict=False)
    return report.bytes_per_rank, model.state_dict()["net.0.weight"]


def test_ranks_that_load_different_things_read_for_themselves(checkpoint):
    expected = torch.load(checkpoint)
    total = sum(tensor.nbytes for tensor in expected.values())
    for per_rank, weight in run_ranks(_different_models, 2, 2, checkpoint):
        assert per_rank == (total, total - expected["scale"].nbytes)
        assert torch.equal(weight, expected["net.0.weight"])


def _different_layouts(rank, world_size, path):
    fabric = ddp_fabric(world_size)
    with fabric.init_module():
        model = Regression(24)
    if rank:
        model.net[0].weight.data = model.net[0].weight.data.mT.contiguous().mT
    return load_checkpoint(model, path).bytes_per_rank, model.state_dict()


def test_ranks_whose_memory_is_laid_out_in_different_ways_read_for_themselves(checkpoint):
    expected = torch.load(checkpoint)
    total = sum(tensor.nbytes for tensor in expected.values())
    for per_rank, found in run_ranks(_different_layouts, 2, 2, checkpoint, timeout_s=60):
        assert per_rank == (total, total)
        assert_equal_states(found, expected)


def _load_what_one_rank_lacks(rank, world_size, paths, how, accelerator):
    fabric = ddp_fabric(world_size, accelerator=accelerator)
    with fabric.init_module(empty_init=True):
        model = Regression(WIDE)
    if how == "load_checkpoint":
        load_checkpoint(model, paths[rank])
    else:
        fabric.load(paths[rank], {"model": model, "steps": 0})


@pytest.mark.parametrize("how", ["load_checkpoint", "load"])
@pytest.mark.parametrize("damage", ["lacks a tensor", "is truncated", "is not there"])
def test_a_rank_that_fails_takes_the_others_down_with_its_message(tmp_path, how, damage, accelerator):
    state = Regression(WIDE).state_dict()
    good, bad = tmp_path / "good.ckpt", tmp_path / "bad.ckpt"
    torch.save({"model": state, "steps": 3}, good)
    if damage == "lacks a tensor":
        del state["scale"]
        message = "scale"
    torch.save({"model": state, "steps": 3}, bad)
    if damage == "is not there":
        bad.unlink()
        message = "bad.ckpt"
    elif damage == "is truncated":
        os.truncate(bad, os.path.getsize(bad) // 2)
        message = "bad.ckpt"
    world_size = 3 if accelerator == "cpu" else 2
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(_load_what_one_rank_lacks, world_size, world_size, [good, bad, good], how, accelerator, timeout_s=60)
    lines = [line for line in str(failed.value).splitlines() if line.startswith("lightning_efficient_init.errors.")]
    assert len(lines) == world_size
    assert len(set(lines)) == 1
    assert message in str(failed.value)


def _shrinks_after_the_plan(rank, world_size, path, accelerator):
    from lightning_efficient_init.load import load

    fabric = ddp_fabric(world_size, accelerator=accelerator)
    with fabric.init_module(empty_init=True):
        model = Regression(WIDE)
    plan_load = load.plan_load

    def plan_then_truncate(*args, **kwargs):
        plan = plan_load(*args, **kwargs)
        torch.distributed.barrier()
        if rank == 1:
            os.truncate(path, 3000)
        torch.distributed.barrier()
        return plan

    load.plan_load = plan_then_truncate
    with pytest.raises(CorruptCheckpointError, match=r"a\.pth") as caught:
        load_checkpoint(model, path)
    return str(caught.value)


def test_a_failure_to_read_reaches_every_rank(tmp_path, accelerator):
    torch.save(Regression(WIDE).state_dict(), tmp_path / "a.pth")
    first, second = run_ranks(_shrinks_after_the_plan, 2, 2, tmp_path / "a.pth", accelerator, timeout_s=60)
    assert "the file ends at" in first
    assert "the file ends at" in second


def _lose_the_end(rank, world_size, folder, accelerator):
    """The file ends before what rank 1 reads in its last rounds; all that rank 0 reads is there."""
    from lightning_efficient_init.load import load, replicas

    replicas._ROUND_BYTES = 1 << 16
    fabric = ddp_fabric(world_size, accelerator=accelerator)
    with fabric.init_module():
        model = _linears()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan_load = load.plan_load

    def plan_then_truncate(*args, **kwargs):
        plan = plan_load(*args, **kwargs)
        torch.distributed.barrier()
        if rank == 1:
            os.truncate(folder / "short.pth", os.path.getsize(folder / "short.pth") * 3 // 4)
        torch.distributed.barrier()
        return plan

    load.plan_load = plan_then_truncate
    with pytest.raises(CorruptCheckpointError) as caught:
        load_checkpoint(model, folder / "short.pth")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    load.plan_load = plan_load
    load_checkpoint(model, folder / "whole.pth")
    return str(caught.value), caught.value.written, changed, model.cpu().state_dict()


def test_a_failure_in_the_middle_names_on_every_rank_what_any_of_them_has_written(tmp_path, accelerator):
    expected = _linears().state_dict()
    for name in ("short.pth", "whole.pth"):
        torch.save(expected, tmp_path / name)
    first, second = run_ranks(_lose_the_end, 2, 2, tmp_path, accelerator, timeout_s=60)
    assert first[0] == second[0]
    assert "the file ends at" in first[0]
    for _, written, changed, found in (first, second):
        assert changed
        assert changed <= set(written) < expected.keys()
        assert_equal_states(found, expected)


def _strict(rank, world_size, path):
    fabric = ddp_fabric(world_size)
    model = fabric.setup(Regression(16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StateDictMismatchError, match="Shapes differ") as caught:
        fabric.load_raw(path, model)
    assert_equal_states(model.state_dict(), before)
    return caught.value.mismatched


def test_a_mismatch_is_one_error_with_all_names_and_changes_nothing(checkpoint):
    first, second = run_ranks(_strict, 2, 2, checkpoint)
    assert first == second
    assert first["net.3.weight"] == ((1, 16), (1, 24))


def _train(rank, world_size, strategy, precision, path):
    stock = {"strategy": "ddp", "precision": precision} if strategy == "ddp" else {}
    fabric = ddp_fabric(world_size, efficient_init=precision, **stock)
    with fabric.init_module():
        model = Regression(24)
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), 0.1, eps=1e-3))
    batches = [batch[0] for batch in loader()][rank::world_size]
    losses = [_step(fabric, model, optimizer, batch) for batch in batches[:2]]
    if path is not None:
        fabric.save(path, {"model": model, "optimizer": optimizer})
    losses += [_step(fabric, model, optimizer, batch) for batch in batches[:2]]
    return losses


def _step(fabric, model, optimizer, batch):
    optimizer.zero_grad()
    loss = model(batch).float().square().mean()
    fabric.backward(loss)
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_that_of_stock_ddp(precision):
    ours = run_ranks(_train, 2, 2, "efficient_init_ddp", precision, None)
    assert ours == run_ranks(_train, 2, 2, "ddp", precision, None)


def _resume(rank, world_size, path):
    fabric = ddp_fabric(world_size)
    with fabric.init_module(empty_init=True):
        model = Regression(24)
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), 0.9))
    fabric.load(path, {"model": model, "optimizer": optimizer})
    batches = [batch[0] for batch in loader()][rank::world_size]
    return [_step(fabric, model, optimizer, batch) for batch in batches[:2]]


def test_training_goes_on_after_a_resume_as_without(tmp_path):
    whole = run_ranks(_train, 2, 2, "efficient_init_ddp", "32-true", tmp_path / "a.ckpt")
    resumed = run_ranks(_resume, 2, 2, tmp_path / "a.ckpt")
    assert resumed == [losses[2:] for losses in whole]
