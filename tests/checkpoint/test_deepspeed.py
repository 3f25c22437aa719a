"""Folders that DeepSpeed has saved, from real processes, read on one device and on other numbers of them."""

from __future__ import annotations

import glob
import itertools
import math
import os
import shutil
import warnings

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from sharded_models import TinyLM, assert_equal_states, eager_model, loss_of, tokens, whole_state

from lightning_efficient_init import EfficientInit, load_checkpoint, plan_load
from lightning_efficient_init.checkpoint import index_checkpoint
from lightning_efficient_init.checkpoint.deepspeed import blocks
from lightning_efficient_init.errors import CorruptCheckpointError, UnsupportedCheckpointError


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_blocks_make_up_a_stretch_in_order(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = torch.arange(numel).view(shape)
    found = []
    for offsets, sizes in blocks(tuple(shape), start, stop):
        block = whole
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            block = block.narrow(dim, offset, size)
        found.append(block.flatten().tolist())
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert list(itertools.chain(*found)) == list(range(start, stop))


def _save(rank, world_size, path):
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    plugins = [EfficientInit("32-true")]
    strategy = "efficient_init_deepspeed_stage_3"
    fabric = L.Fabric(accelerator="cpu", devices=world_size, strategy=strategy, plugins=plugins)
    fabric.launch()
    torch.manual_seed(1)
    with fabric.init_module():
        model = TinyLM()
    trainable = [param for param in model.parameters() if param.requires_grad]
    model, optimizer = fabric.setup(model, torch.optim.Adam(trainable, lr=1e-2))
    fabric.backward(loss_of(model, tokens(rank)))
    optimizer.step()
    optimizer.zero_grad()
    fabric.save(path, {"model": model, "optimizer": optimizer, "steps": 3})
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.clone() for name, tensor in whole_state(model.module).items()}


@pytest.fixture(scope="module", params=[2, 3])
def saved(request, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("deepspeed") / "saved")
    return path, run_ranks(_save, request.param, request.param, path)[0]


def test_a_folder_loads_on_one_device(saved):
    path, expected = saved
    model = eager_model(9)
    load_checkpoint(model, path)
    assert_equal_states(whole_state(model), expected)


def test_its_index_has_fabrics_tree_and_no_code_runs(saved):
    index = index_checkpoint(saved[0])
    assert index.format == "DeepSpeed folder"
    assert index.weights_key == "model"
    assert index.tree["steps"] == 3
    assert tuple(index.weights["blocks.0.up.weight"].shape) == (17, 8)


def _load(rank, world_size, path, strategy):
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    plugins = [EfficientInit("32-true")]
    fabric = L.Fabric(accelerator="cpu", devices=world_size, strategy=strategy, plugins=plugins)
    fabric.launch()
    with fabric.init_module(empty_init=True):
        model = TinyLM()
    model = fabric.setup(model)
    load_checkpoint(model, path)
    if "deepspeed" in strategy:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: tensor.clone() for name, tensor in whole_state(model.module).items()}
    return whole_state(getattr(model.module, "module", model.module))


@pytest.mark.parametrize("strategy", ["efficient_init_ddp", "efficient_init_fsdp2", "efficient_init_deepspeed_stage_3"])
def test_a_folder_loads_under_other_strategies_and_numbers_of_ranks(saved, strategy):
    path, expected = saved
    for state in run_ranks(_load, 2, 2, path, strategy):
        assert_equal_states(state, expected)


def test_no_more_is_planned_than_the_weights(saved):
    path, _ = saved
    model = TinyLM()
    weights = sum(tensor.nbytes for tensor in dict(model.named_parameters()).values()) + model.noise.nbytes
    assert plan_load(model, path).num_bytes == weights


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def test_a_rank_without_its_file_is_an_error(copied):
    os.unlink(glob.glob(f"{copied}/checkpoint/*rank_1_*optim_states.pt")[0])
    with pytest.raises(UnsupportedCheckpointError, match="for each rank"):
        load_checkpoint(TinyLM(), copied)


def test_flat_tensors_that_are_too_short_are_an_error(copied):
    file = glob.glob(f"{copied}/checkpoint/*rank_1_*optim_states.pt")[0]
    states = torch.load(file, weights_only=False)
    groups = states["optimizer_state_dict"]["fp32_flat_groups"]
    groups[0] = groups[0][:-5].clone()
    torch.save(states, file)
    with pytest.raises(CorruptCheckpointError, match=r"tensor 'blocks\.1\.down\.bias'.*rank's flat tensors"):
        load_checkpoint(TinyLM(), copied)
