"""Ranks that load together: what is noted of them, and for how long."""

import gc
import threading
import weakref

from ranks import run_ranks
from torch import distributed, nn

from lightning_efficient_init.load.replicas import Replicas, replicas_of, replicating


def test_a_group_that_has_loaded_is_gone_once_it_is_destroyed():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    group = weakref.ref(distributed.group.WORLD)
    assert len(Replicas(group()).rounds([], is_divisible=True)) == 1
    distributed.destroy_process_group()
    gc.collect()
    assert group() is None


def _build_in_two_threads(rank):
    distributed.init_process_group("gloo")
    others = []
    thread = threading.Thread(target=lambda: others.append(nn.Linear(2, 2)))
    with replicating(distributed.group.WORLD):
        own = nn.Linear(2, 2)
        thread.start()
        thread.join()
    return [replicas_of(module) is not None for module in (own, *others)]


def test_modules_that_another_thread_builds_meanwhile_are_not_replicated():
    assert run_ranks(_build_in_two_threads, 2) == [[True, False]] * 2
