"""Jumps of MT19937 equal draws."""

from __future__ import annotations

import pytest
import torch

from lightning_efficient_init.deferred import mersenne


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
