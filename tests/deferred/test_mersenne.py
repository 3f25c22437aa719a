"""Jumps of MT19937 equal draws."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_efficient_init.deferred import deferred_init, mersenne
from lightning_efficient_init.deferred.recipe import recipe_of


@pytest.mark.parametrize("drawn_before", [0, 1, 623, 624, 625, 5000])
@pytest.mark.parametrize("num_draws", [625, 1248, 20_000, 30_000_001])
def test_a_jump_ends_where_as_many_draws_end(drawn_before, num_draws):
    drawn, jumped = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for generator in (drawn, jumped):
        torch.rand(drawn_before, generator=generator)
    torch.rand(num_draws, generator=drawn)
    mersenne._jump(jumped, num_draws)
    assert torch.equal(jumped.get_state(), drawn.get_state())
    assert torch.equal(torch.randn(1000, generator=jumped), torch.randn(1000, generator=drawn))


def test_a_jump_keeps_the_cached_normal_sample():
    drawn, jumped = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for generator in (drawn, jumped):
        torch.randn(3, generator=generator)
    torch.rand(10_000_000, generator=drawn)
    mersenne.advance(jumped, 10_000_000)
    assert torch.equal(torch.randn(5, generator=jumped), torch.randn(5, generator=drawn))


def test_many_small_steps_are_one_jump():
    steps, jump = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for _ in range(3):
        mersenne._jump(steps, 4_000_000_000)
    mersenne._jump(jump, 12_000_000_000)
    assert torch.equal(steps.get_state(), jump.get_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fill", [nn.init.normal_, nn.init.uniform_])
def test_draws_of_ordinary_fills_are_known_without_running_them(fill, dtype):
    sizes = (16, 17, 31, 32, 100, 4097)
    with deferred_init():
        filled = [fill(torch.empty(size, dtype=dtype)) for size in sizes]
        draws = [recipe_of(tensor).ops[-1].draw for tensor in filled]
        assert all(draw.stream.num_draws(draw.index) is not None for draw in draws)
    torch.manual_seed(3)
    with deferred_init():
        for size in sizes:
            fill(nn.Parameter(torch.empty(size, dtype=dtype)))
    found = torch.get_rng_state()
    torch.manual_seed(3)
    for size in sizes:
        fill(torch.empty(size, dtype=dtype))
    assert torch.equal(found, torch.get_rng_state())
