"""A small model with every kind of layer that quantization meets, and what bitsandbytes itself makes of a weight."""

from __future__ import annotations

import bitsandbytes as bnb
import lightning as L
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import nn
from torch.nn import Linear as LinearByItsOwnName

from lightning_efficient_init import EfficientInit
from lightning_efficient_init.quantize.modes import is_4bit, is_nested


class NamedLinear(nn.Linear):
    """A subclass that computes what Linear does."""

    def describe(self):
        return f"{self.in_features} to {self.out_features}"


class Mixed(nn.Module):
    """Odd sizes, a subclass, a layer by another name, a tied head, and initializers of its own."""

    def __init__(self, width=65):
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.body = nn.Sequential(nn.Linear(width, 33), nn.GELU(), LinearByItsOwnName(33, width, bias=False))
        self.named = NamedLinear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 40, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.named.weight, std=0.02)
        self.named.weight.data.mul_(1.5)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.norm(self.named(x + self.body(x))))


QUANTIZED = ("body.0", "body.2", "named")


def by_bitsandbytes(weight, mode):
    """Parts of the weight, as bitsandbytes' own functions quantize it."""
    if mode == "int8":
        packed, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return {"weight": packed, "SCB": scale}
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=is_nested(mode), quant_type=mode[:3]
    )
    return {"weight": packed, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}


def assert_quantized_as_by_bitsandbytes(layer, weight, mode):
    """Every bit of the layer's state dict is what bitsandbytes makes of ``weight``."""
    state = layer.state_dict()
    expected = by_bitsandbytes(weight.detach(), mode)
    assert {key for key in state if key not in {"bias", "weight_format"}} == expected.keys()
    for name, part in expected.items():
        assert state[name].dtype == part.dtype, name
        assert torch.equal(state[name], part.to(state[name].device)), name
    assert type(layer.weight).__name__ == ("Params4bit" if is_4bit(mode) else "Int8Params")


def quantizing_fabric(mode, precision="bf16-true", accelerator="cpu", skip_modules=(), **kwargs):
    """Fabric that quantizes."""
    plugin = EfficientInit(precision, quantize=mode, skip_modules=skip_modules)
    kwargs = {"strategy": "efficient_init", **kwargs}
    return L.Fabric(accelerator=accelerator, devices=1, plugins=[plugin], **kwargs)


def built(fabric, make, seed=0, empty=False):
    """A model that is constructed under ``init_module``."""
    torch.manual_seed(seed)
    with fabric.init_module(empty_init=empty):
        return make()


def build_eagerly(make, dtype, device, seed=0):
    """The model that construction without quantization gives."""
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make()
    finally:
        torch.set_default_dtype(torch.float32)


def assert_outputs_equal(found, expected, mode):
    """What our layers and bitsandbytes' own ones give; sizes have to be multiples of 32, and the inputs' of 64."""
    if is_4bit(mode) and found.device.type == "cpu" and has_avx512bf16():
        # there bitsandbytes repacks the weights of its own layers, and rounds their statistics to bfloat16
        assert torch.allclose(found.float(), expected.float(), atol=0.05)
    else:
        assert torch.equal(found, expected)
