"""Models with what stock strategies get wrong, and what the tests of sharding strategies ask about them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torchmetrics import MeanMetric

# for tests that run a model: of torch 2.6, FSDP2 can be built on a CPU, but not run
RUN_ENGINES = [
    pytest.param(
        "fsdp2",
        marks=pytest.mark.skipif(
            not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot run FSDP2 on a CPU"
        ),
    ),
    "fsdp",
]


class RMSNorm(nn.Module):
    """Without ``reset_parameters``."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.scale


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(self.norm(x))))


class TinyLM(nn.Module):
    """A head tied to the embedding, RoPE-like buffers, frozen and odd-shaped parameters, a metric."""

    def __init__(self, width=8, vocabulary=13, depth=2):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.shift = nn.Parameter(torch.randn(1))
        self.frozen = nn.Parameter(torch.randn(3, width).abs_(), requires_grad=False)
        # rounded from doubles, alike on every device
        self.register_buffer("angles", (torch.arange(width).double() / 7).float(), persistent=False)
        self.register_buffer("noise", torch.randn(width))
        self.metric = MeanMetric()
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.2)

    def forward(self, tokens):
        x = self.embed(tokens) + self.angles.cos().to(self.embed.weight.dtype) + self.noise + self.frozen.sum(0)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) + self.shift


def tokens(rank=0, vocabulary=13):
    return torch.randint(0, vocabulary, (4, 5), generator=torch.Generator().manual_seed(100 + rank))


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


def eager_model(seed=1, **kwargs):
    """What one device has."""
    torch.manual_seed(seed)
    return TinyLM(**kwargs)


def built(fabric, *, empty=False):
    """A model of a Fabric strategy, each rank with a seed of its own."""
    torch.manual_seed(1 + fabric.global_rank)
    with fabric.init_module(empty_init=empty):
        return TinyLM()


def trainable(model):
    return [param for param in model.parameters() if param.requires_grad]


def setup_for_training(fabric):
    model = fabric.setup(built(fabric))
    optimizer = fabric.setup_optimizers(torch.optim.Adam(trainable(model), lr=1e-2))
    return model, optimizer


def train(fabric, model, optimizer, steps):
    """Losses, averaged over the ranks, of so many steps."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, tokens(10 * step + fabric.global_rank).to(fabric.device))
        fabric.backward(loss)
        optimizer.step()
        losses.append(fabric.all_reduce(loss.detach()).item())
    return losses


def whole_state(model):
    """All values of a sharded or other model, gathered; with buffers that are not saved, under the names it had."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False) if _is_wrapped(model) else nullcontext():
        state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        whole = {
            name: t.detach().full_tensor() if hasattr(t, "full_tensor") else t.detach() for name, t in state.items()
        }
        return {name.replace("_fsdp_wrapped_module.", ""): t.clone() for name, t in whole.items()}


def _is_wrapped(model):
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def assert_equal_states(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].cpu(), value.cpu()), name
