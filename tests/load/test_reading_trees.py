"""``read_tree``: optimizer states and other parts of a checkpoint as new tensors."""

import copy
import io
import operator
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_efficient_init.checkpoint import Seal, index_tree, lazy_tree
from lightning_efficient_init.load.pipeline import Settings
from lightning_efficient_init.load.tree import ReadWhenUsed, read_tree


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


@pytest.mark.parametrize("weights_only", [True, False], ids=["restricted", "trusted"])
@pytest.mark.parametrize("see", [lambda tree: tree, lazy_tree], ids=["entries", "lazy"])
def test_parameters_come_back_as_parameters_with_the_memory_of_their_detached_selves(tmp_path, weights_only, see):
    net = nn.BatchNorm1d(3)
    net.bias.requires_grad_(False)
    moved = torch.ones(2, requires_grad=True)
    torch.save({"net": dict(net.named_parameters()), "state": net.state_dict(), "t": moved}, tmp_path / "c.pt")
    found = read_tree(see(index_tree(tmp_path / "c.pt", weights_only=weights_only).tree), torch.device("cpu"))
    for name, expected in net.named_parameters():
        assert type(found["net"][name]) is nn.Parameter
        assert found["net"][name].requires_grad == expected.requires_grad
        assert torch.equal(found["net"][name], expected)
    assert {type(value) for value in found["state"].values()} == {torch.Tensor}
    assert not any(value.requires_grad for value in found["state"].values())
    if see is not lazy_tree:
        assert found["state"]["weight"].data_ptr() == found["net"]["weight"].data_ptr()
    assert type(found["t"]) is torch.Tensor
    assert found["t"].requires_grad
    assert found["t"].is_leaf


def test_a_file_that_says_that_integers_require_gradients_is_read(tmp_path):
    torch.save(nn.Parameter(torch.ones(3), requires_grad=True), tmp_path / "c.pt")
    entry = index_tree(tmp_path / "c.pt").tree
    found = read_tree(replace(entry, dtype=torch.int32), torch.device("cpu"))
    assert type(found) is nn.Parameter
    assert not found.requires_grad


def test_lazy_tensors_that_were_edited_are_taken_as_they_are(tmp_path):
    torch.save({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "c.pt")
    lazy = lazy_tree(index_tree(tmp_path / "c.pt").tree)
    lazy["a"][1] = 5
    found = read_tree(lazy, torch.device("cpu"))
    assert found["a"].tolist() == [1, 5, 1]
    assert found["b"].tolist() == [1, 1]
    assert type(found["a"]) is type(found["b"]) is torch.Tensor


def _saved(tree):
    content = io.BytesIO()
    torch.save(tree, content)
    content.seek(0)
    return torch.load(content, weights_only=True)


def _take(rest):
    taken, rest["c"] = rest.pop("a"), 1
    return {"a": taken, **rest} | {"c": torch.ones(3)}


@pytest.mark.parametrize(
    "use",
    [
        dict,
        copy.copy,
        copy.deepcopy,
        lambda rest: {**rest},
        lambda rest: rest | {},
        lambda rest: {} | rest,
        lambda rest: rest.copy(),
        lambda rest: dict(rest.items()),
        lambda rest: dict(zip(rest.keys(), rest.values(), strict=True)),
        lambda rest: {key: rest.get(key) for key in rest},
        lambda rest: {key: rest.setdefault(key, 0) for key in ("a", "b", "c")},
        lambda rest: dict(rest.popitem() for _ in range(len(rest))),
        lambda rest: dict(pickle.loads(pickle.dumps(rest))),
        lambda rest: dict(_saved(rest)),
        lambda rest: dict(_saved({"rest": rest})["rest"]),
        _take,
    ],
)
def test_a_dict_that_reads_when_used_is_used_like_any_other(use, tmp_path, bits):
    expected = {"a": torch.randn(4), "b": [torch.randn(2), "text"], "c": torch.ones(3)}
    torch.save(expected, tmp_path / "c.pt")
    found = index_tree(tmp_path / "c.pt")
    result = use(ReadWhenUsed(found.tree, Seal(found.files)))
    assert type(result) is dict
    assert result.keys() == expected.keys()
    assert torch.equal(result["a"], expected["a"])
    assert bits({"b": result["b"][0], "c": result["c"]}) == bits({"b": expected["b"][0], "c": expected["c"]})
    assert result["b"][1] == "text"


@pytest.mark.parametrize(
    "put", [lambda rest, mine: rest.update(mine), lambda rest, mine: rest.update(**mine), operator.ior]
)
def test_what_is_put_into_a_dict_that_reads_when_used_is_what_comes_out(put, tmp_path):
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "c.pt")
    found = index_tree(tmp_path / "c.pt")
    rest, mine = ReadWhenUsed(found.tree, Seal(found.files)), [torch.zeros(2)]
    put(rest, {"a": mine})
    assert type(rest) is ReadWhenUsed
    assert rest["a"] is mine
    assert rest.popitem()[0] == "b"
    assert rest.popitem() == ("a", mine)
    with pytest.raises(KeyError, match="dictionary is empty"):
        rest.popitem()


def test_a_dict_that_reads_when_used_reads_no_more_than_that(tmp_path, bytes_read):
    torch.save({"a": torch.ones(50_000), "b": torch.ones(2)}, tmp_path / "c.pt")
    found = index_tree(tmp_path / "c.pt")
    rest = ReadWhenUsed(found.tree, Seal(found.files))
    before = bytes_read()
    assert rest["b"].tolist() == [1, 1]
    assert "a" in rest
    assert list(rest) == ["a", "b"]
    assert len(rest) == 2
    del rest["a"]
    assert rest.get("a", 7) == 7
    assert bytes_read() - before < 50_000
    assert rest == {"b": rest["b"]}
    assert repr(rest) == "{'b': tensor([1., 1.])}"
