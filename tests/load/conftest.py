"""Models to load into, and how to compare what was loaded."""

import os
from collections import OrderedDict

import pytest
import torch
from torch import nn


class Net(nn.Module):
    """Parameters and buffers of several kinds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 8, bias=False))
        self.register_buffer("table", torch.randint(0, 9, (3, 5)))
        self.register_buffer("mask", torch.rand(7) > 0.5)
        self.register_buffer("scalar", torch.rand(()))
        self.register_buffer("cache", torch.rand(4), persistent=False)


@pytest.fixture
def make_net():
    """Build a ``Net`` from a seed."""

    def make(seed=0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Net()

    return make


@pytest.fixture
def bits():
    """Everything in a module's state dict as bytes, to compare all of it exactly."""

    def bits(source):
        state = source.state_dict() if isinstance(source, nn.Module) else source
        return {name: (t.dtype, tuple(t.shape), raw(t)) for name, t in state.items() if isinstance(t, torch.Tensor)}

    def raw(tensor):
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
        return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""

    return bits


@pytest.fixture
def params(bits):
    """A module with the given tensors as parameters or buffers."""

    class Bag(nn.Module):
        def __init__(self, **tensors):
            super().__init__()
            for name, tensor in tensors.items():
                if isinstance(tensor, nn.Parameter):
                    self.register_parameter(name, tensor)
                else:
                    self.register_buffer(name, tensor)

    return Bag


@pytest.fixture
def open_files():
    """Number of file descriptors of this process."""
    return lambda: len(os.listdir("/proc/self/fd"))


@pytest.fixture
def renamed():
    """A state dict with every key changed, module versions dropped."""
    return lambda state, change: OrderedDict((change(key), value) for key, value in state.items())
