"""What the tests of deferred construction share: a device, and the comparison with eager construction."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lightning_efficient_init.deferred import deferred_init, is_deferred, materialize

_CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Without an index, as users write it."""
    return torch.device(request.param)


def building_on(device):
    """Nothing on the CPU, so that code which is sensitive to a device context is tested without."""
    return contextlib.nullcontext() if device.type == "cpu" else device


def generator_states(device):
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if device.type == "cuda" else states


def assert_same_tensor(found, expected, name=""):
    assert type(found) is type(expected), name
    assert found.dtype == expected.dtype, name
    assert found.device == expected.device, name
    assert found.shape == expected.shape, name
    assert found.stride() == expected.stride(), name
    assert (found.is_conj(), found.is_neg()) == (expected.is_conj(), expected.is_neg()), name
    assert found.requires_grad == expected.requires_grad, name
    assert (
        torch.equal(found.detach().view(-1).nan_to_num(7.5), expected.detach().view(-1).nan_to_num(7.5))
        if (found.is_contiguous())
        else torch.equal(found, expected)
    ), name


def assert_same_value(found, expected, name):
    if isinstance(expected, torch.Tensor):
        assert_same_tensor(found, expected, name)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), name
        for index, (f, e) in enumerate(zip(found, expected, strict=True)):
            assert_same_value(f, e, f"{name}[{index}]")
    elif isinstance(expected, dict):
        assert list(found) == list(expected), name
        for key in expected:
            if not isinstance(expected[key], torch.nn.Module):
                assert_same_value(found[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, bool | int | float | str):
        assert found == expected or found != found, name


def assert_same_module(found, expected):
    """Bitwise, by name and order, with ties, attributes and aliases."""
    names = [n for n, _ in expected.named_parameters(remove_duplicate=False)]
    assert [n for n, _ in found.named_parameters(remove_duplicate=False)] == names
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in expected.named_parameters()]
    assert [n for n, _ in found.named_buffers()] == [n for n, _ in expected.named_buffers()]
    assert list(found.state_dict()) == list(expected.state_dict())
    for name, p in expected.named_parameters():
        assert_same_tensor(found.get_parameter(name), p, name)
    for name, b in expected.named_buffers():
        assert_same_tensor(found.get_buffer(name), b, name)
    for (path, f), (_, e) in zip(found.named_modules(), expected.named_modules(), strict=True):
        attributes = {k: v for k, v in e.__dict__.items() if not k.startswith("_") or isinstance(v, torch.Tensor)}
        for key, value in attributes.items():
            assert_same_value(f.__dict__[key], value, f"{path}.{key}")


@pytest.fixture
def same_as_eager():
    """Build eagerly and deferred from one seed; compare values and generators; return both."""

    def check(build, device=_CPU, *, all_deferred=True, seed=20):
        torch.manual_seed(seed)
        with building_on(device):
            expected = build()
        after = generator_states(device)
        torch.manual_seed(seed)
        with deferred_init(), building_on(device):
            found = build()
        assert all(map(torch.equal, generator_states(device), after))
        if all_deferred and any(True for _ in expected.parameters()):
            assert all(p.is_meta for p in found.parameters())
            assert is_deferred(found)
        assert not any(b.is_meta for b in found.buffers())
        torch.rand(3, device=device)
        before = generator_states(device)
        assert materialize(found) is found
        assert all(map(torch.equal, generator_states(device), before))
        assert not is_deferred(found)
        assert_same_module(found, expected)
        return found, expected

    return check
