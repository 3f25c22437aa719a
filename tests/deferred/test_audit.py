"""Empty parameters: allocated, recognized, initialized at first use, whichever way they are written."""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lightning_efficient_init import load_checkpoint
from lightning_efficient_init.deferred import (
    UninitializedParameterWarning,
    allocate,
    deferred_init,
    empty_init,
    forget,
    has_recipe,
    initialize,
    is_deferred,
    materialize,
    uninitialized_parameters,
    watch,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 20)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, x):
        return self.head(self.norm(self.embedding(x))) * self.scale


NAMES = ["scale", "frozen", "embedding.weight", "norm.weight", "norm.bias", "head.bias"]


def build(device="cpu", seed=0):
    torch.manual_seed(seed)
    with torch.device(device):
        expected = Net()
    torch.manual_seed(seed)
    with empty_init(), torch.device(device):
        found = Net()
    return found, expected


def assert_same(found, expected):
    assert list(found.state_dict()) == list(expected.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_empty_init_gives_memory_and_keeps_ties_identity_and_requires_grad(device):
    found, expected = build(device)
    assert not is_deferred(found)
    assert all(type(p) is nn.Parameter and p.device.type == device.type for p in found.parameters())
    assert found.head.weight is found.embedding.weight
    assert not found.frozen.requires_grad
    assert uninitialized_parameters(found) == NAMES
    assert all(has_recipe(p) for p in found.parameters())
    assert torch.equal(found.norm.running_var, expected.norm.running_var)


def test_initialize_gives_the_values_of_eager_construction(device):
    found, expected = build(device)
    assert initialize(found, ["head.bias"]) == ["head.bias"]
    assert uninitialized_parameters(found) == [name for name in NAMES if name != "head.bias"]
    assert initialize(found) == [name for name in NAMES if name != "head.bias"]
    assert_same(found, expected)
    assert uninitialized_parameters(found) == []
    assert not any(has_recipe(p) for p in found.parameters())
    assert initialize(found) == []


def _load(found, state):
    found.load_state_dict(state)


def _assign(found, state):
    found.load_state_dict(state, assign=True)


def _copy(found, state):
    with torch.no_grad():
        for name, p in found.named_parameters():
            p.copy_(state[name])


def _data_copy(found, state):
    for name, p in found.named_parameters():
        p.data.copy_(state[name])


def _data(found, state):
    for name, p in found.named_parameters():
        p.data = state[name].clone()


def _index(found, state):
    for name, p in found.named_parameters():
        p.data[...] = state[name]


def _fill(found, state):
    for p in found.parameters():
        nn.init.constant_(p, 0.25)


def _numpy(found, state):
    for name, p in found.named_parameters():
        p.detach().numpy()[...] = state[name].numpy()


@pytest.mark.parametrize("write", [_load, _assign, _copy, _data_copy, _data, _index, _fill])
def test_every_way_of_writing_is_seen(write, device):
    found, expected = build(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(found.eval())
        write(found, expected.state_dict())
        assert uninitialized_parameters(found) == []
        found(torch.arange(5, device=device))
    if write is not _fill:
        assert_same(found, expected)
    assert_unwatched(found)


def test_writing_through_numpy_is_seen():
    found, expected = build()
    _numpy(found, expected.state_dict())
    assert uninitialized_parameters(found) == []


def assert_unwatched(model):
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._state_dict_pre_hooks


@pytest.mark.parametrize(
    "use",
    [
        lambda m, d: m(torch.arange(5, device=d)),
        lambda m, d: m.state_dict(),
        lambda m, d: m.head(torch.ones(2, 6, device=d)),
    ],
)
def test_first_use_initializes_what_nobody_wrote_and_warns_once(use, device):
    found, expected = build(device)
    state = expected.state_dict()
    watch(found)
    found.load_state_dict({"scale": state["scale"], "frozen": state["frozen"]}, strict=False)
    with pytest.warns(UninitializedParameterWarning, match="4 parameters .*embedding.weight.*head.bias") as caught:
        use(found, device)
    assert len(caught) == 1
    assert_unwatched(found)
    assert torch.equal(found.head.weight, expected.head.weight)
    assert torch.equal(found.head.bias, expected.head.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(found, device)


def test_a_first_use_that_fails_is_not_the_last_to_look():
    with empty_init():
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        model[1].bias = nn.Parameter(torch.randn(1 << 45)[:2].clone())  # more than there is memory
    watch(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="allocate"):
            model(torch.ones(1, 3))
        assert "1.bias" in uninitialized_parameters(model)
    model[1].bias.data.fill_(0)
    model(torch.ones(1, 3))
    assert_unwatched(model)


def test_threads_that_use_a_model_at_once_wait_for_its_initialization():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(300, 300) for _ in range(12)])

        def forward(self, x):
            return self.layers(x).sum().item()

    torch.manual_seed(5)
    expected = Deep()(torch.ones(1, 300))
    torch.manual_seed(5)
    with empty_init():
        model = Deep()
    watch(model)
    start = threading.Barrier(4)

    def use(_):
        start.wait()
        return model(torch.ones(1, 300))

    with pytest.warns(UninitializedParameterWarning), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(use, range(4)))
    assert found == [expected] * 4


def test_parameters_beside_those_that_are_lent_are_initialized():
    found, expected = build()
    watch(found)
    lent = {"embedding.weight": torch.ones(20, 6)}  # and with it head.weight
    tokens = torch.arange(5)
    with pytest.warns(UninitializedParameterWarning, match="5 parameters") as caught:
        output = torch.func.functional_call(found.eval(), lent, (tokens,))
    assert len(caught) == 1
    assert torch.equal(output, torch.func.functional_call(expected.eval(), lent, (tokens,)))
    with pytest.warns(UninitializedParameterWarning, match="1 parameters .*embedding.weight"):
        assert torch.equal(found(tokens), expected(tokens))
    assert_unwatched(found)


def loads(found, expected, path):
    torch.save(expected.state_dict(), path)
    load_checkpoint(found, path)


def takes_a_state_dict(found, expected, path):
    found.load_state_dict(expected.state_dict())
    watch(found)
    found.state_dict()


@pytest.mark.parametrize("write", [loads, takes_a_state_dict])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: copy.deepcopy(copy.deepcopy(model))])
def test_copies_of_an_empty_model_have_its_initial_values_once_it_has_others(write, copied, tmp_path):
    found, initial = build()
    other = build(seed=1)[1]
    made = copied(found)
    write(found, other, tmp_path / "a.pth")
    assert_same(made, initial)
    assert_same(found, other)
    assert not uninitialized_parameters(made)


class Student(nn.Module):
    """Keeps from its state dict what it does not train."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.scales = [nn.Parameter(torch.full((4,), 2.0))]
        self.teachers = {"first": (nn.Linear(4, 4), nn.Linear(4, 4))}
        self.teachers["second"] = [copy.deepcopy(self.net)]
        self.__dict__["norm"] = nn.LayerNorm(4)
        shift = nn.Parameter(torch.full((4,), 0.5))
        self.shifted = lambda x: x + shift

    def forward(self, x):
        first, second = self.teachers["first"]
        return self.shifted(self.norm(second(first(self.net(x)))) * self.scales[0] + self.teachers["second"][0](x))


def built_students():
    torch.manual_seed(0)
    expected = Student()
    torch.manual_seed(0)
    with empty_init():
        found = Student()
    return found, expected


def test_parameters_that_are_not_registered_are_initialized_at_first_use():
    found, expected = built_students()
    assert "teachers['first'][1].bias" in uninitialized_parameters(found)
    watch(found)
    with pytest.warns(UninitializedParameterWarning, match=r"'norm\.weight'"):
        assert torch.equal(found(torch.ones(1, 4)), expected(torch.ones(1, 4)))


def test_parameters_that_are_not_registered_are_initialized_when_the_others_are_loaded(tmp_path):
    found, expected = built_students()
    torch.save(expected.state_dict(), tmp_path / "m.pth")
    report = load_checkpoint(found, tmp_path / "m.pth")
    assert "teachers['first'][0].weight" in report.initialized
    assert torch.equal(found(torch.ones(1, 4)), expected(torch.ones(1, 4)))


def test_a_copy_that_nothing_registers_is_as_empty_as_its_original():
    with empty_init():
        model = copy.deepcopy(Net())
    assert uninitialized_parameters(model) == NAMES


class Plain:
    """No module, no container."""

    def __init__(self, *held):
        self.first, *self.others = held


class Guided(nn.Module):
    """Holds what nothing registers, in objects that are no modules."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.teacher = Plain(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval())
        self.rest = Plain(3, nn.Linear(4, 4).weight, copy.deepcopy(self.layer))  # one's module is gone
        self.layer.owner = Plain(self)

    def forward(self, x):
        scale, copied = self.rest.others
        return copied(self.teacher.first(self.layer(x)) @ scale)


def test_what_plain_objects_hold_is_initialized_when_the_others_are_loaded(tmp_path):
    torch.manual_seed(0)
    expected = Guided()
    torch.manual_seed(0)
    with empty_init():
        found = Guided()
    assert uninitialized_parameters(found.layer) == ["weight", "bias"]
    torch.save(expected.state_dict(), tmp_path / "m.pth")
    report = load_checkpoint(found, tmp_path / "m.pth")
    assert {"teacher.first.0.weight", "rest.others[0]"} <= {*report.initialized}
    assert torch.equal(found(torch.ones(1, 4)), expected(torch.ones(1, 4)))


def test_a_module_that_is_found_twice_under_one_name_is_initialized_twice():
    with empty_init():
        model = nn.Module()
        model.inner = nn.Linear(2, 2)
        model.__dict__["inner"] = nn.Linear(2, 2)
    assert initialize(model)[2:] == ["__dict__['inner'].weight", "__dict__['inner'].bias"]
    assert model._modules["inner"].weight.abs().max() < 1
    assert vars(model)["inner"].weight.abs().max() < 1


def test_a_part_does_not_reach_its_whole():
    with empty_init():
        whole = nn.Module()
        whole.part, whole.rest = nn.Linear(2, 2), nn.Linear(2, 2)
        whole.part.owner = [whole]
    initialize(whole.part)
    assert uninitialized_parameters(whole) == ["rest.weight", "rest.bias"]


def test_data_of_any_shape_may_be_an_attribute():
    with empty_init():
        model = nn.Linear(2, 2)
        model.nodes = [{} for _ in range(3000)]
        for node, other in itertools.pairwise(model.nodes):
            node["next"], other["previous"] = other, node
        model.graph = [[] for _ in range(30)]
        for node in model.graph:
            node.extend([*model.graph, 1, "a", None])
        model.graph[0].append(nn.Parameter(torch.ones(2)))
    assert uninitialized_parameters(model) == ["weight", "bias"]


def test_plain_tensors_that_require_gradients_get_their_values_at_once():
    with empty_init():
        holder = nn.Module()
        holder.scale = torch.full((4,), 3.0, requires_grad=True)
    assert holder.scale.tolist() == [3.0] * 4


def test_copies_made_while_a_model_is_recorded_have_its_initial_values_once_it_has_others(tmp_path):
    torch.manual_seed(0)
    expected = nn.Linear(4, 5)
    torch.manual_seed(0)
    with empty_init():
        model = nn.Linear(4, 5)
        average = copy.deepcopy(model)
    torch.save({"weight": torch.ones(5, 4), "bias": torch.ones(5)}, tmp_path / "m.pth")
    load_checkpoint(model, tmp_path / "m.pth")
    assert torch.equal(average.weight, expected.weight)
    assert model.weight.min() == 1


def test_layers_that_are_copies_of_each_other_run_no_initializer(tmp_path):
    with empty_init():
        model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    assert len(uninitialized_parameters(model)) == len(list(model.parameters()))


def test_members_that_are_copies_of_each_other_are_reported_as_initialized(tmp_path):
    with empty_init():
        first = nn.Linear(3, 3)
        model = nn.Sequential(first, copy.deepcopy(first))
    torch.save({"0.weight": torch.ones(3, 3), "0.bias": torch.ones(3)}, tmp_path / "m.pth")
    report = load_checkpoint(model, tmp_path / "m.pth", strict=False)
    assert report.initialized == ("1.weight", "1.bias")


def test_a_parameter_written_in_part_is_reported():
    found, expected = build()
    state = expected.state_dict()
    found.load_state_dict(
        {k: v for k, v in state.items() if k not in ("embedding.weight", "head.weight")}, strict=False
    )
    found.embedding.weight.data[:10] = 1
    watch(found)
    with pytest.warns(UninitializedParameterWarning, match="1 parameters have been written in part only.*embedding"):
        found(torch.arange(5))


def test_allocating_inside_a_recording_keeps_aliases():
    with deferred_init():
        layer = nn.Linear(4, 4)
        view = layer.weight.data.view(-1)
        allocate(layer)
        assert not layer.weight.is_meta
    initialize(layer)
    assert torch.equal(view, layer.weight.view(-1))


def test_a_deferred_model_is_initialized_at_first_use_too():
    torch.manual_seed(0)
    expected = Net()
    torch.manual_seed(0)
    with deferred_init():
        found = Net()
    watch(found)
    assert uninitialized_parameters(found) == NAMES
    with pytest.warns(UninitializedParameterWarning):
        found(torch.arange(5))
    assert torch.equal(found.head.weight, expected.head.weight)


def test_the_warning_is_short_for_many_names():
    with empty_init():
        found = nn.Sequential(*[nn.Linear(2, 2) for _ in range(40)])
    watch(found)
    with pytest.warns(UninitializedParameterWarning, match=r"80 parameters .* and 70 more") as caught:
        found(torch.ones(1, 2))
    assert len(str(caught[0].message)) < 500


def test_memory_that_moved_or_was_cast_is_still_recognized(device):
    found, _ = build()
    found.to(device)
    assert uninitialized_parameters(found) == NAMES
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        found.to(dtype)
        assert uninitialized_parameters(found) == NAMES
    _, expected = build()
    initialize(found)
    assert torch.equal(found.head.weight.cpu(), expected.head.weight)


@pytest.mark.parametrize("sizes", [(8, 3, 3), (3, 8, 1), (1, 2, 2)])
def test_memory_in_another_format_is_still_recognized(sizes, device):
    def build():
        torch.manual_seed(0)
        return nn.Conv2d(*sizes, device=device), nn.Conv2d(*sizes, device=device).to(memory_format=torch.channels_last)

    with empty_init():
        found = nn.ModuleList(build())
    found[0].to(memory_format=torch.channels_last)
    found[1].to(memory_format=torch.contiguous_format)
    assert len(uninitialized_parameters(found)) == 4
    initialize(found)
    for layer, expected in zip(found, build(), strict=True):
        assert torch.equal(layer.weight, expected.weight)
    assert found[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("part", [lambda w: w[:10], lambda w: w[3:], lambda w: torch.cat([w, w])])
def test_a_parameter_made_of_a_part_of_empty_memory_is_reported(part):
    with empty_init():
        found = nn.Linear(16, 16, bias=False)
    found.weight = nn.Parameter(part(found.weight))
    watch(found)
    with pytest.warns(UninitializedParameterWarning, match="parts of what nobody had written.*weight"):
        found(torch.ones(1, found.weight.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 1), (4,), (5,), (7, 11), (3, 4, 5)])
def test_every_dtype_and_shape_holds_the_canary(dtype, shape, device):
    torch.manual_seed(0)
    expected = torch.randn(shape, dtype=dtype, device=device)
    torch.manual_seed(0)
    with empty_init():
        holder = nn.Module()
        holder.weight = nn.Parameter(torch.randn(shape, dtype=dtype, device=device))
    assert uninitialized_parameters(holder) == ["weight"]
    initialize(holder)
    assert torch.equal(holder.weight, expected)


def test_integers_get_their_values_at_once():
    with empty_init():
        holder = nn.Module()
        holder.weight = nn.Parameter(torch.zeros(5, dtype=torch.uint8), requires_grad=False)
    assert uninitialized_parameters(holder) == []
    assert holder.weight.tolist() == [0] * 5


def test_allocate_takes_tensors_and_forget_drops_recipes():
    with deferred_init():
        found = Net()
    allocate(found, tensors=[found.head.bias, found.head.weight])
    assert not found.head.bias.is_meta
    assert found.head.weight is found.embedding.weight
    assert found.scale.is_meta
    forget([found.head.bias])
    assert not has_recipe(found.head.bias)
    assert "head.bias" in uninitialized_parameters(found)  # the memory tells by itself
    assert has_recipe(found.head.weight)


def test_an_exception_allocates_nothing():
    models = []
    with pytest.raises(ZeroDivisionError), empty_init():
        models.append(Net())
        raise ZeroDivisionError
    assert is_deferred(models[0])
    assert materialize(models[0]).scale.item() == 0.5


def test_inside_another_recording_the_outer_one_decides():
    with deferred_init():
        with empty_init():
            found = Net()
        assert is_deferred(found)
    assert is_deferred(found)


def test_a_hundred_thousand_parameters_are_allocated_and_checked():
    with deferred_init():
        found = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(20_000)])
    allocate(found)
    assert len(uninitialized_parameters(found)) == 20_000
    with torch.no_grad():
        found[7].fill_(1)
    assert "7" not in uninitialized_parameters(found)


def test_an_empty_parameter_that_is_materialized_gets_its_values():
    found, expected = build()
    materialize(found)
    assert_same(found, expected)
