"""Tensors that are still in their file."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch

from lightning_efficient_init.checkpoint import LazyTensor, index_tree, lazy_tree, read_entry
from lightning_efficient_init.deferred import empty_init
from lightning_efficient_init.errors import CheckpointNotFoundError, CorruptCheckpointError

VALUES = torch.arange(24.0).reshape(4, 6)


@pytest.fixture
def index(tmp_path):
    base = VALUES.clone()
    tree = {
        "w": base,
        "tied": base,
        "view": base[1:3].t(),
        "i": torch.tensor(7),
        "n": 3,
        "b": torch.tensor([True, False]),
    }
    torch.save(tree, tmp_path / "a.pt")
    return index_tree(tmp_path / "a.pt").tree


@pytest.fixture
def lazy(index):
    return lazy_tree(index)


def test_it_is_a_tensor_that_knows_what_it_is_without_reading(lazy, index, tmp_path):
    (tmp_path / "a.pt").unlink()
    tensor = lazy["w"]
    assert isinstance(tensor, torch.Tensor)
    assert isinstance(tensor, LazyTensor)
    assert tensor.shape == (4, 6)
    assert (tensor.dtype, tensor.device.type, tensor.stride()) == (torch.float32, "cpu", (6, 1))
    assert (tensor.numel(), tensor.dim(), tensor.ndim, len(tensor), tensor.nbytes) == (24, 2, 2, 4, 96)
    assert tensor.is_contiguous()
    assert not lazy["view"].is_contiguous()
    assert tensor.is_floating_point()
    assert tensor.entry == index["w"]
    assert tensor.detach().entry == index["w"]
    with pytest.raises(CheckpointNotFoundError, match=r"a\.pt"):
        tensor.sum()


def test_ties_are_one_object(lazy):
    assert lazy["w"] is lazy["tied"]
    assert lazy["n"] == 3


def test_operations_run_on_what_is_in_the_file(lazy):
    tensor = lazy["w"]
    assert torch.equal(tensor, VALUES)
    assert torch.equal(tensor + 1, VALUES + 1)
    assert torch.equal(torch.cat([tensor, tensor]), torch.cat([VALUES, VALUES]))
    assert torch.equal(tensor.t(), VALUES.t())
    assert torch.equal(tensor[1:3, ::2], VALUES[1:3, ::2])
    assert torch.equal(tensor.reshape(2, 12), VALUES.reshape(2, 12))
    assert torch.equal(tensor.to(torch.bfloat16), VALUES.to(torch.bfloat16))
    assert torch.equal(tensor @ tensor.t(), VALUES @ VALUES.t())
    assert torch.equal(lazy["view"], VALUES[1:3].t())
    assert torch.equal(torch.stack(list(tensor)), VALUES)
    assert tensor.sum().item() == VALUES.sum().item()
    assert tensor.tolist() == VALUES.tolist()
    assert (tensor.numpy() == VALUES.numpy()).all()
    assert lazy["i"].item() == int(lazy["i"]) == 7
    assert f"{lazy['i']}" == "7"
    assert repr(tensor) == repr(VALUES)
    assert lazy["b"].any()
    assert not torch.isnan(tensor).any()


def test_results_are_plain_tensors_and_conversions_to_the_same_stay_lazy(lazy):
    assert type(lazy["w"] + 1) is torch.Tensor
    assert type(lazy["w"][0]) is torch.Tensor
    assert lazy["w"].float() is lazy["w"]
    assert lazy["w"].to("cpu") is lazy["w"]


def test_it_can_be_copied_into_a_tensor_and_loaded_into_a_module(lazy):
    destination = torch.zeros(4, 6, dtype=torch.float64)
    destination.copy_(lazy["w"])
    assert torch.equal(destination, VALUES.double())
    module = torch.nn.Linear(6, 4, bias=False)
    module.load_state_dict({"weight": lazy["w"]})
    assert type(module.weight.data) is torch.Tensor
    assert torch.equal(module.weight, VALUES)
    module.load_state_dict({"weight": lazy["w"]}, assign=True)
    assert torch.equal(module(torch.ones(1, 6)), torch.nn.functional.linear(torch.ones(1, 6), VALUES))


def test_copies_and_pickles_hold_the_values(lazy, tmp_path):
    for result in (copy.deepcopy(lazy["w"]), pickle.loads(pickle.dumps(lazy["w"])), lazy["w"].clone()):
        assert type(result) is torch.Tensor
        assert torch.equal(result, VALUES)
    for zipped in (True, False):
        content = io.BytesIO()
        torch.save(lazy, content, _use_new_zipfile_serialization=zipped)
        content.seek(0)
        assert torch.equal(torch.load(content)["view"], VALUES[1:3].t())


def test_looking_leaves_the_entry(lazy, index):
    tensor = lazy["w"]
    _ = (
        tensor[1:3],
        tensor.sum(),
        repr(tensor),
        tensor.t(),
        tensor.tolist(),
        torch.equal(tensor, VALUES),
        tensor.clone(),
    )
    assert tensor.entry == index["w"]


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.zero_(),
        lambda t: t.__setitem__(0, 0.0),
        lambda t: t[0].zero_(),
        lambda t: t.t()[:, 0].zero_(),
        lambda t: t.detach().zero_(),
        lambda t: t.data.zero_(),
        lambda t: t.numpy().fill(0),
        lambda t: torch.add(t, t, out=t),
        torch.nn.init.zeros_,
        lambda t: torch._foreach_zero_([t]),
        lambda t: torch._foreach_copy_([t[0], t], [torch.zeros(6), torch.zeros(4, 6)]),
        lambda t: torch._foreach_mul_([t[1:], t.t()], 0.0),
        lambda t: torch._foreach_mul_([t.detach()], 0.0),
        lambda t: torch.ops.aten._foreach_mul.Scalar_out([t], 0.0, out=[t]),
    ],
)
@pytest.mark.parametrize("mode", [nullcontext, empty_init])
def test_writes_are_kept_and_take_the_entry_away(lazy, write, mode):
    tensor = lazy["w"]
    with mode():
        write(tensor)
    assert tensor.entry is None
    assert not torch.equal(tensor, VALUES)
    assert not torch.equal(lazy["tied"], VALUES)
    assert torch.equal(tensor.read(), tensor + 0)


def test_reading_under_a_mode_leaves_the_entry(lazy, index):
    tensor = lazy["w"]
    with empty_init():
        torch._foreach_mul([tensor], 2.0)
        torch._foreach_add_([torch.zeros(4, 6)], [tensor])
        tensor.sum()
    assert tensor.entry == index["w"]


def test_writes_in_inference_mode_are_noticed(lazy):
    with torch.inference_mode():
        lazy["w"][0] = 5.0
    assert lazy["w"].entry is None
    assert (lazy["w"][0] == 5).all()


def test_assigning_data_is_refused_with_the_way_on(lazy):
    with pytest.raises(TypeError, match="put a new tensor in its place"):
        lazy["w"].data = torch.zeros(2)


def test_it_may_become_a_parameter(lazy, index):
    parameter = torch.nn.Parameter(lazy["w"])
    assert isinstance(parameter, torch.nn.Parameter)
    assert parameter.requires_grad
    assert parameter.entry == index["w"]


def test_what_was_saved_as_a_parameter_is_one(tmp_path):
    parameter = torch.nn.Parameter(VALUES)
    torch.save({"p": parameter, "again": parameter, "values": parameter.detach()}, tmp_path / "p.pt")
    lazy = lazy_tree(index_tree(tmp_path / "p.pt").tree)
    assert lazy["p"] is lazy["again"]
    for found in (lazy["p"], copy.deepcopy(lazy["p"]), pickle.loads(pickle.dumps(lazy["p"]))):
        assert isinstance(found, torch.nn.Parameter)
        assert found.requires_grad
        assert torch.equal(found, VALUES)
    assert not isinstance(lazy["values"], torch.nn.Parameter)
    assert not lazy["values"].requires_grad
    assert lazy["p"].entry == lazy["values"].entry


def test_on_the_meta_device_nothing_is_read(index, tmp_path):
    (tmp_path / "a.pt").unlink()
    tensor = lazy_tree(index, "meta")["w"]
    assert tensor.device.type == "meta"
    assert (tensor + 1).shape == (4, 6)


def test_a_file_that_shrank_is_reported(index, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(path.read_bytes()[: index["w"].offset + 10])
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        read_entry(index["w"])
