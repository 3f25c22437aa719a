"""``module.load_state_dict`` with lazy tensors, inside ``streaming_load_state_dict``."""

import threading

import pytest
import torch
from torch import nn

from lightning_efficient_init import deferred_init
from lightning_efficient_init.checkpoint import index_checkpoint, lazy_tree
from lightning_efficient_init.errors import StateDictMismatchError
from lightning_efficient_init.load.state_dict import streaming_load_state_dict


@pytest.fixture
def lazy(tmp_path, make_net):
    """A net's state dict with its tensors still in the file."""
    torch.save(make_net(1).state_dict(), tmp_path / "w.pt")
    return lazy_tree(index_checkpoint(tmp_path / "w.pt").weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lazy_tensors_are_streamed(dtype, device, lazy, make_net, bits, bytes_read):
    model = make_net(2).to(device, dtype)
    with streaming_load_state_dict():
        result = model.load_state_dict(lazy)
    assert result.missing_keys == result.unexpected_keys == []
    assert bits(model) == bits(make_net(1).to(dtype))


def test_a_deferred_model_takes_them(lazy, make_net, bits):
    with deferred_init():
        model = make_net(2)
    with streaming_load_state_dict():
        model.load_state_dict(lazy)
    assert bits(model) == bits(make_net(1))


@pytest.mark.parametrize("real", [(), ("a",), ("b",), ("a", "c"), ("b", "c")])
def test_of_values_for_one_memory_the_last_one_counts_whether_lazy_or_real(real, tmp_path, params):
    def build():
        base = torch.zeros(8)
        return params(a=base[:4], b=base[2:6], c=base[4:])

    state = {name: torch.full((4,), float(value)) for value, name in enumerate("abc")}
    torch.save(state, tmp_path / "w.pt")
    lazy = lazy_tree(index_checkpoint(tmp_path / "w.pt").weights)
    model, expected = build(), build()
    expected.load_state_dict(state)
    with streaming_load_state_dict():
        model.load_state_dict({**lazy, **{name: state[name] for name in real}})
    assert torch.equal(torch.cat([*model.buffers()]), torch.cat([*expected.buffers()]))


def test_strict_raises_one_error_that_is_a_runtime_error_too(lazy, make_net, bits):
    lazy["extra"] = lazy.pop("mask")
    model = make_net(2)
    with streaming_load_state_dict(), pytest.raises(RuntimeError) as caught:
        model.load_state_dict(lazy)
    assert isinstance(caught.value, StateDictMismatchError)
    assert (caught.value.missing, caught.value.unexpected) == (("mask",), ("extra",))
    assert bits(model) == bits(make_net(2))


def test_without_strict_the_names_come_back(lazy, make_net):
    lazy["extra"] = lazy.pop("mask")
    with streaming_load_state_dict():
        result = make_net(2).load_state_dict(lazy, strict=False)
    assert result == make_net(2).load_state_dict({k: v.read() for k, v in lazy.items()}, strict=False)


def test_nothing_that_fits_is_no_error_without_strict_as_in_torch(lazy, make_net):
    with streaming_load_state_dict():
        result = nn.Linear(2, 2).load_state_dict(lazy, strict=False)
    assert result.missing_keys == ["weight", "bias"]


@pytest.mark.parametrize("strict", [True, False])
def test_shapes_that_differ_raise_in_any_case(strict, lazy, make_net):
    lazy["mask"] = lazy["table"]
    with streaming_load_state_dict(), pytest.raises(StateDictMismatchError, match="mask: the model has"):
        make_net(2).load_state_dict(lazy, strict=strict)


def test_assign_puts_new_tensors_in_place_and_keeps_versions(lazy, make_net, bits):
    model = make_net(2).bfloat16()
    del lazy["layers.1.num_batches_tracked"]
    with streaming_load_state_dict():
        with pytest.raises(RuntimeError, match="num_batches_tracked"):
            model.load_state_dict(lazy, assign=True)
        model.load_state_dict(lazy, assign=True, strict=False)
    assert model.embed.weight.dtype == torch.float32
    assert type(model.embed.weight) is nn.Parameter
    assert torch.equal(model.embed.weight, make_net(1).embed.weight)


def test_lazy_and_real_and_edited_tensors_mix(lazy, make_net, bits):
    expected = make_net(1)
    with torch.no_grad():
        expected.embed.weight.fill_(3)
        expected.scalar.fill_(5)
        expected.layers[0].weight[0] = 0
    lazy["embed.weight"] = torch.full((50, 16), 3.0)
    lazy["scalar"] = lazy["scalar"] * 0 + 5
    lazy["layers.0.weight"][0] = 0
    model = make_net(2)
    with streaming_load_state_dict():
        model.load_state_dict(lazy)
    assert bits(model) == bits(expected)


def test_all_edited_is_loaded_too(params):
    model = params(t=torch.zeros(3))
    with streaming_load_state_dict():
        model.load_state_dict({"t": torch.ones(3)})
    assert model.t.tolist() == [1, 1, 1]


def test_a_part_of_a_model_takes_its_part(lazy, make_net, bits):
    model = make_net(2)
    part = {key.removeprefix("layers."): value for key, value in lazy.items() if key.startswith("layers.")}
    with streaming_load_state_dict():
        model.layers.load_state_dict(part)
    assert bits(model.layers) == bits(make_net(1).layers)
    assert bits(model.embed) == bits(make_net(2).embed)


def test_a_compiled_model_takes_its_own_names(lazy, make_net, bits):
    net = make_net(2)
    model = torch.compile(net, backend="eager")
    with streaming_load_state_dict():
        model.load_state_dict({f"_orig_mod.{key}": value for key, value in lazy.items()})
    assert bits(net) == bits(make_net(1))
    with deferred_init():
        deferred = make_net(2)
    with streaming_load_state_dict():
        nn.ModuleDict({"_orig_mod": deferred}).load_state_dict({f"_orig_mod.{k}": v for k, v in lazy.items()})
    assert bits(deferred) == bits(make_net(1))


def test_a_subclass_that_overrides_load_state_dict_is_streamed_below_it(lazy, make_net, bits):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net(2)

        def load_state_dict(self, state_dict, *args, **kwargs):
            return super().load_state_dict({f"net.{key}": value for key, value in state_dict.items()}, *args, **kwargs)

    model = Outer()
    with streaming_load_state_dict():
        model.load_state_dict(lazy)
    assert bits(model.net) == bits(make_net(1))


def test_other_threads_and_later_code_reach_torchs_own(lazy, make_net, bits):
    original = nn.Module.load_state_dict
    models, results = [make_net(2), make_net(2)], []
    with streaming_load_state_dict():
        thread = threading.Thread(target=lambda: results.append(models[0].load_state_dict(make_net(1).state_dict())))
        thread.start()
        thread.join()
    assert nn.Module.load_state_dict is original
    assert bits(models[0]) == bits(make_net(1))
    assert len(results) == 1
    models[1].load_state_dict(lazy)  # one by one, by torch
    assert bits(models[1]) == bits(make_net(1))
