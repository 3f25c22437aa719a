"""Every layer of torch.nn that has parameters comes out as in eager construction."""

from __future__ import annotations

import inspect

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

_ARGUMENTS = {
    "AdaptiveLogSoftmaxWithLoss": (16, 20, [5, 10]),
    "Bilinear": (5, 6, 7),
    "Embedding": (11, 6, 3),
    "EmbeddingBag": (11, 6),
    "GroupNorm": (2, 6),
    "LayerNorm": (6,),
    "RMSNorm": (6,),
    "MultiheadAttention": (16, 4),
    "Transformer": (16, 4, 2, 2, 32, 0.1, nn.functional.relu, None, None, 1e-5, True),
    "TransformerDecoderLayer": (16, 4, 32),
    "TransformerEncoderLayer": (16, 4, 32),
    "PReLU": (3,),
}
_NOT_BUILT_ALONE = {"Module", "Container", "Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"}


def _arguments(layer):
    name = layer.__name__
    if name in _ARGUMENTS:
        return _ARGUMENTS[name]
    required = [
        p
        for p in list(inspect.signature(layer.__init__).parameters.values())[1:]
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    return tuple(3 if p.name == "kernel_size" else 4 + 2 * i for i, p in enumerate(required))


def _layers_with_parameters():
    found = {}
    for name in sorted(dir(nn)):
        layer = getattr(nn, name)
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)) or name in _NOT_BUILT_ALONE:
            continue
        if "Lazy" in name or name in ("TransformerEncoder", "TransformerDecoder", "DataParallel", "NLLLoss2d"):
            continue
        args = (5, 6) if name in ("RNN", "LSTM", "GRU") else _arguments(layer)
        try:
            built = layer(*args)
        except (TypeError, ValueError):
            continue
        if any(True for _ in built.parameters()):
            found[name] = (layer, args)
    return found


LAYERS = _layers_with_parameters()


def test_the_enumeration_finds_the_layers_we_know():
    known = {"Linear", "Conv1d", "ConvTranspose3d", "LSTM", "GRUCell", "BatchNorm2d", "InstanceNorm1d", "Embedding"}
    assert len(LAYERS) >= 30
    assert known - {"InstanceNorm1d"} <= set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_same_as_built_eagerly(name, device, same_as_eager):
    layer, args = LAYERS[name]
    same_as_eager(lambda: layer(*args), device)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=3),
        lambda: nn.Conv2d(4, 6, 3, padding_mode="reflect", groups=2),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 3),
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), 2),
        lambda: nn.MultiheadAttention(16, 4, kdim=8, vdim=12, add_bias_kv=True),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(7, 5)),
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(7, 5)),
        lambda: nn.utils.spectral_norm(nn.Linear(7, 5)),
        lambda: nn.Linear(40, 30, dtype=torch.bfloat16),
        lambda: nn.Linear(40, 30, dtype=torch.float64),
        lambda: nn.Linear(40, 30).half(),
        lambda: nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last),
        lambda: nn.ParameterList([nn.Parameter(torch.randn(3)), nn.Parameter(torch.zeros(2), requires_grad=False)]),
        lambda: nn.ParameterDict({"a": nn.Parameter(torch.rand(5))}),
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).requires_grad_(False),
    ],
)
def test_variants_of_layers_are_the_same(build, device, same_as_eager):
    same_as_eager(build, device)


@pytest.mark.parametrize(
    "fill",
    [
        nn.init.uniform_,
        nn.init.normal_,
        nn.init.trunc_normal_,
        lambda t: nn.init.trunc_normal_(t, std=0.02, a=-0.01, b=0.05),
        lambda t: nn.init._no_grad_trunc_normal_(t, b=2.0, a=-2.0, std=0.02, mean=0.5),
        lambda t: nn.init.constant_(t, 0.3),
        nn.init.ones_,
        nn.init.zeros_,
        nn.init.eye_,
        nn.init.xavier_uniform_,
        nn.init.xavier_normal_,
        nn.init.kaiming_uniform_,
        lambda t: nn.init.kaiming_uniform_(t, mode="fan_out", nonlinearity="tanh"),
        lambda t: nn.init.kaiming_uniform_(t, a=-0.0),
        lambda t: nn.init.kaiming_uniform_(t.t(), torch.tensor(2.0).item()),
        nn.init.kaiming_normal_,
        nn.init.orthogonal_,
        lambda t: nn.init.sparse_(t, 0.3),
        lambda t: t.data.bernoulli_(0.3),
        lambda t: t.data.exponential_(),
        lambda t: t.data.random_(0, 10),
        lambda t: t.data.cauchy_(),
        lambda t: t.data.log_normal_(),
        lambda t: t.data.geometric_(0.4),
        lambda t: t.data.t().normal_(),
        lambda t: t.data[1:3].uniform_(),
        lambda t: t.data.copy_(torch.randperm(t.numel()).view_as(t)),
        lambda t: t.data.copy_(torch.randint(0, 9, t.shape)),
        lambda t: t.data.copy_(torch.randn_like(t)),
        lambda t: t.data.copy_(torch.nn.functional.dropout(torch.rand_like(t), 0.5)),
        lambda t: t.data.mul_(torch.multinomial(torch.ones(t.shape[1], device=t.device), t.shape[1]).float()),
        lambda t: t.data.copy_(torch.normal(torch.zeros_like(t), 2.0)),
        lambda t: t.data.clamp_(-0.1, 0.1).add_(torch.linspace(0, 1, t.shape[1], device=t.device)),
    ],
)
@pytest.mark.parametrize("shape", [(20, 30), (3, 4)])
def test_every_way_to_fill_a_parameter_is_the_same(fill, shape, device, same_as_eager):
    def build():
        layer = nn.Linear(shape[1], shape[0])
        fill(layer.weight.data if fill is nn.init.sparse_ else layer.weight)
        return nn.Sequential(layer, nn.Linear(5, 7))

    same_as_eager(build, device)


_fills = st.sampled_from(["normal_", "uniform_", "zero_", "exponential_"])
_layers = st.one_of(
    st.tuples(st.just("linear"), st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.just("conv"), st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.just("norm"), st.integers(1, 9), st.integers(1, 2)),
    st.tuples(st.just("raw"), st.integers(1, 50), st.integers(1, 3)),
    st.tuples(st.just("buffer"), st.integers(1, 50), st.integers(1, 3)),
    st.tuples(st.just("draw"), st.integers(1, 50), st.integers(1, 3)),
)


class _Generated(nn.Module):
    def __init__(self, layers, fills):
        super().__init__()
        for index, (kind, a, b) in enumerate(layers):
            name = f"{kind}{index}"
            if kind == "linear":
                self.add_module(name, nn.Linear(a, b))
            elif kind == "conv":
                self.add_module(name, nn.Conv2d(a, b, 3))
            elif kind == "norm":
                self.add_module(name, nn.LayerNorm((a, b)))
            elif kind == "raw":
                self.register_parameter(name, nn.Parameter(torch.randn(a, b) * 0.5 + torch.arange(b)))
            elif kind == "buffer":
                self.register_buffer(name, torch.rand(a, b), persistent=bool(a % 2))
            else:
                setattr(self, name, [torch.rand(a).sum().item(), torch.randn(b)])
        params = list(self.parameters())
        for index, (which, fill, scale) in enumerate(fills):
            if params:
                param = params[which % len(params)]
                getattr(param.data, fill)()
                param.data.mul_(scale)
                if index % 3 == 0:
                    param.data[:1].fill_(scale)


@hypothesis.settings(max_examples=80, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    st.lists(_layers, min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 20), _fills, st.floats(-2, 2, width=16)), max_size=6),
)
def test_generated_modules_are_the_same(same_as_eager, layers, fills):
    same_as_eager(lambda: _Generated(layers, fills))
