"""Tied weights: one tensor under several names, in the model, in the file, or in both."""

import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_efficient_init import deferred_init, load_checkpoint, plan_load
from lightning_efficient_init.deferred import empty_init
from lightning_efficient_init.errors import StateDictMismatchError


class Tied(nn.Module):
    def __init__(self, is_tied=True):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("context", [torch.enable_grad, deferred_init, empty_init])
def test_a_tied_model_loads_a_tied_file_once_and_stays_tied(context, tmp_path, bits):
    source = Tied()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    with context():
        model = Tied()
    report = load_checkpoint(model, tmp_path / "w.pt")
    assert model.head.weight is model.embed.weight
    assert bits(model) == bits(source)
    assert report.num_bytes == source.embed.weight.nbytes
    assert report.loaded == ("embed.weight", "head.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_element_of_any_stride_takes_what_others_take_too(dtype, params, tmp_path):
    model = params(a=nn.Parameter(torch.linspace(0, 1, 2)[::2]), b=nn.Parameter(torch.zeros(1)))
    value = torch.ones(1, dtype=dtype)
    torch.save({"a": value, "b": value}, tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt")
    assert [model.a.item(), model.b.item()] == [1, 1]


@pytest.mark.parametrize("lacking", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("context", [torch.enable_grad, deferred_init, empty_init])
def test_a_name_that_the_file_lacks_is_not_missing_if_its_tensor_is_there(context, lacking, tmp_path, bits):
    source = Tied()
    state = {name: tensor for name, tensor in source.state_dict().items() if name != lacking}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    with context():
        model = Tied()
    report = load_checkpoint(model, tmp_path / "m.safetensors")
    assert report.missing == report.initialized == ()
    assert model.head.weight is model.embed.weight
    assert bits(model) == bits(source)


@pytest.mark.parametrize("mmap", [False, True])
def test_an_untied_model_stays_untied_after_a_tied_file(mmap, tmp_path, bits):
    source = Tied()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    model = Tied(is_tied=False)
    report = load_checkpoint(model, tmp_path / "w.pt", mmap=mmap)
    assert bits(model) == bits(source)
    assert report.num_bytes == source.embed.weight.nbytes
    with torch.no_grad():
        model.embed.weight.fill_(7)
    assert torch.equal(model.head.weight, source.head.weight)


def test_of_different_values_for_tied_names_the_last_counts_as_in_load_state_dict(tmp_path, bits):
    source, expected, model = Tied(is_tied=False), Tied(), Tied()
    torch.save(dict(reversed(source.state_dict().items())), tmp_path / "w.pt")
    expected.load_state_dict(source.state_dict())
    load_checkpoint(model, tmp_path / "w.pt")
    assert bits(model) == bits(expected)
    assert torch.equal(model.embed.weight, source.head.weight)


def test_a_tied_tensor_that_is_missing_under_all_names_is_reported_under_each(tmp_path):
    torch.save({"other": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(StateDictMismatchError) as caught:
        plan_load(Tied(), tmp_path / "w.pt")
    assert caught.value.missing == ("embed.weight", "head.weight")


def test_a_missing_tied_tensor_is_initialized_once(tmp_path, bits):
    class Net(Tied):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))

    torch.manual_seed(5)
    expected = Net()
    torch.save({"bias": torch.zeros(3)}, tmp_path / "w.pt")
    torch.manual_seed(5)
    with deferred_init():
        model = Net()
    report = load_checkpoint(model, tmp_path / "w.pt", strict=False)
    assert bits(model) == bits(expected)
    assert model.head.weight is model.embed.weight
    assert set(report.initialized) <= {"embed.weight", "head.weight"}
    assert "embed.weight" in report.initialized


def test_a_module_under_a_thousand_names_is_written_once(tmp_path, bits, bytes_read):
    shared = nn.Linear(64, 64)
    model = nn.ModuleList([shared] * 1000)
    torch.save(nn.ModuleList([nn.Linear(64, 64)] * 1000).state_dict(), tmp_path / "w.pt")
    before = bytes_read()
    report = load_checkpoint(model, tmp_path / "w.pt")
    assert bytes_read() - before < (tmp_path / "w.pt").stat().st_size + 100_000
    assert report.num_bytes == sum(p.nbytes for p in shared.parameters())
    assert bits(model) == bits(torch.load(tmp_path / "w.pt"))
