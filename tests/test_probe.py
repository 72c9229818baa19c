"""probe and is_supported where nothing is filtered; test_faults.py has the filters."""

from __future__ import annotations

import os
import threading

import pytest

from calls import errno_of
from mrelease import _probe, is_supported, probe, process_mrelease


def test_the_probe_says_what_the_kernel_says() -> None:
    found = probe()
    assert found["kernel"] == os.uname().release
    assert found["pidfd_open"] is True
    works = errno_of(process_mrelease, -1) == 9  # EBADF
    assert found["process_mrelease"] == (True if works else "kernel older than 5.15")
    assert is_supported() == works
    for feature, since in (("pidfd_info", "6.13"), ("cgroup_kill", "5.14")):
        if _probe._kernel_before(since):
            assert found[feature] == f"kernel older than {since}"
        else:
            assert found[feature] in (True, "no cgroup v2 mounted")


def test_threads_and_a_stolen_exit_status_do_not_matter() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert probe()["pidfd_open"] is True
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("release", "numbers"),
    [
        ("6.18.44", (6, 18)),
        ("5.10.0-28-cloud-amd64", (5, 10)),
        ("7.0-rc1+", (7, 0)),
        ("6.1", (6, 1)),
        ("5.15.167.4-microsoft-standard-WSL2", (5, 15)),
    ],
)
def test_kernel_releases_are_understood(release: str, numbers: tuple[int, int]) -> None:
    assert _probe._numbers(release) == numbers
