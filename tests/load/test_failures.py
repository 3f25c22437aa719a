"""What happens when reading fails, or is interrupted, and what is left behind."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from torch import nn

from lightning_efficient_init import load_checkpoint, plan_load
from lightning_efficient_init.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReadError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)
from lightning_efficient_init.load.load import run_plan
from lightning_efficient_init.load.pipeline import Settings
from lightning_efficient_init.load.state_dict import streaming_load_state_dict

SMALL = Settings(host_buffer_bytes=64 << 10, num_threads=2)


def big_net(value=0.0, dtype=torch.float32):
    return nn.ParameterDict({f"p{i}": nn.Parameter(torch.full((256, 1024), value, dtype=dtype)) for i in range(8)})


@pytest.fixture
def path(tmp_path):
    torch.save(big_net(1.0).state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt"


@pytest.fixture(autouse=True)
def leaves_nothing_behind(open_files):
    """No thread, no file descriptor and no patch survives a test."""
    gc.collect()
    before = threading.active_count(), open_files(), nn.Module.load_state_dict
    yield
    gc.collect()
    assert (threading.active_count(), open_files(), nn.Module.load_state_dict) == before


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def planned(request, path):
    """A model, and a plan made while the file was sound."""
    model = big_net(dtype=request.param)
    return model, plan_load(model, path)


def test_a_file_truncated_after_planning_is_reported_with_what_was_written(planned, path):
    model, plan = planned
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CorruptCheckpointError, match="the file ends at") as caught:
        run_plan(plan, SMALL)
    written = caught.value.written
    assert written
    assert set(written) < set(model)
    assert f"{len(written)} tensors were already written" in str(caught.value)
    assert "'p0'" in str(caught.value)
    assert str(path) in str(caught.value)
    for name, parameter in model.items():
        if name not in written:
            assert not parameter.any()
    assert (model["p0"] == 1).all()


def test_a_file_that_is_whole_again_before_the_last_attempt_is_loaded(planned, path):
    model, plan = planned
    content, modified_ns = path.read_bytes(), path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        file.truncate(len(content) // 2)

    def restore():
        with open(path, "r+b") as file:
            file.write(content)
        os.utime(path, ns=(modified_ns, modified_ns))  # it has only been out of sight

    timer = threading.Timer(0.1, restore)
    timer.start()
    run_plan(plan, SMALL)
    timer.join()
    assert all((parameter == 1).all() for parameter in model.values())


def _rename(path, other):
    other.rename(path)


def _overwrite(path, other):
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("replace", [_rename, _overwrite])
def test_a_file_of_the_same_size_in_the_files_place_is_noticed(replace, planned, path, tmp_path):
    model, plan = planned
    torch.save(big_net(2.0).state_dict(), tmp_path / "other.pt")
    replace(path, tmp_path / "other.pt")
    with pytest.raises(CheckpointReadError, match=r"w\.pt': expected the file as it was when its header") as caught:
        run_plan(plan, SMALL)
    assert set(caught.value.written) == set(model)


def test_a_file_that_a_hook_replaces_while_it_is_loaded_is_noticed(path, tmp_path):
    torch.save(big_net(2.0).state_dict(), tmp_path / "other.pt")

    def key_map(name):
        if name == "p7":
            (tmp_path / "other.pt").rename(path)
        return name

    with pytest.raises(CheckpointReadError, match="found another one"):
        load_checkpoint(big_net(), path, key_map=key_map)


def test_a_file_that_is_gone_is_reported(planned, path):
    model, plan = planned
    path.unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"w\.pt.*nothing at this path.*Check the path"):
        run_plan(plan, SMALL)
    assert not any(parameter.any() for parameter in model.values())


@pytest.mark.parametrize("replace", [os.mkdir, os.mkfifo])
def test_a_folder_or_a_pipe_in_the_files_place_is_reported_and_never_waited_for(replace, planned, path):
    model, plan = planned
    path.unlink()
    replace(path)
    with pytest.raises(UnsupportedCheckpointError, match="expected a regular file"):
        run_plan(plan, SMALL)
    assert not any(parameter.any() for parameter in model.values())


def _in_child(function):
    """Run ``function`` in a forked child and give its exit code: 0 if it returns."""
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    torch.set_num_threads(torch_threads)
    process.kill()
    process.join()
    code = process.exitcode
    process.close()
    return code


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_file_without_permission_is_reported(path):
    def load_as_nobody():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        with pytest.raises(CheckpointReadError, match="Permission denied"):
            load_checkpoint(big_net(), path)

    path.chmod(0)
    assert _in_child(load_as_nobody) == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_can_load_after_its_parent_has(path):
    model = big_net()
    load_checkpoint(model, path)

    def load_again():
        child = big_net(dtype=torch.bfloat16)
        load_checkpoint(child, path, num_threads=4)
        assert all((parameter == 1).all() for parameter in child.values())

    assert _in_child(load_again) == 0


MANY_THREADS_AFTER_A_FORK = """
    import os, sys, torch
    from torch import nn
    from lightning_efficient_init import load_checkpoint

    torch.set_num_threads(64)  # torch's pool is large and takes long to make, so that threads do meet at it
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    torch.save({f"p{i}": torch.ones(1 << 20, dtype=torch.bfloat16) for i in range(8)}, sys.argv[1])
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(1 << 20)) for i in range(8)})
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            load_checkpoint(model, sys.argv[1], num_threads=4, host_buffer_bytes=4 << 20)
            assert all((p == 1).all() for p in model.values())
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
"""


def test_many_threads_can_load_in_a_forked_child(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(MANY_THREADS_AFTER_A_FORK), str(tmp_path / "w.pt")]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_an_interrupt_ends_the_load_and_leaves_nothing_behind(tmp_path):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals arrive in the main thread")
    torch.save({"w": torch.ones(64 << 20)}, tmp_path / "w.pt")
    model = nn.ParameterDict({"w": nn.Parameter(torch.empty(64 << 20, dtype=torch.bfloat16))})
    plan = plan_load(model, tmp_path / "w.pt")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in range(100):
                run_plan(plan, SMALL)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def test_a_failing_progress_callback_ends_the_load(path, monkeypatch):
    class BrokenError(Exception):
        pass

    def broken(*_):
        raise BrokenError

    monkeypatch.setattr("lightning_efficient_init.load.report.Meter.tick", broken)
    with pytest.raises(BrokenError):
        load_checkpoint(big_net(), path)


def test_an_error_while_streaming_a_state_dict_restores_the_patch(path):
    original = nn.Module.load_state_dict
    with pytest.raises(RuntimeError, match="inside"), streaming_load_state_dict():
        assert nn.Module.load_state_dict is not original
        raise RuntimeError("inside")
    assert nn.Module.load_state_dict is original


def test_two_loads_at_once_do_not_disturb_each_other(path, tmp_path):
    torch.save(big_net(2.0).state_dict(), tmp_path / "two.pt")
    wrong = []

    def load(file, value, dtype):
        for _ in range(5):
            model = big_net(dtype=dtype)
            load_checkpoint(model, file, host_buffer_bytes=1 << 20)
            if not all((parameter == value).all() for parameter in model.values()):
                wrong.append(file)

    jobs = [(path, 1, torch.float32), (tmp_path / "two.pt", 2, torch.bfloat16)]
    threads = [threading.Thread(target=load, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_went_to_scratch_memory_only_is_not_called_written(tmp_path):
    state = {"direct": torch.ones(1000), "one": torch.ones(200, 300).t(), "two": torch.ones(200, 300).t()}
    torch.save(state, tmp_path / "w.pt")
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(tensor.shape)) for name, tensor in state.items()})
    plan = plan_load(model, tmp_path / "w.pt")
    with open(tmp_path / "w.pt", "r+b") as file:
        file.truncate(plan.entries["two"].offset + 1000)
    with pytest.raises(CorruptCheckpointError) as caught:
        run_plan(plan, SMALL)
    assert set(caught.value.written) == {"direct", "one"}
    assert not model["two"].any()


def test_values_read_by_a_modules_own_code_fail_with_all_that_was_written(tmp_path):
    class Doubling(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = nn.Sequential(nn.Linear(4, 4), Doubling(4, 4, bias=False))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    plan = plan_load(model, tmp_path / "w.pt")
    with open(tmp_path / "w.pt", "r+b") as file:
        file.truncate(plan.binding.read_by_calls[0].offset)
    with pytest.raises(CheckpointError) as caught:
        run_plan(plan, SMALL)
    assert {"0.weight", "0.bias"} <= set(caught.value.written)


def test_failing_takes_less_than_a_moment(planned, path):
    _, plan = planned
    with open(path, "r+b") as file:
        file.truncate(0)
    started = time.perf_counter()
    with pytest.raises(CorruptCheckpointError):
        run_plan(plan, Settings())
    assert time.perf_counter() - started < 5


def test_what_was_written_before_memory_that_others_share_is_named(tmp_path):
    torch.save({name: torch.ones(1000) for name in ("alone", "first", "last")}, tmp_path / "w.pt")
    memory = torch.zeros(1500)
    values = {"alone": torch.zeros(1000), "first": memory[:1000], "last": memory[500:]}  # which is written after it
    model = nn.ParameterDict({name: nn.Parameter(value) for name, value in values.items()})
    plan = plan_load(model, tmp_path / "w.pt")
    with open(tmp_path / "w.pt", "r+b") as file:
        file.truncate(plan.entries["last"].offset + 1000)
    with pytest.raises(CorruptCheckpointError) as caught:
        run_plan(plan, SMALL)
    assert caught.value.written[:2] == ("alone", "first")
