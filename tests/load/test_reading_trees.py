"""``read_tree``: optimizer states and other parts of a checkpoint as new tensors."""

import torch
from torch import nn

from lightning_efficient_init.checkpoint import index_tree, lazy_tree
from lightning_efficient_init.load.pipeline import Settings
from lightning_efficient_init.load.tree import read_tree


def trained():
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_an_optimizers_state_is_restored_exactly(device, tmp_path, bits):
    _, optimizer = trained()
    torch.save({"optimizer": optimizer.state_dict(), "n": 3}, tmp_path / "c.pt")
    tree = read_tree(index_tree(tmp_path / "c.pt").tree, device, Settings(host_buffer_bytes=64 << 10))
    assert tree["n"] == 3
    assert tree["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    for number, expected in optimizer.state_dict()["state"].items():
        found = tree["optimizer"]["state"][number]
        assert bits(found) == bits(expected)
        assert found["step"].device.type == "cpu"
        assert found["exp_avg"].device == device
    moved = nn.Linear(5, 4).to(device)
    other = torch.optim.Adam(moved.parameters(), 0.1)
    other.load_state_dict(tree["optimizer"])
    for one, two in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert bits(one) == bits(two)


def test_containers_ties_and_odd_tensors_survive(tmp_path, bits):
    base = torch.randn(4, 6)
    tree = {"a": [base, (base, 1)], "t": base.t(), "none": None, "empty": torch.empty(0, 2), "s": torch.tensor(2)}
    torch.save(tree, tmp_path / "c.pt")
    found = read_tree(index_tree(tmp_path / "c.pt").tree, torch.device("cpu"))
    assert found["a"][0] is found["a"][1][0]
    assert torch.equal(found["a"][0], base)
    assert torch.equal(found["t"], base.t())
    assert found["empty"].shape == (0, 2)
    assert found["s"] == 2
    assert found["none"] is None
    found["a"][0].zero_()
    assert torch.equal(torch.load(tmp_path / "c.pt")["t"], base.t())


def test_lazy_tensors_that_were_edited_are_taken_as_they_are(tmp_path):
    torch.save({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "c.pt")
    lazy = lazy_tree(index_tree(tmp_path / "c.pt").tree)
    lazy["a"][1] = 5
    found = read_tree(lazy, torch.device("cpu"))
    assert found["a"].tolist() == [1, 5, 1]
    assert found["b"].tolist() == [1, 1]
    assert type(found["a"]) is type(found["b"]) is torch.Tensor
