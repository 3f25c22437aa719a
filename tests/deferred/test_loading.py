"""Weights that come from outside, in the context and after it; what a deferred parameter refuses."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_efficient_init import load_checkpoint
from lightning_efficient_init.deferred import (
    deferred_init,
    empty_init,
    is_deferred,
    materialize,
    postponed_init,
    replay,
    uninitialized_parameters,
    watch,
)
from lightning_efficient_init.errors import DeferredParameterError

LARGE = 600  # 600 x 600 floats are more than a recipe keeps a copy of


def build(size=8):
    return nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size), nn.Linear(size, size, bias=False))


@pytest.fixture(params=[8, LARGE], ids=["small", "large"])
def size(request):
    return request.param


def assert_state(model, expected):
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def _load(model, state):
    model.load_state_dict(state)


def _assign(model, state):
    model.load_state_dict(state, assign=True)


def _copy(model, state):
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(state[name])


def _data_copy(model, state):
    for name, param in model.named_parameters():
        param.data.copy_(state[name])


def _data(model, state):
    for name, param in model.named_parameters():
        param.data = state[name].clone()


def _new_parameters(model, state):
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(value))


def _set_items(model, state):
    with torch.no_grad():
        for name, param in model.named_parameters():
            param[:] = state[name]


WAYS = [_load, _assign, _copy, _data_copy, _data, _new_parameters]
WAYS_INSIDE = [*WAYS, _set_items]


def _torch(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def _safetensors(state, path):
    save_file(state, path)
    return load_file(path)


def _safetensors_bytes(state, path):
    save_file(state, path)
    return safetensors.torch.load(path.read_bytes())


def _from_numpy(state, path):
    np.savez(path, **{name: t.numpy() for name, t in state.items()})
    return {name: torch.from_numpy(array) for name, array in np.load(path).items()}


def _tensor(state, path):
    return {name: torch.tensor(t.numpy()) for name, t in state.items()}


def _as_tensor(state, path):
    return {name: torch.as_tensor(t.numpy()) for name, t in state.items()}


def _frombuffer(state, path):
    buffers = {name: bytearray(t.numpy().tobytes()) for name, t in state.items()}
    return {name: torch.frombuffer(buffers[name], dtype=t.dtype).view(t.shape) for name, t in state.items()}


def _computed(state, path):
    return {name: torch.from_numpy(t.double().numpy()).float() for name, t in state.items()}


READERS = [_torch, _safetensors, _safetensors_bytes, _from_numpy, _tensor, _as_tensor, _frombuffer, _computed]


@pytest.mark.parametrize("way", WAYS_INSIDE)
def test_weights_loaded_inside_the_context_are_there(way, size):
    state = build(size).state_dict()
    kept = copy.deepcopy(state)
    with deferred_init():
        model = build(size)
        way(model, state)
    materialize(model)
    assert_state(model, kept)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_weights_loaded_after_the_context_are_there(way, size):
    state = build(size).state_dict()
    with deferred_init():
        model = build(size)
    parameters = list(model.parameters())
    way(model, state)
    assert not is_deferred(model)
    assert_state(model, state)
    if way not in (_assign, _new_parameters):
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    model(torch.ones(2, size)).sum().backward()


@pytest.mark.parametrize("way", WAYS_INSIDE)
def test_weights_loaded_inside_empty_init_are_there_and_nothing_warns(way, size, device):
    state = build(size).to(device).state_dict()
    with empty_init(), device:
        model = build(size)
        way(model, state)
        untouched = build(size)
    assert not uninitialized_parameters(model)
    assert len(uninitialized_parameters(untouched)) == 5
    watch(model)
    model(torch.ones(2, size, device=device))
    assert_state(model, state)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("way", WAYS_INSIDE)
def test_weights_that_are_read_inside_the_context_count_as_loaded(way, read, tmp_path):
    state = build().state_dict()
    with empty_init():
        model = build()
        way(model, read(state, tmp_path / "weights.npz"))
    assert not uninitialized_parameters(model)
    assert_state(model, state)


@pytest.mark.parametrize("way", WAYS_INSIDE)
def test_numbers_of_python_are_initializers(way):
    state = build().state_dict()
    with empty_init():
        model = build()
        way(model, {name: torch.tensor(t.tolist()) for name, t in state.items()})
    assert len(uninitialized_parameters(model)) == (0 if way is _data else 5)
    materialize(model)
    assert_state(model, state)


def test_weights_that_are_changed_after_loading_inside_empty_init_stay_loaded():
    state = build().state_dict()
    with empty_init():
        model = build()
        model.load_state_dict(state)
        model.to(torch.bfloat16)
        with torch.no_grad():
            model[0].weight.mul_(2)
        twin = copy.deepcopy(model)
        nn.init.ones_(model[1].weight)
    assert uninitialized_parameters(model) == ["1.weight"]
    assert not uninitialized_parameters(twin)
    assert torch.equal(twin[0].weight, state["0.weight"].bfloat16() * 2)


@pytest.mark.parametrize("inside", [False, True])
def test_no_initializer_runs_for_what_a_checkpoint_overwrites(inside, monkeypatch):
    state = build(LARGE).state_dict()
    calls = []
    evaluate = replay.Replay._call
    monkeypatch.setattr(replay.Replay, "_call", lambda self, op, *args: (calls.append(op), evaluate(self, op, *args)))
    with deferred_init():
        model = build(LARGE).to(memory_format=torch.preserve_format)
        if inside:
            model.load_state_dict(state)
    if not inside:
        model.load_state_dict(state)
    assert not calls
    materialize(model)
    assert_state(model, state)


@pytest.mark.parametrize("size", [8, 1100])
def test_a_copy_that_does_not_fit_raises_and_leaves_the_recipe(size):
    with deferred_init():
        model = build()
        with pytest.raises(RuntimeError):
            model[0].bias.data.copy_(torch.ones(size, size))
    with pytest.raises(RuntimeError):
        model[0].bias.data.copy_(torch.ones(size, size))
    assert is_deferred(model[0].bias)


def test_tied_weights_are_loaded_once_and_stay_tied():
    def tied():
        model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
        model[1].weight = model[0].weight
        return model

    state = tied().state_dict()
    with deferred_init():
        model = tied()
    model.load_state_dict(state)
    assert model[0].weight is model[1].weight
    assert torch.equal(model[1].weight, state["0.weight"])


def test_a_part_that_is_loaded_leaves_the_rest_to_its_recipes():
    torch.manual_seed(0)
    expected = build()
    torch.manual_seed(0)
    with deferred_init():
        model = build()
    model.load_state_dict({"0.weight": torch.full((8, 8), 3.0)}, strict=False)
    assert model[0].bias.is_meta
    materialize(model)
    assert torch.equal(model[0].weight, torch.full((8, 8), 3.0))
    assert torch.equal(model[2].weight, expected[2].weight)


def test_rows_written_inside_the_context_keep_the_others_as_initialized(same_as_eager):
    def extended():
        layer = nn.Embedding(1200, 300)
        with torch.no_grad():
            layer.weight[:1000].copy_(base)
        return layer

    base = torch.randn(1000, 300)
    same_as_eager(extended, all_deferred=False)


def test_torch_load_inside_the_context_reads_the_file(tmp_path):
    state = build(LARGE).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    with deferred_init():
        model = build(LARGE)
        model.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    materialize(model)
    assert_state(model, state)


def test_from_pretrained_inside_the_context_ends_with_the_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = transformers.LlamaForCausalLM(config)
        original.save_pretrained(tmp_path)
        with deferred_init():
            model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
        materialize(model)
    assert_state(model, original.state_dict())
    assert torch.equal(model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m(torch.ones(2, 8)),
        lambda m: m[0].weight + torch.ones(8),
        lambda m: torch.ones(8, 8) @ m[0].weight,
        lambda m: m[0].weight[0].fill_(1),
        lambda m: m[0].weight.data.__setitem__(0, 1.0),
        lambda m: m[0].weight.tolist(),
        lambda m: m[0].weight.detach().numpy(),
        lambda m: m[0].weight.data.normal_(),
        lambda m: m[0].weight.data.view(-1).zero_(),
        lambda m: nn.init.normal_(m[0].weight),
        lambda m: m[0].weight.cpu(),
        lambda m: m.to("cpu"),
        lambda m: m.cpu(),
        lambda m: torch.zeros(8, 8).copy_(m[0].weight),
        lambda m: torch.save(m.state_dict(), io.BytesIO()),
        lambda m: torch.save(m, io.BytesIO()),
    ],
)
def test_a_use_that_needs_values_raises_and_says_what_to_do(use):
    with deferred_init():
        model = build()
    with pytest.raises(DeferredParameterError, match=r"(weight|bias) of Linear.*materialize"):
        use(model)
    assert is_deferred(model)


def test_a_cast_of_a_deferred_model_is_recorded():
    torch.manual_seed(0)
    expected = build().to(torch.bfloat16)
    torch.manual_seed(0)
    with deferred_init():
        model = build()
    weight = model[0].weight
    model.to(torch.bfloat16)
    assert is_deferred(model)
    materialize(model)
    assert model[0].weight is weight
    assert_state(model, expected.state_dict())


def test_what_needs_no_values_works():
    with deferred_init():
        model = build()
    weight = model[0].weight
    assert "Deferred" in repr(weight)
    assert weight.shape == (8, 8)
    assert weight.numel() == 64
    assert weight.is_meta
    assert isinstance(weight, nn.Parameter)
    assert weight in {weight}
    model.requires_grad_(False).train().eval().zero_grad()
    assert sum(p.numel() for p in model.parameters()) == 8 * 8 * 2 + 8 * 3
    assert list(model.state_dict()) == list(build().state_dict())
    materialize(model)
    assert not model[0].weight.requires_grad


class RandomBuffers(nn.Module):
    """Buffers with random values, alone, computed, as views, and beside others that show the same memory."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("drawn", torch.randn(3))
        self.register_buffer("filled", torch.empty(3).normal_())
        self.register_buffer("computed", torch.rand(3) * 2 + 1)
        self.register_buffer("column", torch.randn(2, 3)[:, 1])
        self.table = torch.randn(4, 4)
        self.register_buffer("rows", self.table[1:3])
        self.register_buffer("of_weight", self.layer.weight.detach()[:2])
        self.register_buffer("transient", torch.randn(5), persistent=False)
        self.scaled = nn.Parameter(torch.randn(3) * self.drawn)


@pytest.mark.parametrize("context", [deferred_init, empty_init])
@pytest.mark.parametrize("load", [load_checkpoint, lambda model, path: model.load_state_dict(torch.load(path))])
def test_random_buffers_that_are_loaded_inside_the_context_stay_loaded(load, context, device, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        with device:
            return RandomBuffers()

    source, expected = make(1), make(2)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    expected.load_state_dict(source.state_dict())
    with context():
        found = make(2)
        load(found, tmp_path / "a.pth")
    assert_state(materialize(found), source.state_dict())
    assert torch.equal(found.transient, expected.transient)
    assert torch.equal(found.table, expected.table)
    assert found.rows.data_ptr() == found.table[1].data_ptr()
    assert found.of_weight.data_ptr() == found.layer.weight.data_ptr()


def test_a_checkpoint_that_waits_for_a_model_does_not_keep_it_alive(tmp_path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "w.pth")
    with postponed_init(is_optional=True):
        model = nn.Linear(3, 3)
    load_checkpoint(model, tmp_path / "w.pth")
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None
