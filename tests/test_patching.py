"""``ScopedPatch``: in place while a context is open, for the code inside it only."""

import asyncio
import contextvars
import threading

import pytest

from lightning_efficient_init.patching import ScopedPatch


class Owner:
    def greet(self, name):
        """Say hello."""
        return f"hello {name}"


class Heir(Owner):
    pass


ORIGINAL = vars(Owner)["greet"]


@pytest.fixture
def patch():
    made = ScopedPatch(Owner, "greet", lambda original, self, name: original(self, name).upper())
    yield made
    assert vars(Owner)["greet"] is ORIGINAL


def test_the_replacement_acts_inside_the_context_and_the_original_after_it(patch):
    with patch():
        assert Owner().greet("ann") == Heir().greet("ann") == "HELLO ANN"
        assert Owner.greet.__doc__ == "Say hello."
        assert Owner.greet.__wrapped__ is ORIGINAL
    assert Owner().greet("ann") == "hello ann"
    assert vars(Owner)["greet"] is ORIGINAL


def test_contexts_nest(patch):
    with patch():
        with patch():
            assert Owner().greet("ann") == "HELLO ANN"
        assert Owner().greet("ann") == "HELLO ANN"
    assert vars(Owner)["greet"] is ORIGINAL


def test_two_patches_of_one_function_nest(patch):
    other = ScopedPatch(Owner, "greet", lambda original, self, name: f"<{original(self, name)}>")
    with patch(), other():
        assert Owner().greet("ann") == "<HELLO ANN>"
    assert Owner().greet("ann") == "hello ann"


def test_exceptions_close_the_context(patch):
    with pytest.raises(ValueError, match="inside"), patch(), patch():
        raise ValueError("inside")
    assert vars(Owner)["greet"] is ORIGINAL


def test_a_context_that_is_left_in_another_one_is_an_error_and_closed(patch):
    opened = patch()
    contextvars.copy_context().run(opened.__enter__)
    with pytest.raises(ValueError, match="different Context"):
        opened.__exit__(None, None, None)
    assert vars(Owner)["greet"] is ORIGINAL


def test_other_threads_reach_the_original(patch):
    said = []
    with patch():
        thread = threading.Thread(target=lambda: said.append(Owner().greet("ann")))
        thread.start()
        thread.join()
    assert said == ["hello ann"]


def test_the_original_comes_back_when_the_last_thread_leaves(patch):
    inside, leave = threading.Event(), threading.Event()
    said = []

    def stay():
        with patch():
            inside.set()
            leave.wait(10)
            said.append(Owner().greet("bob"))

    thread = threading.Thread(target=stay)
    with patch():
        thread.start()
        inside.wait(10)
    assert Owner().greet("ann") == "hello ann"
    leave.set()
    thread.join()
    assert said == ["HELLO BOB"]
    assert vars(Owner)["greet"] is ORIGINAL


def test_many_threads_that_come_and_go_leave_the_original(patch):
    wrong = []

    def work():
        for _ in range(200):
            with patch():
                if Owner().greet("a") != "HELLO A":
                    wrong.append("inside")
            if Owner().greet("a") != "hello a":
                wrong.append("outside")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_tasks_reach_the_original(patch):
    async def other(started, done):
        started.set()
        await done.wait()
        return Owner().greet("ann")

    async def main():
        started, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(other(started, done))
        await started.wait()
        with patch():
            done.set()
            return await task

    assert asyncio.run(main()) == "hello ann"


def test_the_replacement_may_call_what_it_replaces(patch):
    again = ScopedPatch(
        Owner, "greet", lambda original, self, name: original(self, self.greet("x") if name != "x" else name)
    )
    with again():
        assert Owner().greet("ann") == "hello hello x"
