"""Idioms of constructors in the wild, each the same as in eager construction."""

from __future__ import annotations

import copy
import math
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune

from lightning_efficient_init import load_checkpoint
from lightning_efficient_init.deferred import deferred_init, eager, empty_init, materialize, watch


def holder(**values):
    module = nn.Module()
    for name, value in values.items():
        setattr(module, name, value)
    return module


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(5, 6))


def pruned():
    layer = nn.Linear(6, 7)
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.random_unstructured(layer, "bias", 0.3)
    return layer


def shared_memory():
    first = nn.Parameter(torch.zeros(3, 4))
    module = holder(a=first, b=nn.Parameter(first.data), c=nn.Parameter(first.data[1]))
    nn.init.normal_(module.a)
    module.c.data.fill_(2)
    return module


def from_vector():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 2, model.parameters())
    return model


def moving_average():
    model = nn.Linear(4, 5)
    average = copy.deepcopy(model).requires_grad_(False)
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.data.mul_(0.9).add_(p.data, alpha=0.1)
    return nn.ModuleList([model, average])


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)

    def right_inverse(self, x):
        return x.triu()


def custom_parametrization():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def data_dependent():
    layer = nn.Linear(6, 7)
    with torch.no_grad():
        weight = layer.weight
        weight[weight < 0] = 0
        weight[torch.rand(7, 6, device=weight.device) < 0.2] = 5
        rows = (weight.sum(1) > 1).nonzero().flatten()
        weight[rows] *= 2
        while weight.abs().max() > 1:
            weight /= 2
    return layer


def writes_into_real_memory():
    table = torch.zeros(4, 6)
    table[:2] = torch.randn(2, 6)
    table[2].normal_()
    module = holder(weight=nn.Parameter(table.clone()), out=torch.empty(3))
    module.register_buffer("table", table)
    torch.randn(3, out=module.out)
    return module


def old_constructors():
    module = holder(
        a=nn.Parameter(torch.Tensor(3, 4).uniform_(-1, 1)),
        b=nn.Parameter(torch.FloatTensor(5).normal_()),
        c=nn.Parameter(torch.Tensor([1.0, 2.0])),
    )
    module.d = nn.Parameter(module.a.new(2, 3).zero_())
    module.e = nn.Parameter(module.a.data.new_tensor([3.0, 4.0]))
    return module


def recurrent_matrix():
    layer = nn.LSTM(4, 6)
    for name, param in layer.named_parameters():
        if "weight_hh" in name:
            for gate in param.data.chunk(4, 0):
                nn.init.orthogonal_(gate)
        elif "bias" in name:
            param.data.zero_()
            param.data[6:12].fill_(1)
    return layer


def scaled_by_depth():
    layers = nn.ModuleList([nn.Linear(20, 20) for _ in range(4)])
    for index, layer in enumerate(layers):
        nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * (index + 1)))
        layer.weight.data.div_(math.sqrt(2.0 * (index + 1)))
    return layers


def written_by_lists():
    layer = nn.Linear(6, 7)
    layer.weight.data[[0, 2]] = 0.0
    layer.weight.data[[0, 2], [1, 1]] = torch.ones(2)
    layer.weight.data[:, [False, True, False, False, False, True]] = layer.weight.data[:, [0, 0]]
    return layer


def written_by_other_indices():
    layer = nn.Linear(6, 7)
    data = layer.weight.data
    data[range(2)] = 0.0
    data[np.array([3, 5])] = 1.0
    data[np.arange(7) > 5] = 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data[[[0, 1], [2, 3]]] = 3.0
    data[([[4], [5]], [[0, 1]])] = 4.0
    data[[]] = 5.0
    data[[True] * 3 + [False] * 4] = data[[-1] * 3]
    layer.picked = data[[np.int64(1)]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = [slice(0, 2), 1], [None, 0], [..., 0], [np.array([0, 1]), np.array([1, 2])], [(0, 1), (1, 2)]
        layer.nested = [data[index] for index in nested]
    return layer


def state_space(size=6):
    """The initial state of S4: its matrix in the basis of its eigenvectors."""
    root = torch.sqrt(1 + 2 * torch.arange(size, dtype=torch.float32))
    matrix = torch.tril(root[:, None] * root) - torch.diag(torch.arange(size))
    vectors = torch.linalg.eigh((-matrix + 0.5 * root[:, None] * root) * -1j)[1]
    return holder(
        inverse=nn.Parameter(vectors.conj().T.contiguous()), b=nn.Parameter(vectors.conj().T @ root.to(vectors.dtype))
    )


def conjugated():
    weight = torch.randn(4, 4, dtype=torch.cfloat)
    weight.conj().imag[0].fill_(3)
    skew = nn.Parameter(weight - weight.mH)
    return holder(
        lazy=nn.Parameter(weight.conj()),
        negative=nn.Parameter(weight.conj().imag.contiguous()),
        skew=skew,
        adjoint=skew.data.mH,
        unitary=nn.Parameter(torch.matrix_exp(skew.data)),
    )


def scaled_by_its_spectrum():
    layer = nn.Linear(40, 40)
    layer.weight.data /= torch.linalg.matrix_norm(layer.weight.data, 2)
    layer.norms = [torch.linalg.norm(layer.weight.data, order) for order in (None, 2, "nuc")]
    layer.values = (
        torch.linalg.svdvals(layer.weight.data),
        torch.linalg.eigvalsh(layer.weight.data @ layer.weight.data.T),
    )
    layer.of_real_numbers = torch.linalg.svdvals(torch.eye(30) + torch.arange(30) / 7)
    return layer


def functions_that_make_tensors_of_their_own():
    layer = nn.Linear(4, 4)
    weight = layer.weight.data
    layer.made = [
        functional.softmax(weight, -1, dtype=torch.float64),
        functional.cosine_similarity(weight, 2 * weight + 1),
        functional.pad(weight[None], (1, 1), mode="circular"),
        functional.dropout(weight, p=1.0),
        functional.scaled_dot_product_attention(weight[None], weight[None], weight[None], is_causal=True),
        torch.quantile(weight, 0.3),
        torch.cov(weight),
        torch.linalg.multi_dot([weight, torch.eye(4), weight]),
        torch.take_along_dim(weight, torch.tensor([[0, 1, 2, 3]]), 0),
    ]
    layer.register_buffer("table", functional.log_softmax(torch.rand(4), -1, dtype=torch.float64), persistent=False)
    return layer


def bag():
    model = nn.EmbeddingBag(5, 3)
    model.seen = model(torch.tensor([[1, 2]])).detach()
    return model


def attention_that_is_seen():
    layer = nn.Linear(48, 144)
    query, key, value = layer(torch.ones(2, 5, 48)).view(2, 5, 3, 4, 12).permute(2, 0, 3, 1, 4)
    layer.seen = functional.scaled_dot_product_attention(query, key, value).detach()
    return layer


def broadcast_batches():
    batch, one = torch.arange(125.0).view(5, 5, 5).sin(), torch.arange(25.0).view(1, 5, 5).cos()
    weight = nn.Parameter(torch.randn(5, 5, 5))
    nuclear = torch.norm(weight.data, "nuc", dim=(1, 2))
    return holder(weight=weight, of_real_numbers=batch @ one, product=torch.matmul(weight.data, one), norm=nuclear)


def functions_that_want_values():
    window, noise = torch.hann_window(16), torch.randn(1, 64)
    spectrum = torch.stft(noise, 16, window=window, return_complex=True)
    return holder(
        norms=torch.tensor([nn.Linear(3, 3).weight.detach().norm() for _ in range(2)]),
        rows=nn.Parameter(torch.tensor([torch.rand(()), 1.0])),
        stacked=torch.as_tensor([torch.rand(()), torch.rand(())]),
        spectrum=spectrum,
        noise=torch.istft(spectrum, 16, window=window),
        slope=torch.gradient(torch.randn(5), spacing=(torch.arange(5.0),)),
        points=torch.quasirandom.SobolEngine(2, scramble=True, seed=3).draw(4),
        plain_points=torch.quasirandom.SobolEngine(2).draw(4),
    )


class Tagged(torch.Tensor):
    """Has nothing of its own but the name."""


class Length:
    """No tensor, but takes part in functions of tensors."""

    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        value = func(*(arg.value if isinstance(arg, Length) else arg for arg in args), **(kwargs or {}))
        return Length(value)


def classes_that_take_part_in_functions():
    tagged = torch.randn(3).as_subclass(Tagged)
    scaled = torch.mul(Length(torch.randn(3)), 2)
    assert isinstance(tagged * 2, Tagged)
    assert isinstance(scaled, Length)
    return holder(tagged=(tagged * 2).as_subclass(torch.Tensor), length=scaled.value)


class Branches(nn.Module):
    def forward(self, x):
        return torch.cat([torch.relu(x), x])


def traced():
    graph = torch.fx.symbolic_trace(Branches())
    return holder(layer=nn.Linear(3, 3), seen=graph(torch.randn(2, 3)))


State = namedtuple("State", ["hidden", "cell"])


def state_by_name():
    model = nn.LSTM(4, 5)
    model.seen = model(torch.ones(2, 1, 4), State(torch.zeros(1, 1, 5), torch.ones(1, 1, 5)))[0].detach()
    return model


def by_element():
    layer = nn.Linear(3, 2)
    layer.weight.data.apply_(lambda number: number + 10)
    layer.bias.data.map_(layer.bias.data * 2, lambda a, b: a + b)
    return holder(layer=layer, table=nn.Parameter(torch.ones(3).apply_(lambda number: number * 3)))


def computed_in_the_order_of_strides():
    """Kernels that lay out their results otherwise than their meta kernels; what is summed later depends on it."""
    u, s, vh = torch.linalg.svd(torch.randn(7, 9), full_matrices=False)
    data = torch.randn(64, 9)
    basis = torch.pca_lowrank(data, q=9)[2]
    images = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    pooled, indices = functional.max_pool2d(images, 2, return_indices=True)
    return holder(
        low_rank=nn.Parameter((u * s) @ vh),
        left_out=nn.Parameter(torch.randn(7, 9) - (u[:, :3] * s[:3]) @ vh[:3]),
        vh=nn.Parameter(vh),
        projected=nn.Parameter(data @ basis),
        spectrum=torch.fft.rfftn(torch.randn(4, 5, 6)),
        normalized=nn.Parameter(functional.group_norm(images, 2)),
        unpooled=nn.Parameter(functional.max_unpool2d(pooled, indices, 2)),
        mixed=torch.logaddexp(torch.randn(4, 5), torch.randn(5, 4).t()),
    )


def measured_in_channels_last():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    net = net.to(memory_format=torch.channels_last)
    with torch.no_grad():
        net(torch.randn(4, 3, 9, 9))
    return net


def sparse():
    """Sparse tensors of deferred values and of real ones, and what is computed from them."""
    graph, reservoir = torch.eye(4).to_sparse(), (torch.randn(4, 4) * (torch.rand(4, 4) > 0.5)).to_sparse().coalesce()
    reservoir.values().mul_(0.5)
    reservoir.mul_(3)
    layer = nn.Linear(4, 4)
    layer.weight.data.add_(graph * 2)
    return holder(
        layer=layer,
        whole=nn.Parameter(reservoir.to_dense()),
        product=nn.Parameter(torch.sparse.mm(graph + reservoir, torch.ones(4, 1))),
        rows=nn.Parameter(torch.randn(4, 4).to_sparse() @ layer.weight.data),
        real=nn.Parameter(torch.zeros(4, 4).add_(graph)),
    )


def measured():
    model = nn.Sequential(nn.Linear(3, 5), nn.LazyLinear(4))
    model(torch.ones(2, 3))
    return model


class MeasuresItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten())
        width = self.features(torch.zeros(2, 3, 8, 8)).shape[1]
        self.head = nn.Linear(width, 4)
        self.recurrent = nn.LSTM(4, 5, num_layers=2, dropout=0.5)
        self.state = self.recurrent(torch.ones(3, 1, 4))[0].detach()
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.seen = self.attention(torch.ones(1, 3, 8)).detach()
        self.scale = self.features(torch.ones(2, 3, 8, 8)).std().item()


IDIOMS = {
    "a forward to measure itself": MeasuresItself,
    "weight_norm of old": old_weight_norm,
    "pruned": pruned,
    "parameters that share memory": shared_memory,
    "parameters from a vector": from_vector,
    "moving average": moving_average,
    "custom parametrization": custom_parametrization,
    "writes into real memory": writes_into_real_memory,
    "recurrent matrix": recurrent_matrix,
    "scaled by depth": scaled_by_depth,
    "row of a factory": lambda: holder(w=nn.Parameter(torch.randn(4, 30)[1])),
    "transposed factory": lambda: holder(w=nn.Parameter(torch.randn(4, 30).t())),
    "stacked": lambda: holder(w=nn.Parameter(torch.stack([torch.randn(3) for _ in range(4)]))),
    "expanded": lambda: holder(w=nn.Parameter(torch.ones(3, 1).expand(3, 4).clone())),
    "sorted": lambda: holder(w=nn.Parameter(torch.sort(torch.rand(20))[0]), i=torch.sort(torch.rand(5))[1]),
    "decomposed": lambda: holder(w=nn.Parameter(torch.linalg.svd(torch.randn(5, 4), full_matrices=False)[0])),
    "complex": lambda: holder(
        w=nn.Parameter(torch.randn(20, dtype=torch.cfloat)), v=torch.view_as_real(torch.randn(2, dtype=torch.cfloat))
    ),
    "bernoulli of a tensor": lambda: holder(w=nn.Parameter(torch.bernoulli(torch.full((5, 6), 0.3)))),
    "normal of tensors": lambda: holder(w=nn.Parameter(torch.normal(torch.arange(6.0), torch.ones(6)))),
    "cast data": lambda: holder(w=nn.Parameter(torch.randn(20).half())),
    "poisson and gamma": lambda: holder(
        w=nn.Parameter(torch.poisson(torch.ones(9) * 4)), g=torch._standard_gamma(torch.ones(4))
    ),
    "distribution": lambda: holder(w=nn.Parameter(torch.distributions.Uniform(-1, 1).sample((3, 4)))),
    "einsum": lambda: holder(w=nn.Parameter(torch.einsum("ij,jk->ik", torch.randn(3, 4), torch.eye(4)))),
    "roll and flip": lambda: holder(w=nn.Parameter(torch.randn(3, 20).roll(1, 1).flip(0))),
    "fourier": lambda: holder(w=nn.Parameter(torch.fft.rfft(torch.randn(16)).abs())),
    "cumulative": lambda: holder(w=nn.Parameter(torch.rand(9).cumsum(0)), b=torch.rand(9).argsort()),
    "nested lists": lambda: holder(x=[{"a": torch.rand(3)}, (torch.zeros(2), [torch.randn(20)])]),
    "indexed by lists": lambda: holder(w=nn.Parameter(torch.randn(9, 3)[[3, 1, 2]]), v=written_by_lists()),
    "measured by a forward": measured,
    "state space": state_space,
    "conjugated": conjugated,
    "scaled by its spectrum": scaled_by_its_spectrum,
    "functions that make tensors of their own": functions_that_make_tensors_of_their_own,
    "attention that is seen": attention_that_is_seen,
    "batches that are broadcast": broadcast_batches,
    "classes that take part in functions": classes_that_take_part_in_functions,
    "traced": traced,
    "computed in the order of strides": computed_in_the_order_of_strides,
    "measured in channels_last": measured_in_channels_last,
    "bag": bag,
    "state by name": state_by_name,
    "indexed by ranges, arrays and nested lists": written_by_other_indices,
    "requires_grad of a plain tensor": lambda: holder(x=torch.randn(5, requires_grad=True)),
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_an_idiom_is_the_same(idiom, device, same_as_eager):
    same_as_eager(IDIOMS[idiom], device)


SOMEWHAT_REAL = [data_dependent, old_constructors, by_element, functions_that_want_values, sparse]


@pytest.mark.parametrize("build", SOMEWHAT_REAL, ids=lambda f: f.__name__)
def test_an_idiom_is_the_same_if_some_parameters_stay_real(build, same_as_eager):
    same_as_eager(build, all_deferred=False)


def test_code_is_traced_in_the_midst_of_a_recording():
    with deferred_init(), eager():
        graph = torch.fx.symbolic_trace(Branches())
    assert [node.target for node in graph.graph.nodes] == ["x", torch.relu, torch.cat, "output"]


@pytest.mark.parametrize("context", [deferred_init, empty_init])
def test_an_initializer_without_a_kernel_for_the_dtype_may_be_recorded(context):
    with context():
        layer = nn.Linear(4, 4, dtype=torch.bfloat16)
        nn.init.orthogonal_(layer.weight)
    layer.load_state_dict(nn.Linear(4, 4, dtype=torch.bfloat16).state_dict())


def test_a_function_that_fails_draws_once(same_as_eager):
    def build():
        with pytest.raises(RuntimeError, match="too large"):
            functional.fractional_max_pool2d_with_indices(torch.ones(1, 1, 4, 4), 2, output_size=9)
        return nn.Linear(2, 2)

    same_as_eager(build)


def test_an_error_is_that_of_eager_construction():
    with deferred_init(), pytest.raises(RuntimeError, match="must match the size of tensor b") as error:
        torch.add(torch.randn(3), torch.randn(4))
    assert error.value.__context__ is None


def test_functions_that_are_run_whole_pass_on_gradients_of_real_tensors():
    with deferred_init():
        x = torch.zeros(3, 3).requires_grad_()
        torch.linalg.matrix_norm(x + torch.eye(3), 2).backward()
    assert x.grad is not None


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_buffers_stay_sparse(convert):
    def build():
        return holder(matrix=nn.Buffer(convert(torch.randn(4, 4)) * 2), layer=nn.Linear(1, 1))

    torch.manual_seed(0)
    expected = build()
    torch.manual_seed(0)
    with deferred_init():
        found = build()
    assert materialize(found).matrix.layout is expected.matrix.layout
    assert torch.equal(found.matrix.to_dense(), expected.matrix.to_dense())


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(1, 3))])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripts_have_the_values_of_their_modules_and_can_be_loaded(compiled, tmp_path):
    def build():
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
        model[1].running_mean = torch.randn(4)
        return nn.Sequential(nn.Linear(3, 3), compiled(model))

    torch.manual_seed(0)
    expected = build()
    torch.save(expected.state_dict(), tmp_path / "m.pth")
    torch.manual_seed(0)
    with deferred_init():
        deferred = build()
    with empty_init():
        loaded = build()
    load_checkpoint(loaded, tmp_path / "m.pth")
    for found in (materialize(deferred), loaded):
        watch(found)
        assert torch.equal(found(torch.ones(1, 3)), expected(torch.ones(1, 3)))


def test_lazy_modules_are_initialized_by_their_first_forward():
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(5))
    torch.manual_seed(0)
    with deferred_init():
        found = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(5))
    materialize(found)
    state = torch.get_rng_state()
    found(torch.ones(2, 3))
    torch.set_rng_state(state)
    expected(torch.ones(2, 3))
    assert torch.equal(found[1].weight, expected[1].weight)
