"""``collections_paused``: no collections inside, and as before outside."""

import gc
import threading

import pytest

from lightning_efficient_init.garbage import collections_paused


def test_collection_is_off_inside_and_on_again_outside_also_after_an_exception():
    with collections_paused():
        assert not gc.isenabled()
        with collections_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="inside"), collections_paused():
        raise ValueError("inside")
    assert gc.isenabled()


def test_collection_that_was_off_stays_off():
    gc.disable()
    try:
        with collections_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_last_thread_out_turns_it_on():
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with collections_paused():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=stay)
    with collections_paused():
        thread.start()
        inside.wait(10)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()
