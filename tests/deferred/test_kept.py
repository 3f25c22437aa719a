"""Copies and pickles of empty parameters: none of them leads to memory without values that nobody knows of."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn

from lightning_efficient_init.deferred import (
    UninitializedParameterWarning,
    empty_init,
    has_recipe,
    initialize,
    is_deferred,
    materialize,
    uninitialized_parameters,
    watch,
)
from lightning_efficient_init.errors import DeferredParameterError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 20)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64), requires_grad=False)

    def forward(self, x):
        return self.head(self.norm(self.embedding(x))) * self.scale


NAMES = ["scale", "embedding.weight", "norm.weight", "norm.bias", "head.bias"]


@pytest.fixture
def models(device):
    return build(device)


def build(device):
    """An empty model, and the same one built eagerly."""
    torch.manual_seed(0)
    with device:
        expected = Net()
    torch.manual_seed(0)
    with empty_init(), device:
        found = Net()
    return found, expected


def assert_same(found, expected):
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def reloaded(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def test_a_deep_copy_keeps_recipes_ties_and_attributes(models):
    found, expected = models
    found.scale.tag = ["mine"]
    copied = copy.deepcopy(found)
    assert uninitialized_parameters(copied) == NAMES
    assert copied.head.weight is copied.embedding.weight
    assert copied.head.weight.data_ptr() != found.head.weight.data_ptr()
    assert type(copied.scale) is nn.Parameter
    assert not copied.scale.requires_grad
    initialize(copied)
    assert_same(copied, expected)
    assert uninitialized_parameters(found) == NAMES


def test_a_deep_copy_of_a_deep_copy_keeps_recipes_when_the_others_are_gone(device):
    found, expected = build(device)
    copied = copy.deepcopy(copy.deepcopy(found.head))
    del found
    gc.collect()
    assert uninitialized_parameters(copied) == ["weight", "bias"]
    assert_same(materialize(copied), expected.head)


def test_writing_one_of_two_copies_leaves_the_other_empty(models):
    found, expected = models
    copied = copy.deepcopy(found)
    found.load_state_dict(expected.state_dict())
    assert uninitialized_parameters(found) == []
    assert uninitialized_parameters(copied) == NAMES


def test_the_deep_copy_of_a_watched_model_is_initialized_at_its_own_first_use(models):
    found, expected = models
    watch(found)
    copied = copy.deepcopy(found)
    ids = torch.arange(5, device=expected.head.weight.device)
    with pytest.warns(UninitializedParameterWarning, match="5 parameters .*embedding.weight") as caught:
        result = copied(ids)
    assert len(caught) == 1
    assert torch.equal(result, expected(ids))
    assert uninitialized_parameters(found) == NAMES
    assert not any(module._forward_pre_hooks or module._state_dict_pre_hooks for module in copied.modules())
    found.load_state_dict(expected.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found(ids), result)
        copied(ids)


def test_what_is_empty_in_copies_is_initialized_together_with_the_model_that_they_were_made_of(models):
    found, expected = models
    watch(found)
    average = copy.deepcopy(found)
    others = [copy.deepcopy(average), copy.deepcopy(found.norm), copy.deepcopy(found)]
    others[2].scale.data.fill_(3.0)
    for one, other in zip(average.parameters(), found.parameters(), strict=True):
        swapped = one.data.clone()
        one.data.copy_(other.data)
        other.data.copy_(swapped)
    with pytest.warns(UninitializedParameterWarning, match="5 parameters") as caught:
        found(torch.arange(5, device=expected.head.weight.device))
    assert len(caught) == 1
    assert others[2].scale == 3
    others[2].scale.data.copy_(expected.scale)
    for model in (found, average, others[0], others[2]):
        assert_same(model, expected)
    assert_same(others[1], expected.norm)


def test_the_deep_copy_of_a_part_of_a_watched_model_leaves_the_rest_alone(models):
    found, expected = models
    watch(found)
    copied = nn.Sequential(copy.deepcopy(found.norm), copy.deepcopy(found.head))
    x = torch.ones(2, 6, device=expected.head.weight.device)
    with pytest.warns(UninitializedParameterWarning) as caught:
        result = copied(x)
    assert len(caught) == 2  # nobody watches the whole
    assert torch.equal(result, expected.head(expected.norm(x)))
    assert uninitialized_parameters(found) == NAMES


def test_the_copy_that_an_average_keeps_has_values(models):
    found, expected = models
    watch(found)
    average = torch.optim.swa_utils.AveragedModel(found)
    found.load_state_dict(expected.state_dict())
    average.update_parameters(found)
    assert_same(average.module, expected)


def test_a_shallow_copy_shares_memory_and_keeps_the_recipe(device):
    found, expected = build(device)
    shallow = copy.copy(found.head.bias)
    assert shallow.data_ptr() == found.head.bias.data_ptr()
    assert has_recipe(shallow)
    holder = nn.ParameterDict({"bias": shallow})
    del found
    gc.collect()
    initialize(holder)
    assert torch.equal(shallow, expected.head.bias)


def test_a_shallow_copy_of_a_watched_module_is_initialized_at_first_use(models):
    found, expected = models
    watch(found)
    ids = torch.arange(5, device=expected.head.weight.device)
    with pytest.warns(UninitializedParameterWarning, match="5 parameters"):
        assert torch.equal(copy.copy(found)(ids), expected(ids))


def test_nothing_is_kept_alive(device):
    found, _ = build(device)
    watch(found)
    copies = [copy.deepcopy(found), copy.copy(found), copy.copy(found.scale)]
    refs = [weakref.ref(p) for p in (*found.parameters(), *copies[0].parameters(), copies[2])]
    copies.clear()
    del found
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


@pytest.mark.parametrize("is_watched", [False, True])
@pytest.mark.parametrize("dump", [pickle.dumps, lambda value: torch.save(value, io.BytesIO())])
def test_pickling_an_empty_model_is_refused(models, dump, is_watched):
    found, expected = models
    if is_watched:
        watch(found)
    for value in (found, found.head.bias, dict(found.named_parameters()), nn.ModuleList([found.norm])):
        with pytest.raises(DeferredParameterError, match=r"of shape \(.*\) is empty.*materialize"):
            dump(value)
    found.load_state_dict(expected.state_dict())
    dump(found)


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_model_that_was_loaded_is_pickled_without_a_trace(models, is_watched):
    found, expected = models
    if is_watched:
        watch(found)
    found.scale.tag = "mine"
    found.load_state_dict(expected.state_dict())
    params = reloaded(dict(found.named_parameters()), weights_only=True)
    assert all(torch.equal(params[name], value) for name, value in expected.named_parameters())
    assert params["scale"].tag == "mine"
    assert not any("__deepcopy__" in p.__dict__ for p in params.values())
    again = pickle.loads(pickle.dumps(found))
    assert_same(again, expected)
    again(torch.arange(5, device=expected.head.weight.device))
    assert not any(module._forward_pre_hooks for module in again.modules())


def test_an_initialized_parameter_is_an_ordinary_one_again(models):
    found, _ = models
    initialize(found)
    assert all(not p.__dict__ for p in found.parameters())


def test_copies_inside_a_recording_keep_recipes(models):
    found, expected = models
    with empty_init():
        copied = copy.deepcopy(found)
    assert not is_deferred(copied)
    assert uninitialized_parameters(copied) == NAMES
    assert_same(materialize(copied), expected)


def clones(model):
    copied = Net().to(next(model.parameters()).device)
    copied.load_state_dict({name: value.detach().clone() for name, value in model.state_dict().items()})
    return copied


def forked(model):
    """As `torch.multiprocessing` sends parameters to another process."""
    from multiprocessing.reduction import ForkingPickler

    return pickle.loads(bytes(ForkingPickler.dumps(model)))


@pytest.mark.parametrize("lose_recipes", [clones, forked])
def test_empty_memory_without_a_recipe_is_refused_at_first_use(models, lose_recipes):
    found, expected = models
    if lose_recipes is forked and found.scale.is_cuda:
        pytest.skip("CUDA memory cannot be opened again in the process that sent it")
    lost = lose_recipes(found)
    names = [name for name in NAMES if name != "scale"]  # a single number may have any value
    assert uninitialized_parameters(lost) == names
    with pytest.raises(DeferredParameterError, match=r"'embedding.weight'.*never been written.*recipes"):
        materialize(lost)
    watch(lost)
    ids = torch.arange(5, device=expected.head.weight.device)
    for _ in range(2):
        with pytest.raises(DeferredParameterError, match=r"'embedding.weight'"):
            lost(ids)
        with pytest.raises(DeferredParameterError, match=r"'norm.bias'"):
            lost.state_dict()
    lost.load_state_dict(expected.state_dict())
    assert torch.equal(lost(ids), expected(ids))


def test_empty_memory_that_another_process_has_saved_is_refused_where_nothing_was_recorded(tmp_path):
    with empty_init():
        model = nn.Linear(8, 8)
    torch.save({name: param.detach() for name, param in model.named_parameters()}, tmp_path / "empty.pt")
    script = """
import sys
import torch
from lightning_efficient_init.deferred import watch
model = torch.nn.Linear(8, 8)
model.load_state_dict(torch.load(sys.argv[1]))
watch(model)
model(torch.ones(1, 8))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "empty.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "DeferredParameterError: 'weight', 'bias': the memory of these parameters has never been" in done.stderr


def test_a_call_with_other_parameters_is_no_first_use(models):
    found, expected = models
    watch(found)
    ids = torch.arange(5, device=expected.head.weight.device)
    others = {name: value.detach() for name, value in expected.named_parameters()}
    assert torch.equal(torch.func.functional_call(found, others, (ids,)), expected(ids))
    with pytest.warns(UninitializedParameterWarning, match="5 parameters"):
        assert torch.equal(found(ids), expected(ids))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_first_use_may_be_a_compiled_one(models, backend):
    found, expected = models
    watch(found)
    compiled = torch.compile(found, backend=backend)
    ids = torch.arange(5, device=expected.head.weight.device)
    with pytest.warns(UninitializedParameterWarning, match="5 parameters"):
        result = compiled(ids)
    assert torch.equal(result, expected(ids))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compiled(ids), expected(ids))
