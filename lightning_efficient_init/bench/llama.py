"""What is built and loaded: a LLaMA as one finds it, without ``reset_parameters``, initialized through ``apply``.

And models of many small tensors.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Size:
    """Number of layers, heads, and the embedding's width."""

    num_layers: int
    num_heads: int
    width: int
    vocabulary: int = 32000
    block_size: int = 2048

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layer: 8/3 of the embedding's, rounded up to a multiple of 256."""
        return math.ceil(int(8 * self.width / 3) / 256) * 256


SIZES = {
    "tiny": Size(2, 2, 64),
    "0.1B": Size(12, 12, 768),
    "0.5B": Size(20, 20, 1280),
    "1B": Size(22, 16, 2048),
    "7B": Size(32, 32, 4096),
    "13B": Size(40, 40, 5120),
}


class RMSNorm(nn.Module):
    """Root mean square normalization."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dim of ``x``."""
        return self.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.c_attn = nn.Linear(size.width, 3 * size.width, bias=False)
        self.c_proj = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Attend over ``x`` of shape (batch, time, width)."""
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.num_heads, -1).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2)
        )
        y = functional.scaled_dot_product_attention(_rotate(q, rope), _rotate(k, rope), v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.c_fc1 = nn.Linear(size.width, size.hidden, bias=False)
        self.c_fc2 = nn.Linear(size.width, size.hidden, bias=False)
        self.c_proj = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``x`` of shape (batch, time, width)."""
        return self.c_proj(functional.silu(self.c_fc1(x)) * self.c_fc2(x))


class Block(nn.Module):
    """One layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.rms_1 = RMSNorm(size.width)
        self.attn = Attention(size)
        self.rms_2 = RMSNorm(size.width)
        self.mlp = MLP(size)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Apply to ``x`` of shape (batch, time, width)."""
        x = x + self.attn(self.rms_1(x), rope)
        return x + self.mlp(self.rms_2(x))


class LLaMA(nn.Module):
    """The whole model; at ``"7B"`` it has 6.74 billion parameters, 13.48 GB in bf16."""

    rope: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.lm_head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.wte = nn.Embedding(size.vocabulary, size.width)
        self.h = nn.ModuleList(Block(size) for _ in range(size.num_layers))
        self.ln_f = RMSNorm(size.width)
        self.register_buffer("rope", _rope(size), persistent=False)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.size.num_layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, time, vocabulary) for ``tokens`` of shape (batch, time)."""
        x = self.wte(tokens)
        for block in self.h:
            x = block(x, self.rope[: tokens.shape[1]])
        return self.lm_head(self.ln_f(x))


def _rope(size: Size) -> Tensor:
    """Rotations of shape (time, half a head's width), complex64, whatever the model's dtype."""
    half = size.width // size.num_heads // 2
    theta = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(size.block_size, dtype=torch.float32), theta)
    return torch.polar(torch.ones_like(angles), angles)


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rope).flatten(-2).type_as(x)


class Tensors(nn.Module):
    """Parameters of one size, a hundred to a module.

    Args:
        count: How many.
        numel: Elements of each.
    """

    def __init__(self, count: int, numel: int) -> None:
        super().__init__()
        for start in range(0, count, 100):
            group = [nn.Parameter(torch.empty(numel)) for _ in range(start, min(count, start + 100))]
            self.add_module(str(start // 100), nn.ParameterList(map(nn.init.normal_, group)))


def build(name: str) -> nn.Module:
    """A LLaMA of one of the ``SIZES``, ``"many"`` for 10,000 small tensors, or tensors x elements: ``"1000x500"``."""
    if name == "many":
        return nn.ModuleList(nn.ModuleList(nn.Linear(16, 16) for _ in range(50)) for _ in range(100))
    if sizes := re.fullmatch(r"(\d+)x(\d+)", name):
        return Tensors(int(sizes[1]), int(sizes[2]))
    return LLaMA(SIZES[name])
