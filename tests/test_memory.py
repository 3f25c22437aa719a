"""``PeakMemory``: what it counts."""

import ctypes
import mmap
import sys
import threading
import time

import pytest
import torch

from lightning_efficient_init.memory import PeakMemory, anonymous_bytes, cgroup_bytes

MIB = 1 << 20


@pytest.fixture(autouse=True)
def trimmed():
    """Freed memory goes back to the system, so that what is allocated next counts as growth."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def test_anonymous_memory_grows_with_what_is_touched_and_shrinks_when_freed():
    before = anonymous_bytes()
    memory = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert anonymous_bytes() - before < 16 * MIB
    for _ in range(64):
        memory.write(b"1" * MIB)
    assert 60 * MIB < anonymous_bytes() - before < 80 * MIB
    memory.close()
    assert anonymous_bytes() - before < 16 * MIB


def test_pages_of_mapped_files_do_not_count(tmp_path):
    (tmp_path / "f").write_bytes(b"\1" * 64 * MIB)
    storage = torch.UntypedStorage.from_file(str(tmp_path / "f"), shared=False, nbytes=64 * MIB)
    before = anonymous_bytes()
    assert torch.empty(0, dtype=torch.uint8).set_(storage).sum(dtype=torch.int64) == 64 * MIB
    assert anonymous_bytes() - before < 16 * MIB


def test_a_peak_between_two_looks_is_seen_by_a_background_watch():
    with PeakMemory(in_background=True) as memory:
        tensor = torch.ones(64 * MIB, dtype=torch.uint8)
        time.sleep(0.05)
        del tensor
    assert 60 * MIB < memory.host_bytes < 90 * MIB


def test_without_a_background_watch_samples_are_taken_when_asked_for():
    with PeakMemory() as memory:
        tensor = torch.ones(64 * MIB, dtype=torch.uint8)
        memory.sample()
        del tensor
    assert 60 * MIB < memory.host_bytes < 90 * MIB


def test_a_watch_ends_with_its_context_also_after_an_exception():
    before = threading.active_count()
    with pytest.raises(ValueError, match="inside"), PeakMemory(in_background=True):
        raise ValueError("inside")
    assert threading.active_count() == before


def _group(folder, names, *values):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, values, strict=True):
        (folder / name).write_text(f"{value}\n")


V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"
V2 = "memory.max", "memory.current", "memory.stat"


def test_the_group_that_leaves_least_of_all_above_counts(tmp_path):
    groups, membership = tmp_path / "groups", tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    assert cgroup_bytes(groups, membership) == sys.maxsize
    _group(groups, V2, "max", 900, "inactive_file 30")
    assert cgroup_bytes(groups, membership) == sys.maxsize
    _group(groups / "a" / "b", V2, 1000, 500, "anon 7\ninactive_file 30")
    assert cgroup_bytes(groups, membership) == 530
    _group(groups / "a", V2, 600, 500, "inactive_file 20")
    assert cgroup_bytes(groups, membership) == 120
    _group(groups / "a", V2, 600, 700, "inactive_file 20")
    assert cgroup_bytes(groups, membership) == 0


def test_version_1_has_its_own_files(tmp_path):
    (tmp_path / "cgroup").write_text("4:memory:/x\n3:cpu:/y\n")
    _group(tmp_path / "memory" / "x", V1, 1000, 400, "inactive_file 1\ntotal_inactive_file 50")
    _group(tmp_path / "memory" / "y", V1, 10, 4, "")
    assert cgroup_bytes(tmp_path, tmp_path / "cgroup") == 650


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
def test_device_memory_is_the_most_in_use():
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device)
    with PeakMemory([device, torch.device("cpu")]) as memory:
        tensor = torch.ones(64 * MIB, dtype=torch.uint8, device=device)
        memory.sample()
        del tensor
    assert memory.device_bytes == before + 64 * MIB
