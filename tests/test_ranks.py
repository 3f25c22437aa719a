"""The harness itself: results come back, and a rank that raises, dies or hangs is reported, with where it hangs."""

import os
import sys
import time

import pytest
import torch
from ranks import RanksFailedError, run_ranks, run_script
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


FAILURES = [("raise", "weight"), ("die", "exit code 7"), ("hang", "still running.*in <lambda>")]


@pytest.mark.parametrize(("how", "message"), FAILURES)
def test_a_rank_that_fails_is_named(how, message):
    with pytest.raises(RanksFailedError, match=f"(?s)rank 1.*{message}"):
        run_ranks(_fail_on_one, 2, how, timeout_s=10 if how == "hang" else 60)


# waits for a process that it has started, and that waits, too
SCRIPT = """
import os, subprocess, sys, time
def wait_for_the_other():
    if "CHILD" not in os.environ:
        subprocess.run([sys.executable, *sys.orig_argv[1:]], env={**os.environ, "CHILD": ""})
    print("ranks:", os.environ.get("LOCAL_RANK"), flush=True)
    time.sleep(60 if sys.argv[1] == "hang" else 0)
    sys.exit(sys.argv[1] == "fail")
wait_for_the_other()
"""


def test_a_script_is_not_told_that_it_is_one_of_several_ranks():
    printed = run_script([sys.executable, "-c", SCRIPT, "end"], {**os.environ, "LOCAL_RANK": "0"}, timeout_s=60)
    assert printed == "ranks: None\nranks: None\n"


@pytest.mark.parametrize(("how", "message"), [("fail", "exit code 1"), ("hang", "still running")])
def test_a_script_that_fails_is_ended_with_all_that_it_has_started(how, message):
    with pytest.raises(RanksFailedError, match=message) as failed:
        run_script([sys.executable, "-c", SCRIPT, how], os.environ, timeout_s=10 if how == "hang" else 60)
    assert str(failed.value).count("in wait_for_the_other") == (2 if how == "hang" else 0)
