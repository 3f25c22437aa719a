"""A real fault on one rank: how long the others stay, and what they say."""

from __future__ import annotations

import os
import resource
import signal
import time
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from ranks import RanksFailedError, run_ranks
from torch import nn

from lightning_efficient_init import load_checkpoint
from lightning_efficient_init.errors import CheckpointError
from lightning_efficient_init.load import replicas

STRATEGIES = ["efficient_init_ddp", "efficient_init_fsdp", "efficient_init_fsdp2", "efficient_init_deepspeed_stage_3"]
strategies = pytest.mark.parametrize("strategy", STRATEGIES)
AT_MOST_S = 20  # on a machine that others use as well


class Faulty(nn.Sequential):
    """Raises on one rank while it is constructed."""

    def __init__(self, rank):
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8))
        if rank == 1:
            raise LookupError("no vocabulary on this node")


def fabric_of(strategy):
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy=strategy, precision="32-true")
    fabric.launch()
    return fabric


def small():
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def _cannot_read(rank, strategy, folder):
    """No file, a file that loses a piece of this rank's part, and then one that is whole."""
    fabric = fabric_of(strategy)
    with fabric.init_module():
        model = small()
    model = fabric.setup(model)

    def lose_the_end(key):
        if rank == 1:  # when the file has been found to be in order
            os.truncate(f"{folder}/1.pth", 9000)
        return key

    messages = []
    for name, key_map in ((f"{'missing' if rank else rank}.pth", None), (f"{rank}.pth", lose_the_end)):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(model, f"{folder}/{name}", key_map=key_map)
        messages.append((type(caught.value).__name__, str(caught.value), time.time()))
    load_checkpoint(model, f"{folder}/0.pth")
    return messages


@strategies
def test_a_file_that_one_rank_cannot_read_is_an_error_on_all_and_they_can_go_on(tmp_path, strategy):
    for rank in range(2):
        torch.save(small().state_dict(), tmp_path / f"{rank}.pth")
    first, second = run_ranks(_cannot_read, 2, strategy, str(tmp_path), timeout_s=60)
    for (kind, message, when), (other_kind, other_message, other_when) in zip(first, second, strict=True):
        assert (kind, message) == (other_kind, other_message)
        assert abs(when - other_when) < AT_MOST_S
    assert [kind for kind, _, _ in first] == ["CheckpointNotFoundError", "CorruptCheckpointError"]
    assert "missing.pth" in first[0][1]
    assert "1.pth" in first[1][1]


def _fault(rank, strategy, folder, fault):
    fabric = fabric_of(strategy)
    if rank == 1:
        Path(folder, "when").write_text(str(time.time()))
    if fault == "constructor":
        with fabric.init_module():
            fabric.setup(Faulty(rank))
    if fault == "memory":
        with fabric.init_module():
            fabric.setup(small())  # libraries and threads that come with the first one have what they need
        if rank == 1:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
        with fabric.init_module():
            model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8192, 8192))  # of 256 MiB; buffers are shared after it
        fabric.setup(model)
    if fault == "kill while sharing":
        replicas._ROUND_BYTES = 4096
        broadcast, rounds = replicas._broadcast, []

        def broadcast_or_end(*args):
            rounds.append(args)
            if rank == 1 and len(rounds) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            broadcast(*args)

        replicas._broadcast = broadcast_or_end
        with fabric.init_module(empty_init=True):
            model = small()
        load_checkpoint(model, f"{folder}/a.pth")
    if fault == "kill":
        with fabric.init_module(empty_init=True):
            model = fabric.setup(small())
        load_checkpoint(
            model, f"{folder}/a.pth", key_map=lambda key: os.kill(os.getpid(), signal.SIGKILL) if rank else key
        )


def fail(strategy, folder, fault):
    """What the ranks have said, by rank; none of them is there any more."""
    torch.save(small().state_dict(), folder / "a.pth")
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(_fault, 2, strategy, str(folder), fault, timeout_s=90)
    elapsed_s = time.time() - float((folder / "when").read_text())
    assert elapsed_s < AT_MOST_S
    first, second = str(failed.value).split("rank 1 ended with exit code")
    return first, second


@pytest.mark.parametrize("strategy", STRATEGIES[1:])  # DDP makes parameters in the constructor, see below
def test_a_rank_whose_memory_is_used_up_at_setup_takes_the_others_down_with_its_message(tmp_path, strategy):
    for said in fail(strategy, tmp_path, "memory"):
        assert "DefaultCPUAllocator: can't allocate memory" in said.strip().splitlines()[-1]


@strategies
def test_a_rank_whose_constructor_raises_takes_the_others_down(tmp_path, strategy):
    first, second = fail(strategy, tmp_path, "constructor")
    assert "no vocabulary on this node" in second
    assert "at least one of them has ended" in first


def test_a_rank_that_is_killed_while_it_shares_what_it_has_read_takes_the_others_down(tmp_path):
    first, second = fail("efficient_init_ddp", tmp_path, "kill while sharing")
    assert "-9" in second
    assert "rank 0 ended with exit code 1" in first  # and not because it was still there


@strategies
def test_a_rank_that_is_killed_takes_the_others_down(tmp_path, strategy):
    first, second = fail(strategy, tmp_path, "kill")
    assert "-9" in second
    assert "at least one of them has ended" in first
