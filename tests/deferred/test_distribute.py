"""Sharded construction: the ranks hold together what one device would hold, whatever their seeds."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_efficient_init import deferred_init, uninitialized_parameters
from lightning_efficient_init.deferred import distribute, is_deferred, postponed_init, share_buffers
from lightning_efficient_init.deferred.sharded import windows
from lightning_efficient_init.errors import DeferredInitError
from lightning_efficient_init.rendezvous import agree

CPU = torch.device("cpu")


class RMSNorm(nn.Module):
    """Without ``reset_parameters``, which stock strategies ask for."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.up = nn.Linear(width, 3 * width + 1, bias=False)
        self.down = nn.Linear(3 * width + 1, width)


class Net(nn.Module):
    """Ties, frozen and empty parameters, dims that no world size divides, buffers of random numbers, late changes."""

    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Embedding(11, width, padding_idx=2)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.none = nn.Parameter(torch.empty(0, 3))
        self.one = nn.Parameter(torch.randn(1))
        self.frozen = nn.Parameter(torch.randn(5, 2).abs_(), requires_grad=False)
        self.from_numpy = nn.Parameter(torch.from_numpy(np.random.rand(4, 3)).float() * np.random.rand())
        self.register_buffer("noise", torch.randn(3))
        self.register_buffer("angles", torch.arange(4) / 3, persistent=False)
        with torch.no_grad():
            for block in self.blocks:
                block.down.weight.mul_(0.5)
                nn.init.trunc_normal_(block.up.weight, std=0.02)


def seed(value):
    torch.manual_seed(value)
    np.random.seed(value)


def eager_state(cast=None):
    seed(1)
    model = Net()
    model = model if cast is None else model.to(cast)
    return {**model.state_dict(), "angles": model.angles}


def shard_blocks(model):
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gathered(model):
    state = {**model.state_dict(), "angles": model.angles}
    return {name: getattr(t, "full_tensor", lambda t=t: t)().detach() for name, t in state.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def _init_sharded(rank, is_empty):
    distributed.init_process_group("gloo")
    seed(1 + rank)
    with deferred_init():
        model = Net()
    model = distribute(model, shard_blocks, CPU, is_empty=is_empty)
    assert model.head.weight is model.embed.weight
    assert not model.frozen.requires_grad
    if is_empty:
        from lightning_efficient_init.deferred import initialize

        own = {name for name, p in model.named_parameters() if p._local_tensor.numel()}
        names = [
            name for name, _ in model.named_parameters() if name in own - {"from_numpy"}
        ]  # which is no initializer's
        assert uninitialized_parameters(model) == names
        initialize(model)
    assert not uninitialized_parameters(model)
    return gathered(model)


@pytest.mark.parametrize("is_empty", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_fully_sharded_parameters_are_those_of_one_device(world_size, is_empty):
    for state in run_ranks(_init_sharded, world_size, is_empty):
        assert_equal(state, eager_state())


class Tables(nn.Module):
    """Parameters that share memory with NumPy, which writes it later, and with each other."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        table = np.zeros((4, 6), dtype=np.float32)
        self.table = nn.Parameter(torch.from_numpy(table), requires_grad=False)
        self.row = nn.Parameter(self.table[1])
        table[:, 0::2] = np.random.rand(4, 3)


def _init_tables(rank, is_optional):
    distributed.init_process_group("gloo")
    seed(1 + rank)
    with postponed_init(is_optional=is_optional):
        model = Tables()
    assert is_deferred(model.table)
    assert is_deferred(model.row)
    model = distribute(model, fully_shard, CPU)
    assert uninitialized_parameters(model) == (["linear.weight", "linear.bias"] if is_optional else [])
    return {name: t.full_tensor().detach() for name, t in model.state_dict().items() if "linear" not in name}


@pytest.mark.parametrize("is_optional", [False, True])
def test_parameters_that_share_memory_with_numpy_are_those_of_rank_0(is_optional):
    seed(1)
    expected = {name: t for name, t in Tables().state_dict().items() if "linear" not in name}
    for state in run_ranks(_init_tables, 2, is_optional):
        assert_equal(state, expected)


def _parallelize(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for block in model.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


class EvenBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 16)
        self.down = nn.Linear(16, 4)


class EvenNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(EvenBlock() for _ in range(2))
        self.out = nn.Linear(4, 3)


def _init_2d(rank):
    distributed.init_process_group("gloo")
    seed(1 + rank)
    with deferred_init():
        model = EvenNet()
    model = distribute(model, _parallelize, CPU)
    return {name: t.full_tensor().detach() for name, t in model.state_dict().items()}


def test_tensor_parallel_and_fully_sharded_parameters_are_those_of_one_device():
    seed(1)
    expected = EvenNet().state_dict()
    for state in run_ranks(_init_2d, 4):
        assert_equal(state, expected)


def _peak(rank):
    """The most that recipes hold at a time."""
    from lightning_efficient_init.deferred import replay

    distributed.init_process_group("gloo")
    with deferred_init():
        model = Net(64)
    most = 0
    memory = replay.Replay.memory

    def watched(self, recipe):
        nonlocal most
        out = memory(self, recipe)
        most = max(most, sum(storage.nbytes() for storage in self._memory.values()))
        return out

    replay.Replay.memory = watched
    largest = max(ref.recipe.num_bytes for ref in windows(model).values())
    distribute(model, shard_blocks, CPU)
    return most, largest


def test_recipes_hold_one_parameter_at_a_time():
    for most, largest in run_ranks(_peak, 2):
        assert most <= 2 * largest


def _initialized_anew(rank):
    model = nn.Linear(3, 3) if rank else nn.Conv1d(3, 3, 3)
    if rank:
        nn.init.normal_(model.weight)
    return model


def _in_another_order(rank):
    layers = [nn.Linear(3, 3, bias=False) for _ in range(2)]
    return nn.Sequential(*layers[:: -1 if rank else 1])


def _after_other_draws(rank):
    torch.rand(rank)
    return nn.Linear(3, 3)


def _record_different_models(rank, build):
    distributed.init_process_group("gloo")
    with deferred_init():
        model = globals()[build](rank)
    with pytest.raises(DeferredInitError) as caught:
        distribute(model, lambda m: m, CPU)
    return str(caught.value)


@pytest.mark.parametrize("build", ["_initialized_anew", "_in_another_order", "_after_other_draws"])
def test_ranks_that_build_different_models_are_told_so(build):
    for message in run_ranks(_record_different_models, 2, build):
        assert "recorded another construction than rank 0" in message


class Graph(nn.Module):
    """Random buffers that are not simply written to."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        numbers = torch.randn(2, 3, dtype=torch.complex64)
        self.register_buffer("sparse", torch.rand(3, 3).gt(0.5).float().to_sparse(), persistent=False)
        self.register_buffer("rows", torch.rand(3, 3).gt(0.5).float().to_sparse_csr())
        self.register_buffer("expanded", torch.rand(1).expand(3))
        self.register_buffer("shown", torch.rand(2, 1))
        self.register_buffer("twice", self.shown.expand(2, 3))
        self.register_buffer("conjugated", numbers.conj())
        self.register_buffer("negated", numbers.conj().imag)
        self.register_buffer("quantized", torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8))


def _buffers(model):
    dense = {name: b.dequantize() if b.is_quantized else b.to_dense() for name, b in model.named_buffers()}
    return {name: buffer.resolve_conj().resolve_neg().clone() for name, buffer in dense.items()}


def _init_graph(rank):
    distributed.init_process_group("gloo")
    seed(1 + rank)
    with deferred_init():
        model = Graph()
    before = dict(model.named_buffers())
    model = distribute(model, fully_shard, CPU)
    for name, buffer in model.named_buffers():
        assert buffer is before[name], name
        assert buffer.layout is {"sparse": torch.sparse_coo, "rows": torch.sparse_csr}.get(name, torch.strided)
    assert model.twice.data_ptr() == model.shown.data_ptr()
    return _buffers(model)


BUFFERS = {
    "of another shape": (lambda rank: torch.ones(2, 3) if rank else torch.ones(3, 3), "found others"),
    "expanded on one": (lambda rank: torch.ones(2, 1).expand(2, 3) if rank else torch.ones(2, 3), "found others"),
    "of a layout without memory": (lambda rank: torch.ones(2, 3).to_mkldnn(), "storage"),
}


def _share_what_cannot_be_shared(rank, kind):
    distributed.init_process_group("gloo")
    model = nn.Module()
    model.register_buffer("odd", BUFFERS[kind][0](rank))
    with pytest.raises((DeferredInitError, RuntimeError)) as failed, agree():
        share_buffers(model)
    return str(failed.value)


@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_that_cannot_be_shared_are_an_error_on_all_ranks(kind):
    for message in run_ranks(_share_what_cannot_be_shared, 2, kind):
        assert BUFFERS[kind][1] in message


@pytest.mark.filterwarnings("ignore::UserWarning")  # some layouts are new, others on their way out
def test_buffers_of_any_layout_are_those_of_rank_0():
    seed(1)
    expected = _buffers(Graph())
    for found in run_ranks(_init_graph, 2):
        assert_equal(found, expected)
