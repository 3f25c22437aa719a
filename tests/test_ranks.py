"""The harness itself: results come back, and a rank that raises, dies or hangs is reported."""

import os
import time

import pytest
import torch
from ranks import RanksFailedError, run_ranks
from torch import distributed


def _sum_of_ranks(rank, start):
    distributed.init_process_group("gloo")
    total = torch.tensor(rank + start)
    distributed.all_reduce(total)
    return total


def _fail_on_one(rank, how):
    if rank == 1:
        how_to = {"raise": _raise, "die": lambda: os._exit(7), "hang": lambda: time.sleep(60)}
        how_to[how]()
    return rank


def _raise():
    raise KeyError("weight")


def test_every_rank_gives_its_result():
    assert run_ranks(_sum_of_ranks, 2, 10) == [torch.tensor(21), torch.tensor(21)]


@pytest.mark.parametrize(("how", "message"), [("raise", "weight"), ("die", "exit code 7"), ("hang", "still running")])
def test_a_rank_that_fails_is_named(how, message):
    with pytest.raises(RanksFailedError, match=f"(?s)rank 1.*{message}"):
        run_ranks(_fail_on_one, 2, how, timeout_s=10 if how == "hang" else 60)
