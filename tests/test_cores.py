"""``available_cores``: affinity and the cgroup's quota."""

import math
import os

import pytest

from lightning_efficient_init.cores import available_cores, cgroup_quota


@pytest.fixture
def quota(tmp_path):
    """The quota that a tree of cgroup files gives."""

    def quota(membership, **files):
        for name, text in files.items():
            path = tmp_path / "groups" / name.replace("__", "/").replace("cpu_", "cpu.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "cgroup").write_text(membership)
        return cgroup_quota(tmp_path / "groups", tmp_path / "cgroup")

    return quota


def test_a_container_sees_its_limit_at_the_root(quota):
    assert quota("0::/\n", cpu_max="150000 100000\n") == 1.5


def test_the_smallest_limit_of_all_groups_above_counts(quota):
    files = {"cpu_max": "max 100000", "a__cpu_max": "300000 100000", "a__b__cpu_max": "800000 100000"}
    assert quota("0::/a/b\n", **files) == 3


def test_version_1_has_its_own_files(quota):
    files = {"cpu__cpu_cfs_quota_us": "-1", "cpu__cpu_cfs_period_us": "100000"}
    files |= {"cpu__x__cpu_cfs_quota_us": "50000", "cpu__x__cpu_cfs_period_us": "100000"}
    assert quota("4:cpu:/x\n3:memory:/y\n", **files) == 0.5


@pytest.mark.parametrize("text", ["max 100000", "", "nonsense", "0 100000", "100000 0"])
def test_what_is_no_limit_is_none(quota, text):
    assert quota("0::/\n", cpu_max=text) == math.inf


def test_no_files_are_no_limit(tmp_path):
    assert cgroup_quota(tmp_path / "none", tmp_path / "nothing") == math.inf


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_affinity_counts(monkeypatch):
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= available_cores() <= len(allowed)
