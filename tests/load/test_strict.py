"""Strict is strict: all that does not fit in one error, before anything changes."""

import lightning as L
import pytest
import torch
from torch import nn

from lightning_efficient_init import (
    LoadPlan,
    deferred_init,
    is_deferred,
    load_checkpoint,
    plan_load,
    uninitialized_parameters,
)
from lightning_efficient_init.deferred import empty_init
from lightning_efficient_init.errors import CheckpointError, DeferredParameterError, StateDictMismatchError


@pytest.fixture
def misfit(tmp_path, make_net):
    """A checkpoint with two names missing, two unexpected and two shapes wrong."""
    state = make_net(1).state_dict()
    del state["embed.weight"], state["mask"]
    state |= {"extra.one": torch.ones(1), "extra": torch.ones(2)}
    state |= {"layers.0.weight": torch.ones(24, 17), "scalar": torch.ones(2)}
    torch.save(state, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_one_error_names_all_that_is_missing_unexpected_and_mismatched_and_nothing_changes(misfit, make_net, bits):
    model = make_net(2)
    versions = [tensor._version for tensor in model.state_dict().values()]
    with pytest.raises(StateDictMismatchError) as caught:
        load_checkpoint(model, misfit)
    error = caught.value
    assert error.missing == ("mask", "embed.weight")
    assert error.unexpected == ("extra.one", "extra")
    assert error.mismatched == {"scalar": ((), (2,)), "layers.0.weight": ((24, 16), (24, 17))}
    assert error.written == ()
    for words in [
        *error.missing,
        *error.unexpected,
        *error.mismatched,
        "[24, 16]",
        "[24, 17]",
        str(misfit),
        "strict=False",
    ]:
        assert words in str(error)
    assert isinstance(error, CheckpointError)
    assert isinstance(error, RuntimeError)
    assert bits(model) == bits(make_net(2))
    assert [tensor._version for tensor in model.state_dict().values()] == versions


def test_a_deferred_model_stays_deferred_after_a_misfit(misfit, make_net):
    with deferred_init():
        model = make_net(2)
    with pytest.raises(StateDictMismatchError):
        load_checkpoint(model, misfit)
    assert all(p.is_meta for p in model.parameters())
    assert is_deferred(model)


def test_what_to_do_next_is_not_what_was_done_and_names_who_takes_it(misfit, make_net):
    with pytest.raises(StateDictMismatchError, match=r"load_checkpoint\(model, path, ignore_mismatched=True\)"):
        L.Fabric(accelerator="cpu", devices=1, strategy="efficient_init").load_raw(misfit, make_net())
    with pytest.raises(StateDictMismatchError) as caught:
        load_checkpoint(make_net(), misfit, ignore_mismatched=True)
    assert "ignore_mismatched" not in str(caught.value)
    assert "load_checkpoint(model, path, key_map=...) maps them; with strict=False it" in str(caught.value)


def test_shapes_that_differ_are_an_error_without_strict_too(misfit, make_net, bits):
    model = make_net(2)
    with pytest.raises(StateDictMismatchError) as caught:
        load_checkpoint(model, misfit, strict=False)
    assert set(caught.value.mismatched) == {"scalar", "layers.0.weight"}
    assert "ignore_mismatched=True" in str(caught.value)
    assert bits(model) == bits(make_net(2))


class WithOwnCode(nn.Linear):
    """Has loading code of its own."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("make", [nn.Linear, WithOwnCode])
def test_values_that_are_no_tensors_are_unexpected_by_name(make, key, tmp_path, bits):
    source, expected, model = make(2, 2), make(2, 2), make(2, 2)
    state = {"weight": source.weight.detach(), "epoch": 3, "note": None}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(StateDictMismatchError) as caught:
        load_checkpoint(model, tmp_path / "w.pt")
    assert caught.value.unexpected == ("epoch", "note")
    assert caught.value.missing == ("bias",)
    model.load_state_dict(expected.state_dict())
    report = load_checkpoint(model, tmp_path / "w.pt", strict=False)
    found = expected.load_state_dict(state, strict=False)
    assert report.unexpected == tuple(found.unexpected_keys)
    assert bits(model) == bits(expected)


def test_a_value_that_is_no_tensor_is_an_error_where_the_model_has_one(tmp_path):
    torch.save({"weight": torch.ones(2, 2), "bias": 3}, tmp_path / "w.pt")
    with pytest.raises(StateDictMismatchError, match="bias: expected a tensor, found int"):
        load_checkpoint(nn.Linear(2, 2), tmp_path / "w.pt", strict=False)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_tensor_of_the_model_is_refused_by_name_before_anything_changes(layout, tmp_path):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(2))
            self.register_buffer("edges", torch.eye(3).to_sparse(layout=layout))

    torch.save({"scale": torch.ones(2), "edges": torch.ones(3, 3)}, tmp_path / "w.pt")
    model = Graph()
    for use in (plan_load, load_checkpoint):
        with pytest.raises(StateDictMismatchError, match=rf"edges: expected a dense tensor.*{layout}.*to_dense"):
            use(model, tmp_path / "w.pt")
    assert model.scale.tolist() == [0, 0]
    assert load_checkpoint(model, tmp_path / "w.pt", key_map={"edges": None}, strict=False).loaded == ("scale",)


@pytest.mark.parametrize("context", [deferred_init, empty_init])
def test_exactly_what_the_file_does_not_provide_gets_its_own_initialization(context, misfit, make_net, bits):
    with context():
        model = make_net(2)
    report = load_checkpoint(model, misfit, strict=False, ignore_mismatched=True)
    expected = make_net(2)
    state = torch.load(misfit)
    expected.load_state_dict({k: v for k, v in state.items() if k not in ("scalar", "layers.0.weight")}, strict=False)
    assert bits(model) == bits(expected)
    assert set(report.initialized) == {"embed.weight", "layers.0.weight"}
    assert report.missing == ("mask", "embed.weight")
    assert report.unexpected == ("extra.one", "extra")
    assert set(report.mismatched) == {"scalar", "layers.0.weight"}
    assert "layers.0.weight" not in report.loaded
    assert uninitialized_parameters(model) == []
    assert not is_deferred(model)


def test_a_parameter_that_is_real_keeps_its_value_if_the_file_does_not_provide_it(misfit, make_net):
    model = make_net(2)
    report = load_checkpoint(model, misfit, strict=False, ignore_mismatched=True)
    assert report.initialized == ()
    assert torch.equal(model.embed.weight, make_net(2).embed.weight)


def test_initialization_of_the_rest_draws_what_eager_construction_draws(tmp_path, bits):
    def build():
        return nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8), nn.Linear(8, 8), nn.Embedding(9, 8, padding_idx=2))

    torch.manual_seed(3)
    expected = build()
    after = torch.get_rng_state()
    state = {key: torch.full_like(value, 3) for key, value in expected.state_dict().items() if not key.startswith("2.")}
    torch.save(state, tmp_path / "w.pt")
    expected.load_state_dict(state, strict=False)
    torch.manual_seed(3)
    with deferred_init():
        model = build()
    state_before = torch.get_rng_state()
    report = load_checkpoint(model, tmp_path / "w.pt", strict=False)
    assert report.initialized == ("2.weight", "2.bias")
    assert bits(model) == bits(expected)
    assert torch.equal(torch.get_rng_state(), state_before)
    assert torch.equal(after, state_before)


def test_a_model_on_the_plain_meta_device_is_refused_with_the_remedy(tmp_path, make_net):
    torch.save(make_net(1).state_dict(), tmp_path / "w.pt")
    with torch.device("meta"):
        model = make_net(2)
    with pytest.raises(DeferredParameterError, match=r"'table'.*deferred_init\(\).*to_empty"):
        load_checkpoint(model, tmp_path / "w.pt")
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_planning_works_on_the_meta_device_and_touches_nothing(tmp_path, make_net, bytes_read):
    torch.save(make_net(1).state_dict(), tmp_path / "w.pt")
    with torch.device("meta"):
        model = make_net(2)
    plan = plan_load(model, tmp_path / "w.pt")
    assert isinstance(plan, LoadPlan)
    assert list(plan.entries) == list(model.state_dict())
    assert plan.num_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert plan.missing == plan.unexpected == ()
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_a_buffer_that_is_a_view_of_a_deferred_parameter_is_loaded(tmp_path, bits):
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.register_buffer("row", self.linear.weight.detach()[1])

    source = View()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    with deferred_init():
        model = View()
    load_checkpoint(model, tmp_path / "w.pt")
    assert bits(model) == bits(source)
    with torch.no_grad():
        model.linear.weight[1] = 7
    assert model.row.tolist() == [7, 7, 7]


@pytest.mark.parametrize(("argument", "value"), [("host_buffer_bytes", 1000), ("num_threads", 0)])
def test_settings_that_cannot_work_are_refused_at_once(argument, value, tmp_path, make_net):
    with pytest.raises(ValueError, match=rf"{argument} must be at least .*, found {value}"):
        load_checkpoint(make_net(), tmp_path / "not there.pt", **{argument: value})
