"""What happens under deferred_init: values, aliases, generators, exceptions, threads, refusals."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import nn

from lightning_efficient_init import load_checkpoint
from lightning_efficient_init.deferred import (
    deferred_init,
    eager,
    empty_init,
    has_recipe,
    initialize,
    is_deferred,
    materialize,
)
from lightning_efficient_init.errors import DeferredParameterError, UnrecordableError


def built_deferred(make, path):
    with deferred_init():
        return materialize(make())


def built_later(make, path):
    with deferred_init():
        model = make()
    return materialize(model)


def built_empty(make, path):
    with empty_init():
        model = make()
    initialize(model)
    return model


def loaded_empty(make, path):
    with empty_init():
        model = make()
    load_checkpoint(model, path)
    return model


def loaded_deferred(make, path):
    with deferred_init():
        model = make()
    load_checkpoint(model, path)
    return model


class EverythingAtOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.randn(16) * 0.02)
        self.gate = nn.Parameter(torch.zeros(1))
        self.temperature = nn.Parameter(torch.tensor(2.6592))
        self.decay = nn.Parameter(torch.log(torch.arange(1, 17).float().repeat(3, 1)))
        self.frozen = nn.Parameter(torch.rand(4), requires_grad=False)
        self.late = nn.Parameter(torch.empty(3, 5))
        self.late.data = torch.rand(4, 5) * 2
        self.register_buffer("frequencies", 1.0 / 10000 ** (torch.arange(0, 16, 2).float() / 16), persistent=False)
        self.register_buffer("noise", torch.randn(9))
        self.register_buffer("filled", torch.empty(4))
        self.filled.uniform_()
        self.rates = [x.item() for x in torch.linspace(0, 0.3, 4)]
        self.plain = torch.randn(3)
        self.nested = {"a": [torch.rand(2), torch.zeros(2)]}
        self.coin = torch.rand(1).item() < 0.5
        self.branch = nn.Linear(3, 4) if self.coin else nn.Linear(4, 3)
        self.shape = tuple(self.embedding.weight.shape)
        self.where = str(self.embedding.weight.device)
        self.apply(self._init)
        with torch.no_grad():
            self.embedding.weight[3].fill_(0)
            self.embedding.weight.data[4, 2:5] = 7
            self.embedding.weight[torch.tensor([8, 9])] = 1.5
            self.branch.weight.copy_(torch.arange(12.0).view_as(self.branch.weight))

    def _init(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)


def test_everything_at_once_is_the_same_as_eager(device, same_as_eager):
    found, _ = same_as_eager(EverythingAtOnce, device)
    assert found.head.weight is found.embedding.weight


def test_several_models_in_one_context_and_one_after_the_other_are_the_same(device, same_as_eager):
    same_as_eager(lambda: nn.ModuleList([nn.Linear(30, 40), nn.LSTM(3, 4), nn.Linear(30, 40)]), device)
    torch.manual_seed(0)
    expected = [nn.Linear(30, 40), nn.Linear(30, 40)]
    torch.manual_seed(0)
    with deferred_init():
        first = nn.Linear(30, 40)
    with deferred_init():
        second = nn.Linear(30, 40)
    assert torch.equal(materialize(second).weight, expected[1].weight)
    assert torch.equal(materialize(first).weight, expected[0].weight)


def test_a_part_alone_has_the_values_it_has_in_the_whole():
    torch.manual_seed(1)
    expected = EverythingAtOnce()
    torch.manual_seed(1)
    with deferred_init():
        found = EverythingAtOnce()
    materialize(found.branch)
    assert found.embedding.weight.is_meta
    assert torch.equal(found.branch.weight, expected.branch.weight)
    assert torch.equal(found.branch.bias, expected.branch.bias)
    materialize(found.head)
    assert torch.equal(found.embedding.weight, expected.embedding.weight)
    materialize(found)
    assert torch.equal(found.scale, expected.scale)


def test_a_large_module_in_the_middle_is_skipped_by_arithmetic_and_changes_nothing():
    def build():
        big = nn.Linear(4000, 3000)
        return nn.Sequential(big, nn.Linear(5, 6))

    torch.manual_seed(1)
    expected = build()
    after = torch.get_rng_state()
    torch.manual_seed(1)
    with deferred_init():
        found = build()
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(materialize(found[1]).weight, expected[1].weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_is_the_one_at_construction(dtype, device, same_as_eager):
    def build():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30))
        finally:
            torch.set_default_dtype(before)

    found, _ = same_as_eager(build, device)
    assert found[0].weight.dtype == dtype


class Normalized(nn.Module):
    """Norms of deferred values: their statistics, which hardly anybody keeps, have other dtypes on the meta device."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.seen = self.net(torch.ones(2, 4)).detach()
        self.norms = nn.ParameterList([nn.functional.layer_norm(torch.randn(3, 4), (4,))])
        self.norms.append(nn.functional.instance_norm(torch.randn(2, 3, 5)))
        self.statistics = torch.native_layer_norm(torch.randn(3, 4), (4,), None, None, 1e-5)


def test_norms_in_half_precision_are_the_same(device, same_as_eager):
    def build():
        torch.set_default_dtype(torch.bfloat16)
        try:
            return Normalized()
        finally:
            torch.set_default_dtype(torch.float32)

    same_as_eager(build, device)


class Counts(nn.Module):
    """Integers that become numbers of the default dtype, in operations of several kinds."""

    def __init__(self):
        super().__init__()
        steps = torch.arange(1, 513)
        self.divided, self.scaled = nn.Parameter(steps / 7), nn.Parameter(steps * 0.3)
        self.log = nn.Parameter(torch.log(steps))
        self.compared = nn.Parameter((steps > 256.4).to(torch.get_default_dtype()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("build", [built_deferred, built_empty])
def test_the_default_dtype_at_replay_does_not_count(build, dtype):
    def make():
        torch.set_default_dtype(dtype)
        try:
            return Counts()
        finally:
            torch.set_default_dtype(torch.float32)

    found, expected = build(make, None), make()
    for name, param in expected.named_parameters():
        assert found.get_parameter(name).dtype == param.dtype, name
        assert torch.equal(found.get_parameter(name), param), name
    assert torch.get_default_dtype() == torch.float32


def test_autocast_at_replay_does_not_count():
    def make():
        return nn.ParameterList([torch.randn(20, 4) @ torch.randn(4, 20)])

    torch.manual_seed(2)
    expected = make()
    torch.manual_seed(2)
    with deferred_init():
        found = make()
    with torch.autocast("cpu", torch.bfloat16):
        materialize(found)
    assert torch.equal(found[0], expected[0])


def test_materialize_casts_parameters_and_leaves_buffers():
    with deferred_init():
        found = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    materialize(found, dtype=torch.bfloat16)
    assert found[0].weight.dtype == found[1].weight.dtype == torch.bfloat16
    assert found[1].running_mean.dtype == torch.float32


def test_a_cast_keeps_views_ties_and_identity():
    with deferred_init():
        found = Views()
    whole = found.whole
    materialize(found, dtype=torch.bfloat16)
    assert found.whole is whole
    assert found.flat.dtype == torch.bfloat16
    found.flat[0] = 42
    assert whole[0, 0] == 42


def test_copies_of_layers_are_copies_of_their_values(device, same_as_eager):
    def build():
        layer = nn.Linear(6, 7)
        copies = nn.ModuleList([copy.deepcopy(layer) for _ in range(3)])
        copies[1].weight.data.mul_(2)
        return copies

    same_as_eager(build, device)


def test_a_deep_copy_after_the_recording_is_deferred_too():
    with deferred_init():
        found = nn.Sequential(nn.Linear(6, 7))
    twin = copy.deepcopy(found)
    assert is_deferred(twin)
    materialize(twin)
    assert found[0].weight.is_meta
    assert torch.equal(materialize(found)[0].weight, twin[0].weight)


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.whole = nn.Parameter(torch.randn(6, 4))
        self.part = self.whole.detach()[2:4]
        self.flat = self.whole.data.view(-1)
        self.part.fill_(3)


class TrainsThroughViews(nn.Module):
    """Kept views that pass gradients on, and hooks on the gradient."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12, bias=False)
        self.q, self.transposed = self.qkv.weight[:4], self.qkv.weight.t()
        self.qkv.weight.register_hook(lambda grad: grad * 2)
        self.steps = []
        self.qkv.weight.register_post_accumulate_grad_hook(lambda param: self.steps.append(param.grad.sum().item()))

    def forward(self, x):
        return nn.functional.linear(x, self.q).sum() + (self.transposed @ torch.ones(12, device=x.device)).sum()


@pytest.mark.parametrize("build", [built_deferred, built_empty, loaded_empty, loaded_deferred])
def test_views_and_hooks_take_part_in_training(build, device, tmp_path):
    torch.manual_seed(2)
    with device:
        expected = TrainsThroughViews()
    torch.save(expected.state_dict(), tmp_path / "a.pth")
    torch.manual_seed(2)
    with device:
        found = build(TrainsThroughViews, tmp_path / "a.pth")
    for model in (found, expected):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            model(torch.ones(1, 4, device=device)).backward()
            optimizer.step()
    assert found.steps == expected.steps
    assert len(found.steps) == 2
    assert torch.equal(found.q, expected.qkv.weight[:4])


def test_views_of_parameters_stay_views(device, same_as_eager):
    found, _ = same_as_eager(Views, device)
    found.flat[0] = 42
    assert found.whole[0, 0] == 42
    assert found.part.untyped_storage().data_ptr() == found.whole.untyped_storage().data_ptr()


class SharesRealMemory(nn.Module):
    def __init__(self):
        super().__init__()
        start = torch.zeros(5)
        self.weight = nn.Parameter(start)
        start.fill_(2)
        with torch.no_grad():
            self.weight.add_(torch.rand(5))
        self.seen = start.clone()
        nn.init.normal_(self.weight)
        self.start = start


def test_the_tensor_a_parameter_was_made_of_sees_what_is_written_through_the_parameter(device, same_as_eager):
    same_as_eager(SharesRealMemory, device)


def test_identity_optimizers_and_weak_references_survive():
    with deferred_init():
        model = nn.Linear(4, 3)
    weight = model.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = weakref.ref(weight)
    materialize(model)
    assert model.weight is weight
    assert reference() is weight
    assert type(weight) is nn.Parameter
    model(torch.ones(2, 4)).sum().backward()
    before = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, weight)


def test_generators_seeded_forked_and_given_inside_are_followed(device, same_as_eager):
    def build():
        first = nn.Linear(5, 6)
        with torch.random.fork_rng(devices=[0] if device.type == "cuda" else []):
            torch.manual_seed(11)
            second = nn.Linear(5, 6)
        third = nn.Linear(5, 6)
        state = torch.get_rng_state()
        fourth = nn.Linear(5, 6)
        torch.set_rng_state(state)
        fifth = nn.Linear(5, 6)
        torch.manual_seed(99)
        generator = torch.Generator(device).manual_seed(4)
        sixth = nn.Parameter(torch.empty(40, device=device).normal_(generator=generator))
        seventh = nn.Parameter(torch.randn(30, generator=generator, device=device))
        eighth = nn.Parameter(torch.empty(40, device=device))
        nn.init.uniform_(nn.init.normal_(eighth, generator=generator), -3, 3, generator=generator)
        layers = nn.ModuleList([first, second, third, fourth, fifth])
        layers.sixth, layers.seventh, layers.eighth = sixth, seventh, eighth
        layers.drawn = torch.rand(2, generator=generator, device=device)
        return layers

    same_as_eager(build, device)


def test_draws_after_the_recording_are_those_after_eager_construction():
    torch.manual_seed(5)
    nn.Linear(7, 8)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with deferred_init():
        nn.Linear(7, 8)
    assert torch.equal(torch.rand(4), expected)


def test_eager_builds_for_real_and_in_place_of_the_stream():
    torch.manual_seed(5)
    expected = nn.ModuleList([nn.Linear(7, 8), nn.Linear(7, 8), nn.Linear(7, 8)])
    torch.manual_seed(5)
    with deferred_init():
        found = nn.ModuleList([nn.Linear(7, 8)])
        with eager():
            found.append(nn.Linear(7, 8))
            assert not is_deferred(found[1])
        found.append(nn.Linear(7, 8))
    materialize(found)
    for layer, other in zip(found, expected, strict=True):
        assert torch.equal(layer.weight, other.weight)
        assert torch.equal(layer.bias, other.bias)


def test_eager_without_a_recording_does_nothing():
    with eager():
        assert not nn.Linear(2, 2).weight.is_meta


def test_contexts_nest():
    with deferred_init():
        outer = nn.Linear(2, 2)
        with deferred_init():
            inner = nn.Linear(2, 2)
        assert is_deferred(inner)
        after = nn.Linear(2, 2)
    assert is_deferred(outer)
    assert is_deferred(after)
    assert not nn.Linear(2, 2).weight.is_meta


def test_values_may_be_asked_for_in_a_nested_recording():
    def build():
        layer = nn.Linear(3, 4)
        layer.array = layer.weight.detach().numpy().tolist()
        layer.has_positive = bool((layer.weight > 0).any())
        layer.sum = layer.weight.sum().item()
        return layer

    torch.manual_seed(3)
    expected = build()
    torch.manual_seed(3)
    with deferred_init(), deferred_init():
        found = build()
    assert is_deferred(found)
    assert (found.array, found.has_positive, found.sum) == (expected.array, expected.has_positive, expected.sum)
    assert torch.equal(materialize(found).weight, expected.weight)


def _lazy(make, sample):
    layer = make()
    layer(sample)
    return layer


def _materialized_by_hand():
    module = nn.Module()
    module.weight = nn.UninitializedParameter()
    module.weight.materialize((3, 2))
    nn.init.normal_(module.weight)
    return module


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    "build",
    [
        lambda: _lazy(lambda: nn.LazyLinear(4), torch.ones(2, 3)),
        lambda: _lazy(lambda: nn.LazyLinear(4).double(), torch.ones(2, 3).double()),
        lambda: _lazy(lambda: copy.deepcopy(nn.LazyConv1d(4, 2)), torch.ones(2, 3, 5)),
        lambda: _lazy(nn.LazyBatchNorm1d, torch.arange(6.0).view(2, 3)),
        _materialized_by_hand,
    ],
)
def test_lazy_modules_may_run_in_a_nested_recording(build, depth):
    torch.manual_seed(3)
    expected = build().state_dict()
    after = torch.rand(2)
    torch.manual_seed(3)
    with ExitStack() as stack:
        for _ in range(depth):
            stack.enter_context(deferred_init())
        found = build()
    assert is_deferred(found)
    assert torch.equal(torch.rand(2), after)
    for name, value in materialize(found).state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name])


def test_statistics_that_a_batch_norm_updates_go_on_from_what_they_were():
    with deferred_init():
        mean, variance = torch.empty(3).fill_(2), torch.empty(3).fill_(1)
        nn.functional.batch_norm(torch.ones(2, 3), mean, variance, training=True, momentum=0.5)
        del variance
    assert torch.equal(mean, torch.full((3,), 1.5))


def test_an_exception_restores_everything_and_leaves_the_generator_right():
    new = nn.Parameter.__dict__["__new__"]
    trunc = nn.init._no_grad_trunc_normal_
    torch.manual_seed(3)
    nn.Linear(3, 4)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with pytest.raises(ZeroDivisionError), deferred_init():
        nn.Linear(3, 4)
        raise ZeroDivisionError
    assert nn.Parameter.__dict__["__new__"] is new
    assert nn.init._no_grad_trunc_normal_ is trunc
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.empty(3).is_meta
    assert not nn.Linear(3, 4).weight.is_meta
    assert not nn.modules.module._global_parameter_registration_hooks


def test_each_thread_records_for_itself():
    outcome = {}
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait(10)
        outcome["deferred"] = is_deferred(nn.Linear(3, 4))
        with deferred_init():
            outcome["own"] = nn.Linear(3, 4)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with deferred_init():
        model = nn.Linear(3, 4)
        inside.set()
        done.wait(10)
        again = nn.Linear(3, 4)
    thread.join()
    assert outcome["deferred"] is False
    assert is_deferred(outcome["own"])
    weights = [materialize(m).weight for m in (model, again, outcome["own"])]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[2], weights[1])


def test_recording_ten_threads_at_once_leaves_nothing_behind():
    def build(results, index):
        with deferred_init():
            results[index] = nn.Sequential(*[nn.Linear(5, 5) for _ in range(20)])

    results = {}
    threads = [threading.Thread(target=build, args=(results, i)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = set()
    for model in results.values():
        materialize(model)
        seen |= {layer.weight.sum().item() for layer in model}
    assert len(seen) == 200
    assert not nn.Linear(3, 4).weight.is_meta


def test_numpy_code_in_a_constructor_works():
    class Sinusoid(nn.Module):
        def __init__(self):
            super().__init__()
            table = torch.zeros(8, 6)
            table.numpy()[:] = np.sin(np.arange(48).reshape(8, 6))
            self.weight = nn.Parameter(table)
            self.other = nn.Parameter(torch.empty(8, 6))
            self.other.data.copy_(torch.from_numpy(np.cos(np.arange(48).reshape(8, 6))))

    expected = Sinusoid()
    with deferred_init():
        found = Sinusoid()
    materialize(found)
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.other, expected.other)


def test_parameters_made_of_numpy_arrays_see_what_is_written_to_these_later(same_as_eager):
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.other, self.third = (np.zeros((2, 4), dtype=np.float32) for _ in range(3))
            self.positions = nn.Parameter(torch.from_numpy(self.table), requires_grad=False)
            self.row = nn.Parameter(torch.from_numpy(self.table)[1])
            self.embedding = nn.Embedding(2, 4)
            self.embedding.weight.data = torch.as_tensor(self.other)
            self.computed = nn.Parameter(torch.from_numpy(self.third) + 1)
            self.copied = nn.Parameter(torch.tensor(self.third))
            for table in (self.table, self.other, self.third):
                table[:, 0::2] = 1.0
            with torch.no_grad():
                self.row.mul_(3)

    found, _ = same_as_eager(Tables, all_deferred=False)
    assert found.computed.tolist() == [[1.0] * 4] * 2
    with empty_init():
        found = Tables()
    assert found.positions.tolist() == [[1.0, 0.0, 1.0, 0.0], [3.0, 0.0, 3.0, 0.0]]
    assert found.embedding.weight.tolist() == [[1.0, 0.0, 1.0, 0.0]] * 2
    assert found.copied.tolist() == [[0.0] * 4] * 2


def test_the_values_of_deferred_tensors_can_be_read_while_recording():
    torch.manual_seed(2)
    layer = nn.Linear(3, 4)
    expected = layer.weight.tolist(), layer.weight.detach().numpy().sum(), layer.weight.norm().item(), repr(layer.bias)
    torch.manual_seed(2)
    with deferred_init():
        layer = nn.Linear(3, 4)
        found = layer.weight.tolist(), layer.weight.detach().numpy().sum(), layer.weight.norm().item(), repr(layer.bias)
        with pytest.raises(ValueError, match="read-only"):
            layer.weight.detach().numpy()[0] = 1
    assert found == expected


def test_metadata_asked_during_construction_is_that_of_eager_construction(device):
    with deferred_init(), device:
        weight = nn.Linear(3, 4).weight
        assert weight.device.type == device.type
        assert not weight.is_meta
        assert weight.is_cuda == (device.type == "cuda")
        assert torch.zeros(2, device=weight.device).device.type == device.type
        assert weight.new_zeros(3).tolist() == [0, 0, 0]
        assert torch.ones_like(weight).sum().item() == 12
        assert weight.to(weight.device) is weight
    assert weight.is_meta


def test_genuine_meta_tensors_stay_what_they_are():
    with deferred_init():
        layer = nn.Linear(2, 3, device="meta")
        with torch.device("meta"):
            other = nn.Linear(2, 3)
        numbered = nn.Linear(2, 3, device="meta:0")
    assert not is_deferred(layer)
    assert not is_deferred(other)
    assert not is_deferred(numbered)
    assert layer.weight.is_meta
    with pytest.raises(DeferredParameterError, match="without a recipe"):
        materialize(layer)


class KeepsTheShape(nn.Module):
    """As ensembles are built in PyTorch's tutorial: parameters are stacked, and one module is called with them."""

    def __init__(self, move):
        super().__init__()
        self.models = nn.ModuleList(nn.Linear(2, 3) for _ in range(2))
        self.kept = self.models[0].weight
        self.base = (move(copy.deepcopy(self.models[0])),)
        self.where = str(self.base[0].weight.device)
        self.moved = nn.Linear(2, 3)
        self.before = self.moved.weight
        self.moved_away = (move(self.moved),)
        del self.moved


@pytest.mark.parametrize(
    "move", [lambda m: m.to("meta"), lambda m: m.to("meta", torch.float16), lambda m: m.to_empty(device="meta")]
)
def test_what_is_moved_to_the_meta_device_stays_there(move, same_as_eager):
    found, _ = same_as_eager(lambda: KeepsTheShape(move))
    assert found.where == "meta"
    for base in (*found.base, *found.moved_away):
        assert type(base.weight) is nn.Parameter
        assert base.weight.is_meta
        assert not has_recipe(base.weight)


class KeepsElsewhere(nn.Module):
    """Tensors that require gradients in a list, in a plain object, and in a closure."""

    def __init__(self):
        super().__init__()
        self.models = nn.ModuleList(nn.Linear(2, 3) for _ in range(2))
        self.stacked = list(torch.func.stack_module_state(list(self.models))[0].values())
        self.prior = torch.distributions.Normal(nn.Parameter(torch.randn(2)), 1.0)
        scale = torch.randn(3, requires_grad=True)
        self.scale = lambda: scale
        self.doubled = [self.models[0].weight * 2]

    def kept(self):
        return [*self.stacked, self.prior.loc, self.scale(), *self.doubled]


@pytest.mark.parametrize("build", [built_empty, built_later])
def test_what_requires_gradients_has_its_values_wherever_it_is_kept(build):
    torch.manual_seed(2)
    expected = KeepsElsewhere()
    torch.manual_seed(2)
    found = build(KeepsElsewhere, None)
    for one, other in zip(found.kept(), expected.kept(), strict=True):
        assert type(one) is type(other)
        assert one.requires_grad
        assert torch.equal(one, other)


def test_what_one_model_keeps_in_a_list_is_cast_with_it_though_another_one_came_first():
    with deferred_init():
        first, second = nn.Linear(2, 3), nn.Linear(2, 3)
        second.scales = [nn.Parameter(torch.randn(3))]
    materialize(first, dtype=torch.float64)
    assert second.scales[0].dtype == torch.float32
    assert materialize(second, dtype=torch.float16).scales[0].dtype == torch.float16


def test_the_garbage_collector_waits_until_the_recording_ends():
    assert gc.isenabled()
    with deferred_init():
        assert not gc.isenabled()
        with deferred_init():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_recipes_die_with_their_parameters():
    with deferred_init():
        model = nn.Linear(3, 4)
    assert has_recipe(model.weight)
    storage = weakref.ref(model.weight.untyped_storage())
    del model
    gc.collect()
    assert storage() is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_parameters_of_integers_are_the_same(dtype, same_as_eager):
    def build():
        holder = nn.Module()
        holder.weight = nn.Parameter(torch.randint(0, 2, (5, 6)).to(dtype), requires_grad=False)
        holder.zeros = nn.Parameter(torch.zeros(5, dtype=dtype), requires_grad=False)
        return holder

    same_as_eager(build, all_deferred=False)


class Refused(nn.Module):
    def __init__(self, fail):
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(3, 4))
        fail(self.inner.weight)


@pytest.mark.parametrize(
    "fail",
    [
        lambda p: p.data_ptr(),
        lambda p: p.data.add_(torch.ones(3, 4, device="meta")),
        lambda p: p.data.new([1.0]),
        lambda p: p.data.set_(torch.from_numpy(np.ones(300_000, dtype=np.float32))),
    ],
)
def test_what_cannot_be_recorded_raises_at_once_and_names_module_operation_and_remedy(fail):
    with pytest.raises(UnrecordableError, match=r"Refused: .* cannot be recorded: .*eager") as error, deferred_init():
        Refused(fail)
    assert error.value.__traceback__ is not None
    assert not torch.empty(2).is_meta


def test_a_module_is_named_whatever_its_methods_call_it():
    class Renamed(nn.Module):
        def __init__(this, fail):
            super().__init__()
            this.weight = nn.Parameter(torch.randn(3, 4))
            this.late = lambda: fail(this.weight)
            this.late()

    with pytest.raises(UnrecordableError, match=r"^Renamed: "), deferred_init():
        Renamed(lambda p: p.data_ptr())


def test_pickling_inside_the_recording_raises():
    with pytest.raises(DeferredParameterError, match="saved"), deferred_init():
        torch.save(nn.Linear(2, 3), "/dev/null")


def test_errors_of_eager_construction_are_raised_as_they_are():
    with pytest.raises(RuntimeError), deferred_init():
        nn.Linear(3, 4).weight.data.add_(torch.ones(7))
    with pytest.raises(ValueError, match="fan"), deferred_init():
        nn.init.xavier_uniform_(torch.empty(3))


def test_init_functions_that_a_mode_outside_skips_are_recorded():
    from lightning.fabric.utilities.init import _EmptyInit

    torch.manual_seed(0)
    expected = nn.Linear(20, 30)
    torch.manual_seed(0)
    with _EmptyInit(enabled=True), deferred_init():
        found = nn.Linear(20, 30)
    assert torch.equal(materialize(found).weight, expected.weight)


def test_factories_keep_the_default_dtype_of_construction(device):
    def build():
        return nn.ParameterList([torch.ones(3), torch.randn(20), torch.zeros(2), torch.full((2,), 3.5), torch.empty(0)])

    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(1)
        with device:
            expected = build()
        torch.manual_seed(1)
        with deferred_init(), device:
            found = build()
    finally:
        torch.set_default_dtype(torch.float32)
    for found_param, expected_param in zip(materialize(found), expected, strict=True):
        assert found_param.dtype == expected_param.dtype == torch.bfloat16
        assert torch.equal(found_param, expected_param)


def test_a_recording_that_cannot_end_leaves_generators_in_a_true_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="allocate"), deferred_init():  # which nothing but running it can tell
        nn.Parameter(torch.empty(10**14)).data.exponential_()
    assert torch.equal(torch.get_rng_state(), before)
    expected = nn.Linear(3, 3)
    torch.set_rng_state(before)
    with deferred_init():
        found = nn.Linear(3, 3)
    assert torch.equal(materialize(found).weight, expected.weight)


def test_what_a_recording_that_cannot_end_leaves_behind_is_deferred():
    model = nn.Module()
    with pytest.raises(RuntimeError, match="allocate"), deferred_init():
        model.layer = nn.Linear(3, 3)
        model.lost = torch.rand(10**14)  # no parameter: it is to be real
    with pytest.raises(DeferredParameterError):
        model.layer(torch.ones(1, 3))
