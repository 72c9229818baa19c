"""Debian's nohang, as it is and with the kill of docs/integrations.md, in a guest."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import exhaust

INSTALLED = Path("/usr/sbin/nohang")
CONFIG = Path("/etc/nohang/nohang.conf")
PAGE = Path(__file__).parent.parent / "docs/integrations.md"
HOG = 96  # MiB

exhaust.check_machine()


def as_installed(folder: Path) -> Path:
    return INSTALLED


def with_mrelease(folder: Path) -> Path:
    """A copy, changed by the commands of the page."""
    section = PAGE.read_text().partition("\n## nohang\n")[2]
    commands = re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)[0]
    copy = folder / "nohang"
    there = commands.replace("/usr/local/sbin/nohang", str(copy))
    subprocess.run(["sh", "-ec", there], check=True)
    before, after = (path.read_text().splitlines() for path in (INSTALLED, copy))
    assert len(set(after) - set(before)) == 2
    assert len(set(before) - set(after)) == 1
    return copy


WAYS = {"nohang": as_installed, "nohang with mrelease": with_mrelease}


def config(folder: Path, left: int) -> Path:
    """The package's own, but that SIGKILL comes at once below so many MiB."""
    text = CONFIG.read_text()
    for name in ("soft_threshold_min_mem", "hard_threshold_min_mem"):
        text, found = re.subn(rf"^{name} = .+$", f"{name} = {left} M", text, flags=re.M)
        assert found == 1
    changed = folder / "nohang.conf"
    changed.write_text(text)
    return changed


class Nohang:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def wait_for(self, words: str) -> str:
        """Wait for a line of its log with these words."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(line, end="")
            if words in line:
                return line
        raise AssertionError(f"nohang ended before it said {words!r}")


@contextmanager
def nohang(program: Path, config: Path) -> Iterator[Nohang]:
    with subprocess.Popen(
        [sys.executable, "-u", program, "--monitor", "--config", config],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield Nohang(process)
        finally:
            process.kill()


@pytest.mark.parametrize("way", WAYS)
def test_a_hog_that_grows_is_killed_and_innocents_live(
    way: str, tmp_path: Path
) -> None:
    program = WAYS[way](tmp_path)
    with (
        exhaust.kernel_asleep(),
        exhaust.workers(3) as innocents,
        nohang(program, config(tmp_path, 64)) as killer,
        exhaust.hog() as hog,
    ):
        assert "SIGKILL" in killer.wait_for("to the victim")
        hog.wait_exit()
        killer.wait_for("The victim ")
        assert not any(worker.exited() for worker in innocents)


@pytest.mark.parametrize("way", WAYS)
def test_time_until_the_memory_of_a_starved_hog_is_back(
    way: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    left = exhaust.meminfo("MemAvailable") // exhaust.MIB - HOG // 2
    program = WAYS[way](tmp_path)
    with (
        exhaust.starved_hog(HOG) as hog,
        exhaust.Watch(hog) as watch,
        nohang(program, config(tmp_path, left)) as killer,
    ):
        killer.wait_for("Sending SIGKILL to the victim")
        decided = time.time()
        # That it has died, or that it does not respond: the next one may be chosen.
        killer.wait_for("The victim ")
        went_on = time.time() - decided
        back = watch.seconds(decided)
    record_property(f"ms until {way} went on", round(went_on * 1000))
    record_property(f"ms until memory was back by {way}", round(back * 1000))
