"""examples/guard.py in a guest that runs out of memory, with PSI and without."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from matrix import debian, guest, kernels, project
from matrix.base import Failure, Job

REQUIRED = "cgroup2,memcg,release,root"
MIB = 512  # of the guest's memory, a half is the guest's own files
KERNEL = (project.OLDEST, "6.1")
SWAP = """
echo 256M > /sys/block/zram0/disksize
mkswap -q /dev/zram0 || mkswap /dev/zram0
swapon /dev/zram0
"""
# What of the tests' needs these tests have not: it would take memory.
UNUSED = ("hypothesis*", "psutil*", "uvloop*", "setuptools*", "pip*", "wheel*")


def small(job: Job) -> Path:
    """The files of a guest with little memory: the checkout and the tests' needs."""
    overlay = job.work / "overlay"
    shutil.copytree(project.copy(job), overlay / "checkout")
    site = overlay / "usr/local/lib/python3.11/dist-packages"
    unused = shutil.ignore_patterns(*UNUSED)
    shutil.copytree(project.site(job), site, ignore=unused)
    project.install(project.wheel(job), site)
    kernels.modules(job, kernels.fetch(job, *KERNEL), overlay)
    return overlay


def boot(
    job: Job,
    overlay: Path,
    label: str,
    tests: list[str],
    *,
    append: str = "",
    swap: bool = True,
) -> None:
    """Run tests, as root, on Debian 12's kernel with little memory."""
    kernel = kernels.fetch(job, *KERNEL)
    guest.boot(
        job,
        dataclasses.replace(guest.X86, mib=MIB),
        kernel=kernels.image(kernel),
        root=debian.root(job, project.OLDEST, kernels.PYTHON),
        overlay=overlay,
        script=(SWAP if swap else "")
        + guest.tests_as(label, REQUIRED, job.args or tests),
        append=append,
        timeout=900,
    )


def run(job: Job) -> None:
    overlay = small(job)
    short = "tests/exhaust_guard.py"
    failures = []
    for label, tests, append, swap in (
        ("psi", [short, "tests/test_examples.py"], "", True),
        # The machine that neither PSI nor swap can warn.
        ("available", [short], "psi=0", False),
    ):
        try:
            boot(job, overlay, label, tests, append=append, swap=swap)
        except Failure as failure:
            failures.append(f"{label}: {failure}")
    if failures:
        raise Failure("; ".join(failures))
