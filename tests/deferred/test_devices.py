"""What depends on the device that is built on: device contexts, and code that looks at devices before it runs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_efficient_init.deferred import (
    deferred_init,
    empty_init,
    initialize,
    is_deferred,
    materialize,
    uninitialized_parameters,
)

aten = torch.ops.aten


def holder(**values):
    module = nn.Module()
    for name, value in values.items():
        setattr(module, name, value)
    return module


def into(func, *args, shape=(3,)):
    out = nn.Parameter(torch.empty(shape))
    func(*args, out=out.data)
    return holder(out=out)


RECURRENT = [
    lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True),
    lambda: nn.GRU(4, 4),
    lambda: nn.RNN(4, 5, bias=False),
]


@pytest.mark.parametrize("build", RECURRENT)
def test_recurrent_layers_are_the_same_and_run_without_a_warning(build, device, same_as_eager):
    found, expected = same_as_eager(build, device)
    x = torch.ones(2, 3, found.input_size, device=device)
    assert torch.equal(found(x)[0], expected(x)[0])


@pytest.mark.parametrize("build", RECURRENT)
def test_empty_recurrent_layers_keep_their_canary_and_recipes(build, device):
    torch.manual_seed(0)
    with device:
        expected = build()
    torch.manual_seed(0)
    with empty_init(), device:
        found = build()
    assert uninitialized_parameters(found) == list(expected.state_dict())
    initialize(found)
    x = torch.ones(2, 3, found.input_size, device=device)
    assert torch.equal(found(x)[0], expected(x)[0])


def load_ones(layer):
    layer.load_state_dict({name: torch.ones_like(weight, device="cuda") for name, weight in layer.named_parameters()})


@pytest.mark.gpu
@pytest.mark.parametrize("finish", [materialize, lambda layer: None, load_ones])
def test_weights_of_recurrent_layers_are_in_one_piece(finish):
    context = deferred_init if finish in (materialize, load_ones) else empty_init
    with context(), torch.device("cuda"):
        layer = nn.LSTM(5, 6)
    finish(layer)
    assert len({weight.untyped_storage().data_ptr() for weight in layer.parameters()}) == 1


def test_recurrent_layers_stay_deferred_when_they_are_cast(device):
    with deferred_init(), device:
        layer = nn.LSTM(5, 6).to(torch.float64)
        copied = copy.deepcopy(layer)
    assert is_deferred(layer)
    layer.to(torch.float32)
    materialize(layer)
    assert torch.equal(layer.weight_hh_l0, materialize(copied).weight_hh_l0.float())


@pytest.mark.parametrize(
    "build",
    [
        lambda: into(torch.randn, 3),
        lambda: into(torch.eye, 3, shape=(3, 3)),
        lambda: into(torch.arange, 3),
        lambda: into(torch.zeros, 3),
        lambda: into(torch.linspace, 0, 1, 3),
        lambda: holder(w=nn.Parameter(nn.init.eye_(torch.empty(3, 3)))),
    ],
)
@pytest.mark.parametrize("outside", [False, True])
def test_factories_write_into_deferred_tensors_under_a_device_context(build, outside, device, same_as_eager):
    def in_context():
        with device:
            return build()

    with device if outside else torch.device("cpu"):
        same_as_eager(in_context if not outside else build, device)


def test_as_tensor_of_a_deferred_tensor_is_the_tensor(device):
    with deferred_init(), device:
        weight = nn.Linear(3, 4).weight.data
        assert torch.as_tensor(weight) is weight
        torch.asarray(weight)[0] = 7
    with device, deferred_init():
        other = nn.Linear(3, 4).weight.data
        assert torch.as_tensor(other, device=device) is other
    assert weight.tolist()[0] == [7, 7, 7]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: functional.dropout(t, 0.4),
        lambda t: torch.dropout(t, 0.4, True),
        lambda t: functional.dropout(t, 0.4, inplace=True),
        lambda t: functional.alpha_dropout(t, 0.4),
        lambda t: functional.dropout1d(t, 0.4),
        lambda t: functional.batch_norm(t, None, None, training=True),
        lambda t: functional.instance_norm(t[None]),
        lambda t: functional.rms_norm(t, t.shape[-1:]),
        lambda t: functional.scaled_dot_product_attention(t[None], t[None], t[None]),
        lambda t: nn.LSTMCell(t.shape[1], 5).to(t.device)(t)[0],
        lambda t: nn.GRUCell(t.shape[1], 5).to(t.device)(t),
        lambda t: nn.MultiheadAttention(t.shape[1], 2, add_zero_attn=True)(t, t, t)[0],
        lambda t: nn.TransformerEncoderLayer(t.shape[1], 2, 8)(t),
    ],
)
def test_functions_that_choose_their_kernel_by_device_give_the_same_values(change, device, same_as_eager):
    def build():
        weight = nn.Parameter(torch.rand(6, 8))
        changed = change(weight.data)
        return holder(weight=weight, changed=changed.detach(), after=nn.Parameter(torch.randn(20)))

    same_as_eager(build, device, all_deferred=False)


def test_batch_norm_with_running_statistics_of_its_own_is_the_same(device, same_as_eager):
    def build():
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
        model(torch.ones(3, 5))
        return model

    same_as_eager(build, device)


@pytest.mark.gpu
def test_a_generator_of_another_device_is_refused_as_ever():
    with pytest.raises(RuntimeError, match="generator"), deferred_init(), torch.device("cuda"):
        torch.randn(3, generator=torch.Generator("cpu"))


def test_no_warning_is_left_out_for_good():
    before = list(warnings.filters)
    with deferred_init():
        layer = nn.LSTM(3, 4)
        layer(torch.ones(2, 1, 3))
    assert list(warnings.filters) == before


class Calls(TorchFunctionMode):
    """Notes what is called, and puts new memory on a device of its own choice."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        kwargs = {**(kwargs or {}), "device": "meta"} if func is torch.zeros else kwargs or {}
        return func(*args, **kwargs)


def test_function_modes_of_others_are_asked():
    with Calls() as calls, deferred_init(), torch.device("cpu"):
        layer = nn.Linear(3, 2)
        zeros = torch.zeros(2)
    assert zeros.is_meta
    assert {"empty", "zeros"} <= set(calls.names)
    assert materialize(layer).weight.device == torch.device("cpu")


class Operations(TorchDispatchMode):
    """Notes which operators are called."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(func)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_of_others_see_every_operation():
    with deferred_init(), Operations() as operations:
        weight = nn.init.normal_(nn.Parameter(torch.empty(20)))
        nn.init.uniform_(weight)
    assert {aten.empty.memory_format, aten.normal_.default, aten.uniform_.default} <= operations.found
    assert is_deferred(weight)
    with deferred_init(), Operations() as operations:
        nn.Linear(3, 2, bias=False)
    assert aten.uniform_.default in operations.found


@pytest.mark.gpu
@pytest.mark.parametrize("number", [0, "cuda"])
def test_a_device_that_was_given_is_not_that_of_the_context(number):
    with torch.device("cpu"), deferred_init():
        assert torch.empty(3, device=number).device == torch.device("cuda", 0)
        assert torch.empty(3).device == torch.device("cpu")
