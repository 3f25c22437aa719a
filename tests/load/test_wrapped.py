"""Wrapped models are loaded as what is inside."""

import lightning as L
import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient_init import load_checkpoint, plan_load


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def path(tmp_path, make_net):
    torch.save(make_net(1).state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt"


def compiled(model):
    return torch.compile(model, backend="eager")


def fabric(model):
    return L.Fabric(accelerator="cpu", devices=1).setup(model)


@pytest.mark.parametrize("wrap", [compiled, fabric, lambda m: fabric(compiled(m)), lambda m: compiled(fabric(m))])
def test_a_compiled_or_fabric_model_is_loaded_by_the_names_inside(wrap, path, make_net, bits):
    net = make_net(2)
    wrapped = wrap(net)
    report = load_checkpoint(wrapped, path)
    assert bits(net) == bits(make_net(1))
    assert report.loaded == tuple(net.state_dict())


def test_a_ddp_model_is_loaded_by_the_names_inside(one_process, path, make_net, bits):
    net = make_net(2)
    for model in (DistributedDataParallel(net), compiled(DistributedDataParallel(net))):
        with torch.no_grad():
            net.embed.weight.zero_()
        load_checkpoint(model, path)
        assert bits(net) == bits(make_net(1))


@pytest.mark.parametrize("wrap", [compiled, fabric])
def test_a_checkpoint_of_a_wrapped_model_loads_into_wrapped_and_plain_ones(wrap, tmp_path, make_net, bits):
    torch.save(wrap(make_net(1)).state_dict(), tmp_path / "w.pt")
    for other in (lambda model: model, compiled, fabric):
        net = make_net(2)
        load_checkpoint(other(net), tmp_path / "w.pt")
        assert bits(net) == bits(make_net(1))


def test_a_part_of_a_model_can_be_loaded_from_its_part_of_a_checkpoint(path, make_net, bits):
    net = make_net(2)
    load_checkpoint(
        net.layers, path, key_map=lambda key: key.removeprefix("layers.") if key.startswith("layers.") else None
    )
    assert bits(net.layers) == bits(make_net(1).layers)
    assert bits(net.embed) == bits(make_net(2).embed)


def test_a_lightning_module_is_loaded_from_its_checkpoint(tmp_path, make_net, bits):
    class Lit(L.LightningModule):
        def __init__(self, seed):
            super().__init__()
            self.net = make_net(seed)

    torch.save({"state_dict": Lit(1).state_dict(), "epoch": 2}, tmp_path / "m.ckpt")
    model = Lit(2)
    load_checkpoint(model, tmp_path / "m.ckpt")
    assert bits(model.net) == bits(make_net(1))
    bare = make_net(3)
    load_checkpoint(bare, tmp_path / "m.ckpt")
    assert bits(bare) == bits(make_net(1))


def test_a_model_deeper_than_the_recursion_limit_is_planned_and_loaded(tmp_path):
    model = inner = nn.Module()
    for _ in range(5000):
        inner.m = nn.Module()
        inner = inner.m
    inner.weight = nn.Parameter(torch.zeros(3))
    torch.save({"m." * 5000 + "weight": torch.ones(3)}, tmp_path / "w.pt")
    assert plan_load(model, tmp_path / "w.pt").missing == ()
    load_checkpoint(model, tmp_path / "w.pt")
    assert inner.weight.tolist() == [1, 1, 1]
